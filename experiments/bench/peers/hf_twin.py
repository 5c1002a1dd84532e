"""Fine-tune a model folder with Transformers, in full or with PEFT's LoRA, as a separate program.

It imports nothing of this project, so that any Python with torch, transformers and peft can run it:

    python hf_twin.py '{"folder": "model", "adapter": "adapter", "mode": "eager", "optimizer": {…}, "batch_size": 4,
                        "seq_len": 256, "threads": 2, "seed": 0}'

and communicates by lines: it writes {"ready": true, …}; for every line "run K" it trains K steps on fresh random tokens
and writes {"seconds": …, "losses": […], "peak_bytes": …}; it ends when its input does. adapter: a folder in PEFT's
format, which alone is trained; null: all parameters are. Gradient checkpointing is off, and everything is float32.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

Fields = dict[str, Any]


class TransformersTrainer:
    """The step: loss and gradient, clipping by the global norm, fused AdamW on what is trained."""

    def __init__(self, spec: Fields):
        self.spec = spec
        model: Any = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32)
        model.config.use_cache = False
        if spec["adapter"]:
            import peft

            model = peft.PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True)
        model.train()
        self.model = model
        self.forward = torch.compile(model) if spec["mode"] == "compile" else model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        values = spec["optimizer"]
        plain = [parameter for parameter in self.trained if parameter.ndim < 2]
        decayed = [parameter for parameter in self.trained if parameter.ndim >= 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": values["weight_decay"]},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=values["learning_rate"],
            betas=(values["beta1"], values["beta2"]),
            eps=values["epsilon"],
            fused=True,
        )
        self.random = np.random.default_rng(spec["seed"])

    def prepare(self) -> float:
        """Return the seconds of a first forward and backward pass, compilation included, without an update."""
        start = time.perf_counter()
        rows = torch.zeros((self.spec["batch_size"], self.spec["seq_len"] + 1), dtype=torch.int64)
        self._loss(rows).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def run(self, count: int) -> tuple[float, list[float]]:
        """Train `count` steps; return (seconds in total, loss of each step)."""
        shape = (count, self.spec["batch_size"], self.spec["seq_len"] + 1)
        batches = torch.from_numpy(self.random.integers(0, self.model.config.vocab_size, shape))
        losses = []
        start = time.perf_counter()
        for rows in batches:
            loss = self._loss(rows)
            loss.backward()
            if self.spec["optimizer"]["clip_norm"]:
                nn.utils.clip_grad_norm_(self.trained, self.spec["optimizer"]["clip_norm"])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return time.perf_counter() - start, [float(loss) for loss in losses]

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats of rows [batch, seq + 1]."""
        logits = self.forward(input_ids=rows[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    """Read the spec from the command line, then answer line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be mixed with the answers

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    trainer = TransformersTrainer(spec)
    compile_seconds = trainer.prepare()
    names = ("torch", "transformers", "peft") if spec["adapter"] else ("torch", "transformers")
    say(
        {
            "ready": True,
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "trained": sum(parameter.numel() for parameter in trainer.trained),
            "compile_seconds": compile_seconds,
            "versions": {name: version(name) for name in names},
            "threads": torch.get_num_threads(),
        }
    )
    for line in sys.stdin:
        seconds, losses = trainer.run(int(line.split()[1]))
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        say({"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes})


if __name__ == "__main__":
    main()
