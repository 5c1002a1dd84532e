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
from jaxtyping import Int32

from experiments.process import keep_memory
from model import Execution
from model.adapters import Adapter
from model.ambient import pinned
from model.convert import load_peft
from model.sharding import make_mesh
from model.store import open_parameters
from train import HParams, TrainConfig
from train.config import stack_hparams
from train.lanes.build import compile_program
from train.objectives import Instruction, LanguageModeling, Preference
from train.objectives.objective import Batch, Objective


class IsoflopTrainer:
    """The step as the training loop drives it: donated state, batches from the host, no wait between steps."""

    def __init__(self, spec: dict[str, Any]):
        self.config, params = open_parameters(spec["folder"])
        self.spec = spec
        train_config = TrainConfig(batch_size=spec["batch_size"], seq_len=spec["seq_len"], schedule="constant")
        adapter, tree = load_peft(spec["adapter"], self.config) if spec["adapter"] else (None, params)
        objective = _objective(spec["method"], adapter)
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
        drawn = self.random.integers(0, self.config.vocab_size, (count, 1, *self._shape())).astype(np.int32)
        batches = [self._batch(rows) for rows in drawn]
        active, losses = np.ones(1, bool), []
        start = time.perf_counter()
        for batch in batches:
            self.state, metrics = self.program.step(self.state, batch, self.hparams, active, self.frozen)
            losses.append(metrics["loss"])
        jax.block_until_ready((self.state, losses))
        return time.perf_counter() - start, [float(loss[0]) for loss in losses]

    def _shape(self) -> tuple[int, int]:
        """Return the shape of the tokens of one step, as `hf_twin.py` draws them."""
        rows, seq_len = self.spec["batch_size"], self.spec["seq_len"]
        return {None: (rows, seq_len + 1), "sft": (rows, seq_len), "dpo": (2 * rows, seq_len)}[self.spec["method"]]

    def _batch(self, tokens: Int32[np.ndarray, "1 rows seq"]) -> Batch:
        """Return tokens as a batch of one lane; the first quarter of a conversation or answer is the prompt."""
        if self.spec["method"] is None:
            return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:]}
        rows, seq_len = self.spec["batch_size"], self.spec["seq_len"]
        ones, trained = np.ones((1, rows, seq_len), np.int32), np.ones((1, rows, seq_len), np.float32)
        trained[..., : seq_len // 4] = 0
        if self.spec["method"] == "sft":
            next_ones = {"targets": np.roll(tokens, -1, axis=-1), "loss_mask": np.roll(trained, -1, axis=-1)}
            positions = np.cumsum(ones, axis=-1, dtype=np.int32) - 1
            return {"tokens": tokens, "segment_ids": ones, "positions": positions, **next_ones}
        batch: Batch = {"weights": np.ones((1, rows), np.float32)}
        for side, of_side in (("chosen", tokens[:, :rows]), ("rejected", tokens[:, rows:])):
            batch[f"{side}_tokens"], batch[f"{side}_mask"], batch[f"{side}_segment_ids"] = of_side, trained, ones
            batch[f"reference_{side}"] = np.full((1, rows), self.spec["reference"], np.float32)
            batch[f"reference_{side}_tail"] = np.zeros((1, rows), np.float32)  # which ld_alpha=1 does not read
        return batch


def _objective(method: str | None, adapter: Adapter | None) -> Objective:
    """Return the objective of language modelling, of "sft" or of "dpo"."""
    match method:
        case "sft":
            return Instruction(adapter=adapter)
        case "dpo":
            return Preference(reference="given", adapter=adapter)
    return LanguageModeling(adapter=adapter)


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
