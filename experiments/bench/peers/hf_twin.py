"""Fine-tune a model folder with Transformers or TRL, in full or with PEFT's LoRA, as a separate program.

It imports nothing of this project, so that any Python with torch, transformers, peft and trl can run it:

    python hf_twin.py '{"folder": "model", "adapter": "adapter", "mode": "eager", "optimizer": {…}, "batch_size": 4,
                        "seq_len": 256, "threads": 2, "seed": 0, "method": null}'

and communicates by lines: it writes {"ready": true, …}; for every line "run K" it trains K steps on fresh random tokens
and writes {"seconds": …, "losses": […], "peak_bytes": …}; it ends when its input does. adapter: a folder in PEFT's
format, which alone is trained; null: all parameters are. method: null, a language-modelling loss as a user of
Transformers writes it; "sft" or "dpo", the step of TRL's trainer on tokens of which the first quarter of a row is the
prompt; for "dpo" all log-probabilities of the reference are the number "reference". Gradient checkpointing is off, and
everything is float32.
"""

import json
import os
import resource
import sys
import tempfile
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
        self.backward(torch.zeros(self.shape(), dtype=torch.int64))
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def run(self, count: int) -> tuple[float, list[float]]:
        """Train `count` steps; return (seconds in total, loss of each step)."""
        batches = torch.from_numpy(self.random.integers(0, self.model.config.vocab_size, (count, *self.shape())))
        losses = []
        start = time.perf_counter()
        for rows in batches:
            loss = self.backward(rows)
            if self.spec["optimizer"]["clip_norm"]:
                nn.utils.clip_grad_norm_(self.trained, self.spec["optimizer"]["clip_norm"])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
        return time.perf_counter() - start, [float(loss) for loss in losses]

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tokens of one step."""
        return (self.spec["batch_size"], self.spec["seq_len"] + 1)

    def backward(self, rows: torch.Tensor) -> torch.Tensor:
        """Add the gradient of the mean cross-entropy in nats of rows [batch, seq + 1], and return the loss."""
        logits = self.forward(input_ids=rows[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        return loss.detach()


class TrlTrainer(TransformersTrainer):
    """The step of TRL's SFTTrainer or DPOTrainer: its loss, gradient and bookkeeping, with the optimizer above."""

    def __init__(self, spec: Fields):
        super().__init__(spec)
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

        words = {str(number): number for number in range(4)} | {"<pad>": 4, "<eos>": 5}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="<pad>", eos_token="<eos>"
        )
        self.folder = tempfile.TemporaryDirectory(prefix="isoflop-trl-")
        common: Fields = {
            "output_dir": self.folder.name,
            "gradient_checkpointing": False,
            "bf16": False,
            "per_device_train_batch_size": spec["batch_size"],
            "report_to": [],
            "logging_strategy": "no",
            "save_strategy": "no",
            "use_cpu": not torch.cuda.is_available(),
            "max_length": spec["seq_len"],
        }
        if spec["method"] == "sft":
            data = Dataset.from_list([{"input_ids": [0] * spec["seq_len"]}] * spec["batch_size"])
            trainer: Any = SFTTrainer(
                model=self.model, args=SFTConfig(**common), train_dataset=data, processing_class=tokenizer
            )
        else:
            data = Dataset.from_list([{"prompt": "1 2", "chosen": " 3", "rejected": " 0"}] * spec["batch_size"])
            arguments = DPOConfig(**common, precompute_ref_log_probs=True)
            trainer = DPOTrainer(model=self.model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.optimizer = self.optimizer
        trainer.model.train()
        self.trainer = trainer

    def shape(self) -> tuple[int, ...]:
        """Return [batch, seq], and for pairs [2 * batch, seq], all chosen answers first."""
        return (self.spec["batch_size"] * (1 if self.spec["method"] == "sft" else 2), self.spec["seq_len"])

    def backward(self, rows: torch.Tensor) -> torch.Tensor:
        """Add the gradient of the loss of TRL's trainer, and return the loss."""
        prompt, trained = rows.shape[1] // 4, torch.ones_like(rows)
        trained[:, :prompt] = 0
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        if self.spec["method"] == "sft":
            batch["labels"] = rows.masked_fill(trained == 0, -100)
            return self.trainer.training_step(self.trainer.model, batch, trained.sum())
        reference = torch.full((len(rows) // 2,), self.spec["reference"])
        batch |= {"completion_mask": trained, "ref_chosen_logps": reference, "ref_rejected_logps": reference}
        return self.trainer.training_step(self.trainer.model, batch)


def main() -> None:
    """Read the spec from the command line, then answer line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be mixed with the answers

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    trainer = (TrlTrainer if spec["method"] else TransformersTrainer)(spec)
    compile_seconds = trainer.prepare()
    names = ["torch", "transformers", *(["peft"] if spec["adapter"] else []), *(["trl"] if spec["method"] else [])]
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
