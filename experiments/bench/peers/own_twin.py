"""Run our training step in a separate process and report its peak memory; the protocol is that of `hf_twin.py`."""

import dataclasses
import json
import os
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.process import keep_memory
from model import Execution
from model.ambient import pinned
from model.convert import load_peft
from model.sharding import make_mesh
from model.store import open_parameters
from train import HParams, TrainConfig
from train.config import stack_hparams
from train.lanes.build import compile_program
from train.objectives import LanguageModeling


class IsoflopTrainer:
    """The step as the training loop drives it: donated state, batches from the host, no wait between steps."""

    def __init__(self, spec: dict[str, Any]):
        self.config, params = open_parameters(spec["folder"])
        self.shape = (1, spec["batch_size"], spec["seq_len"] + 1)
        train_config = TrainConfig(batch_size=spec["batch_size"], seq_len=spec["seq_len"], schedule="constant")
        adapter, tree = load_peft(spec["adapter"], self.config) if spec["adapter"] else (None, params)
        objective = LanguageModeling(adapter=adapter)
        self.hparams = stack_hparams([HParams(**spec["optimizer"])])
        execution = Execution.from_dict(spec["execution"])
        self.program = compile_program(self.config, train_config, 1, make_mesh({"data": 1}), None, execution, objective)
        self.state = self.program.init(self.hparams)
        self.frozen = jax.device_put(objective.frozen(params))
        start = dataclasses.replace(self.program.take(self.state, 0), params=jax.tree.map(jnp.asarray, tree))
        self.state = self.program.put(self.state, 0, start)
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(self.program.lane.params))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves((self.program.lane.params, self.frozen)))
        self.random = np.random.default_rng(spec["seed"])

    def run(self, count: int) -> tuple[float, list[float]]:
        """Train `count` steps on fresh random tokens; return (seconds in total, loss of each step)."""
        rows = self.random.integers(0, self.config.vocab_size, (count, *self.shape))
        tokens, targets = (np.ascontiguousarray(part, np.int32) for part in (rows[..., :-1], rows[..., 1:]))
        active, losses = np.ones(1, bool), []
        start = time.perf_counter()
        for index in range(count):
            batch = {"tokens": tokens[index], "targets": targets[index]}
            self.state, metrics = self.program.step(self.state, batch, self.hparams, active, self.frozen)
            losses.append(metrics["loss"])
        jax.block_until_ready((self.state, losses))
        return time.perf_counter() - start, [float(loss[0]) for loss in losses]


@pinned()
def main() -> None:
    """Read the spec from the command line, then answer line by line."""
    keep_memory()  # as `isoflop` does
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be mixed with the answers

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    trainer = IsoflopTrainer(json.loads(sys.argv[1]))
    say(
        {
            "ready": True,
            "parameters": trainer.parameters,
            "trained": trainer.trained,
            "compile_seconds": trainer.program.compile_seconds,
        }
    )
    for line in sys.stdin:
        seconds, losses = trainer.run(int(line.split()[1]))
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        say({"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes})


if __name__ == "__main__":
    main()
