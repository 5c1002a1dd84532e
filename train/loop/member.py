"""Manage one member of a population on the host: its run directory, record, data and checkpoints."""

import collections
import dataclasses
import logging
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import Execution, accounting
from train.data.folders import Data
from train.files import write_json
from train.hosts import agree, is_writer
from train.loop.options import RunOptions
from train.objectives.objective import BatchSpec
from train.plan import Plan, Stage
from train.progress import say
from train.recipe import Branch, Recipe, Weights
from train.run import Result, Run
from train.run.best import Best
from train.run.checkpoint import Checkpoints
from train.run.metrics import Metrics, MetricsLog, open_metrics, troubles
from train.start import check_branch, folder_of
from train.step import metric_names
from train.task_sets import TaskResult, answers_path

logger = logging.getLogger("isoflop")


class Member:
    """Host side of one lane: its run directory, its data order, the step it is at."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: Data,
        options: RunOptions,
        execution: Execution = Execution(),
    ):
        recipe = recipe.with_horizon()
        self.stop = recipe.horizon
        self.plan = Plan.of(recipe.train, self.stop)
        train_config, hparams = recipe.train, recipe.hparams
        self.recipe, self.config, self.train_config, self.hparams = recipe, recipe.model, train_config, hparams
        self.objective = recipe.objective
        self.loader = self.objective.source(recipe.model, train_config, hparams, data.sources, self.plan)
        first = next(iter(data.sources.values())).manifest.splits
        self.bytes_per_token = {name: split.bytes_per_token for name, split in first.items()}
        if isinstance(recipe.start, Branch) and not folder.exists():
            check_branch(recipe.start)
        self.run = Run(folder, recipe, execution)
        if self.run.record.get("data") != data.place:
            self.run.update(data=data.place, data_beside=data.beside(folder))
        if isinstance(recipe.start, Weights) and recipe.start.path is not None:
            place = str(recipe.start.path)
            if self.run.record.get("weights") != place:
                self.run.update(weights=place, weights_beside=os.path.relpath(place, folder.resolve()))
        self.checkpoints = Checkpoints(
            folder,
            keep=options.keep_checkpoints,
            keep_every=options.keep_every,
            keep_best=options.keep_best,
            higher_is_better=options.rises(self.objective),
            keep_steps=options.keep_steps,
        )
        self.options = options
        self.log: MetricsLog | None = None
        # Training continues here, unless `resume` finds this checkpoint damaged.
        self.step = self.run.record["step"] if self.ended else max(agree(self.checkpoints.steps), default=0)
        if self.ended and is_writer():
            for trouble in troubles([folder]):
                logger.warning("%s", trouble)
        self.seconds: float = self.run.record["seconds"]
        self.last: dict[str, Any] = {}
        self.validation_loss: float | None = None
        self.best = Best(options.metric, options.rises(self.objective))
        self.generation = 0  # the number of rollbacks: steps dispatched in an earlier generation are not recorded
        self._losses: collections.deque[float] = collections.deque(maxlen=train_config.spike_window)

    @property
    def ended(self) -> bool:
        """Return whether nothing is left to train."""
        record = self.run.record
        if record["status"] != "finished":
            return record["status"] == "diverged"
        return record["step"] >= self.stop or self._stays_stopped(record.get("stopped_early"))

    def _stays_stopped(self, early: dict[str, Any] | None) -> bool:
        """Return whether a run that stopped early would do so again: same metric, and no more patience than then."""
        metric, patience = self.options.metric, self.options.patience
        return early is not None and early["metric"] == metric and 0 < patience <= early["patience"]

    @property
    def done(self) -> bool:
        """Return whether it is at its last step: the horizon, or the step whose validation used up the patience."""
        return self.step >= self.stop or self._out_of_patience

    @property
    def _out_of_patience(self) -> bool:
        return 0 < self.options.patience <= self.best.without and self.best.validated == self.step

    @property
    def improved(self) -> bool:
        """Return whether it is at the step of its best validation, whose checkpoint is kept."""
        return bool(self.options.keep_best) and 0 < self.best.step == self.step

    @property
    def active(self) -> bool:
        """Return whether it has steps left."""
        return not self.ended and self.step < self.stop

    @property
    def stage(self) -> Stage:
        """Return the stage of its next step."""
        return self.plan.stage(min(self.step, self.plan.total_steps - 1))

    def batch_spec(self, stage: Stage) -> BatchSpec:
        """Return the shapes of its batches in a stage."""
        return self.objective.batch_spec(self.config, self.train_config, stage.batch_size, stage.seq_len)

    def batch(self, step: int, rows: slice) -> Any:
        """Return these rows of the batch of update number `step`, after the rows that rollbacks skipped."""
        skipped = [back["skipped_rows"] for back in self.rollbacks if back["to"] <= step]
        return self.loader.batch(step, rows, skipped_rows=skipped[-1] if skipped else 0)

    @property
    def rollbacks(self) -> list[dict[str, Any]]:
        """Return one entry per rollback: from step `at` to step `to`, the loss, and all rows of data skipped so far."""
        return self.run.record["rollbacks"]

    def resume(self, like: Any) -> Any | None:
        """Return the newest intact state, or None for a fresh start, and truncate the record to its step."""
        if self.rollbacks and not self.rollbacks[-1]["done"]:
            self._finish_rollback()
        found = self.checkpoints.restore_newest(like)
        if found is None and isinstance(self.recipe.start, Branch):
            base = Checkpoints(folder_of(self.recipe.start), read_only=True)
            found = self.recipe.start.step, base.restore(self.recipe.start.step, like)
        if not self.ended:
            self.step = 0 if found is None else found[0]
            if self.options.announce and is_writer() and self.run.record["status"] != "planned":
                where = f"going on from step {self.step:,}" if found else "no checkpoint yet: starting from step 0"
                say(f"{self.run.folder}: {where}")
            self._open_log()
            if (change := self.run.begin(self.step)) and is_writer():
                say(f"{self.run.folder}: from step {self.step:,} on with {change}")
        return None if found is None else found[1]

    def _open_log(self) -> None:
        """Read the record up to the current step, and open the log to append to it."""
        if self.log is not None:
            self.log.close()
        begin = Metrics(*agree(self._record_up_to_here))
        if begin.trouble and is_writer():
            logger.warning("%s; training continues from step %d", begin.trouble, self.step)
        if begin.lines and begin.lines[-1]["step"] == self.step:
            self.last = begin.lines[-1]
            self.seconds = self.last.get("seconds", self.seconds)
            known = [record["validation_loss"] for record in begin.lines if "validation_loss" in record]
            self.validation_loss = known[-1] if known else None
        # Counted from the record, so that a restart changes no count.
        rises = self.options.rises(self.objective)
        self.best = Best.of(self.options.metric, begin.lines, higher_is_better=rises)
        self._losses.clear()
        self._losses.extend(record["loss"] for record in begin.lines if record["loss"] is not None)
        self.run.update(metrics=begin.seal)  # before the file is truncated, so that a kill in between is safe
        self.log = MetricsLog(
            self.run.folder, begin, tensorboard_every=max(1, self.stop // 100), wandb=self.options.wandb
        )

    def _record_up_to_here(self) -> tuple[Any, ...]:
        return dataclasses.astuple(open_metrics(self.run.folder, self.step).up_to(self.step))

    def sync(self) -> None:
        """Sync the record to the disk, before a checkpoint that relies on it."""
        if self.log is not None:
            self.run.update(metrics=self.log.sync())

    def write(
        self, step: int, metrics: dict[str, float], timing: dict[str, float], tasks: Sequence[TaskResult] = ()
    ) -> None:
        """Append one step to the record.

        timing: the `seconds` of this step, and other timings. tasks: results, if it was validated; their answers
        replace those of the last validation.
        """
        assert self.log is not None
        self.seconds += timing["seconds"]
        names = metric_names(self.config, self.train_config, self.objective)
        known = {name: _finite(metrics[name]) for name in names}
        for name in (self.objective.WEIGHT, "finite", "skipped_in_a_row"):
            del known[name]
        known["skipped"] = int(metrics["skipped"])
        known |= self._bits(known["loss"], "train", "")
        if "validation_loss" in metrics:
            known |= {f"validation_{name}": _finite(metrics[f"validation_{name}"]) for name in self.objective.EVALUATED}
            self.validation_loss = known["validation_loss"]
            known |= self._bits(self.validation_loss, "validation", "validation_")
            for task in tasks:
                known |= {name: _finite(value) for name, value in task.metrics.items()}
        rolled_back = sum(back["to"] < step for back in self.rollbacks)
        rollbacks = {"rollbacks": rolled_back} if rolled_back else {}
        self.last = {"step": step, **self.totals(step)} | known | rollbacks
        if len(self.loader.sources) > 1:
            self.last |= {f"tokens/{name}": drawn for name, drawn in self.loader.sources_drawn(step).items()}
        stage = self.plan.stage(step - 1)
        if self.train_config.phases:
            self.last |= {"phase": stage.phase, "batch_size": stage.batch_size, "seq_len": stage.seq_len}
        self.best = self.best.after(self.last)
        for task in tasks if is_writer() else ():
            document = {"schema_version": 1, "step": step} | task.to_dict()
            write_json(answers_path(self.run.folder, task.task_set.name), document)
        self.log.write(self.last | timing | {"seconds": self.seconds})
        if known["loss"] is not None:
            self._losses.append(known["loss"])

    def _bits(self, nats: float | None, split: str, prefix: str) -> dict[str, float | None]:
        """Return perplexity and bits per byte (of the split's mean token); {} unless the loss is a likelihood."""
        if not self.objective.LIKELIHOOD:
            return {}
        if nats is None:
            return {f"{prefix}perplexity": None, f"{prefix}bits_per_byte": None}
        bits = nats / math.log(2) / self.bytes_per_token[split]
        return {f"{prefix}perplexity": math.exp(min(nats, 700)), f"{prefix}bits_per_byte": bits}

    def totals(self, step: int) -> dict[str, float]:
        """Return tokens, epochs and FLOPs up to a step."""
        flops_6nd = flops_exact = 0.0
        for stage in self.plan.stages:
            # A stage of the steps 100–149 has 0 steps done at step 80, 20 at step 120 and 50 at step 200.
            steps_done = min(max(step - stage.first_step, 0), stage.steps)
            tokens = steps_done * stage.tokens_per_step
            flops_6nd += tokens * self.objective.flops_per_token(self.config, stage.seq_len, "6N")
            flops_exact += tokens * self.objective.flops_per_token(self.config, stage.seq_len, "exact")
        return {
            "tokens": self.plan.tokens(step),
            "epoch": self.loader.epoch(step),
            "flops_6nd": flops_6nd,
            "flops_exact": flops_exact,
        }

    def flops_of_step(self, step: int) -> float:
        """Return the exact FLOPs of one update; step: its number, from 1."""
        stage = self.plan.stage(step - 1)
        return stage.tokens_per_step * self.objective.flops_per_token(self.config, stage.seq_len, "exact")

    def is_spike(self, loss: float) -> bool:
        """Return whether a loss is a spike: `spike_sigma` standard deviations above the mean of those before it."""
        sigma, window = self.train_config.spike_sigma, self.train_config.spike_window
        if sigma <= 0 or len(self._losses) < window or not math.isfinite(loss):
            return False
        return loss > statistics.fmean(self._losses) + sigma * statistics.pstdev(self._losses)

    def roll_back(self, step: int, loss: float) -> bool:
        """Go back to the newest checkpoint before the step whose loss spiked, and skip the data since then.

        Return False, and change nothing, if there is no such checkpoint or no rollback is left. Checkpoints of planned
        steps are preferred: the others depend on time and interruptions, which differ from one execution to the next.
        The rollback is recorded in `run.json` before anything is removed, so that a kill in between loses nothing.
        """
        earlier = [saved for saved in agree(self.checkpoints.steps) if saved < step]
        earlier = [saved for saved in earlier if self.options.plans_checkpoint(saved)] or earlier
        if not earlier or len(self.rollbacks) >= self.train_config.max_rollbacks:
            return False
        to = earlier[-1]
        # A spike at step 12 and a checkpoint of step 10: the batches of the updates number 10 and 11 are skipped.
        rows = sum(self.plan.stage(index).batch_size for index in range(to, step))
        skipped_before = self.rollbacks[-1]["skipped_rows"] if self.rollbacks else 0
        back = {"at": step, "to": to, "loss": loss, "skipped_rows": skipped_before + rows, "done": False}
        self.run.update(rollbacks=[*self.rollbacks, back])
        self._finish_rollback()
        self.step = to
        self.generation += 1
        self._open_log()
        self.run.begin(to)  # the present execution, which began later, now holds from here on
        return True

    def _finish_rollback(self) -> None:
        *before, back = self.rollbacks
        self.checkpoints.discard_after(back["to"])
        self.run.update(rollbacks=[*before, back | {"done": True}])

    def end(self, status: str, compile_seconds: float) -> None:
        """Record how the run ended."""
        assert self.log is not None
        early: dict[str, Any] = {}
        if status == "finished" and self.step < self.stop:
            best, patience = self.best, self.options.patience
            noted = {"metric": best.metric, "best_step": best.step, "best": best.value, "patience": patience}
            early = {"stopped_early": noted}
        self.run.update(
            metrics=self.log.sync(),
            status=status,
            step=self.step,
            seconds=self.seconds,
            compile_seconds=self.run.record["compile_seconds"] + compile_seconds,
            result={
                "loss": self.last.get("loss"),
                "validation_loss": self.validation_loss if status == "finished" else None,
                "skipped": self.last.get("skipped", 0),
            },
            **early,
        )

    def fail(self) -> None:
        """Record that an exception stopped the run."""
        if not self.ended:
            self.run.fail()

    def result(self) -> Result:
        """Return the result that the caller gets."""
        record, totals = self.run.record, self.totals(self.run.record["step"])
        return Result(
            run=self.run.folder,
            status=record["status"],
            steps=record["step"],
            tokens=int(totals["tokens"]),
            epochs=totals["epoch"],
            parameters=accounting.parameters(self.config).total,
            flops_6nd=totals["flops_6nd"],
            flops_exact=totals["flops_exact"],
            seconds=record["seconds"],
            compile_seconds=record["compile_seconds"],
            rollbacks=len(self.rollbacks),
            branch_step=self.recipe.start.step if isinstance(self.recipe.start, Branch) else 0,
            stopped_early=record.get("stopped_early"),
            **record["result"],
        )

    def close(self) -> None:
        """Wait for checkpoints, then release the run directory."""
        try:
            self.checkpoints.close()
        finally:
            if self.log is not None:
                self.log.close()
            self.run.close()


def _finite(value: float) -> float | None:
    """Return the value, or None if it is not finite: JSON has no NaN."""
    return value if math.isfinite(value) else None
