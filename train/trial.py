"""A trial: the host's side of one lane, and what a caller says and is told of it."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

from model import Params, accounting
from model.errors import InputError
from train.checkpoint import Checkpoints
from train.data import Loader
from train.metrics import MetricsLog, read_metrics
from train.run import Identity, Run, load_run
from train.schedule import uses_horizon
from train.step import metric_names


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run went.

    status: finished, diverged or interrupted. loss: training cross-entropy of the last step, nats per token.
    validation_loss: on the fixed validation tokens at the run's end (None unless finished). epochs: passes over
    the training data; above 1 tokens were repeated. flops_6nd and flops_exact: of the whole run, by convention
    (see model/accounting.py). seconds: training time without compilation, over all restarts.
    """

    run: Path
    status: str
    steps: int
    tokens: int
    epochs: float
    parameters: int
    flops_6nd: float
    flops_exact: float
    loss: float | None
    validation_loss: float | None
    seconds: float
    compile_seconds: float

    @property
    def params(self) -> Params:
        """The parameters of the run's newest checkpoint."""
        return load_run(self.run)[1]


@dataclasses.dataclass(frozen=True)
class Shell:
    """What a run does beside training; none of it changes a loss.

    evaluate_every: steps between validations; 0: only at the end. evaluate_tokens: of the validation split, the
    same ones each time. checkpoint_every: steps; 0: by time alone. mesh: axes as in {"data": 8}; None: all devices.
    """

    evaluate_every: int = 0
    evaluate_tokens: int = 65_536
    checkpoint_every: int = 0
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 2
    mesh: dict[str, int] | None = None
    description: str = "training"


class Trial:
    """The host's side of one lane: its run directory, its data order, its place."""

    def __init__(self, config, train_config, hparams, folder, data, data_hash, steps, shell):
        if steps is None:
            steps = int(hparams.total_steps)
        if steps < 1:
            raise InputError(f"steps={steps} must be at least 1: give steps, or total_steps in the hyperparameters")
        if uses_horizon(train_config.schedule) and hparams.total_steps == 0:
            hparams = hparams.replace(total_steps=steps)
        self.config, self.train_config, self.hparams, self.stop = config, train_config, hparams, steps
        self.loader = Loader(
            data,
            batch_size=train_config.batch_size,
            seq_len=train_config.seq_len,
            seed=int(hparams.seed),
            segment_documents=train_config.segment_documents,
        )
        self.run = Run(folder, Identity(config, train_config, hparams, data_hash))
        if self.run.record.get("data") != str(Path(data).resolve()):
            self.run.update(data=str(Path(data).resolve()))
        self.checkpoints = Checkpoints(folder, keep=shell.keep_checkpoints)
        self.log: MetricsLog | None = None
        self.step = self.run.record["step"] if self.ended else 0
        self.seconds: float = self.run.record["seconds"]
        self.last: dict[str, Any] = {}
        self.validation_loss: float | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train."""
        record = self.run.record
        return record["status"] == "diverged" or (record["status"] == "finished" and record["step"] >= self.stop)

    @property
    def active(self) -> bool:
        """Whether the next step is this trial's too."""
        return not self.ended and self.step < self.stop

    def resume(self, like: Any) -> Any | None:
        """The newest intact state, or None for a fresh start; the record is cut to it."""
        found = self.checkpoints.restore_newest(like)
        if not self.ended:
            self.step = 0 if found is None else found[0]
            self._recall()
            self.log = MetricsLog(self.run.folder, self.step, tensorboard_every=max(1, self.stop // 100))
            self.run.update(status="running")
        return None if found is None else found[1]

    def _recall(self) -> None:
        """What the record said at the step from which the run goes on."""
        for record in read_metrics(self.run.folder):
            if record["step"] == self.step:
                self.seconds = record["seconds"]
                self.last = record
                self.validation_loss = record.get("validation_loss")

    def write(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Append one step to the record."""
        assert self.log is not None
        self.seconds += seconds
        self.last = {"step": step, **self.books(step)} | {
            name: metrics[name] for name in metric_names(self.config) if name not in ("loss_tokens", "finite")
        }
        if "validation_loss" in metrics:
            self.last["validation_loss"] = self.validation_loss = metrics["validation_loss"]
        timing = {
            "seconds": self.seconds,
            "tokens_per_second": self.train_config.tokens_per_step / max(seconds, 1e-9),
        }
        self.log.write(self.last | timing)

    def books(self, step: int) -> dict[str, float]:
        """Tokens, epochs and FLOPs up to a step."""
        tokens = step * self.train_config.tokens_per_step
        per_token = lambda convention: accounting.flops_per_token(self.config, self.train_config.seq_len, convention)
        return {
            "tokens": tokens,
            "epoch": self.loader.epoch(step),
            "flops_6nd": tokens * per_token("6N"),
            "flops_exact": tokens * per_token("exact"),
        }

    def end(self, status: str, compile_seconds: float) -> None:
        """Note how it went."""
        assert self.log is not None
        self.log.flush()
        self.run.update(status=status, step=self.step, seconds=self.seconds)
        self.run.update(
            compile_seconds=self.run.record["compile_seconds"] + compile_seconds,
            result={
                "loss": self.last.get("loss"),
                "validation_loss": self.validation_loss if status == "finished" else None,
            },
        )

    def fail(self) -> None:
        """Note that an exception stopped it."""
        if not self.ended:
            with suppress(OSError):  # on a full disk the note may not fit; what went wrong is raised anyway
                self.run.update(status="failed")

    def result(self) -> Result:
        """What the caller is told."""
        record, books = self.run.record, self.books(self.run.record["step"])
        return Result(
            run=self.run.folder,
            status=record["status"],
            steps=record["step"],
            tokens=int(books["tokens"]),
            epochs=books["epoch"],
            parameters=accounting.parameters(self.config).total,
            flops_6nd=books["flops_6nd"],
            flops_exact=books["flops_exact"],
            seconds=record["seconds"],
            compile_seconds=record["compile_seconds"],
            **record["result"],
        )

    def close(self) -> None:
        """Wait for checkpoints, release the run directory."""
        try:
            self.checkpoints.close()
        finally:
            if self.log is not None:
                self.log.close()
            self.run.close()
