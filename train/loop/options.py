"""Set the options of a run: validation, checkpoints, memory and reports."""

import dataclasses
from typing import TYPE_CHECKING

from model.errors import InputError, check_whole
from model.execution import refuse_moved
from train.run.best import metric_of
from train.task_sets import TaskSet, higher_is_better, is_task_metric

if TYPE_CHECKING:
    from train.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run besides training itself; none of them changes a loss, except by rounding.

    evaluate_every: steps between validations; 0: only at the end. evaluate_tokens: of the validation split, the same
    ones each time. tasks: choice tasks that every validation also scores. checkpoint_every: steps; 0: by time alone.
    These checkpoints are kept: the newest `keep_checkpoints`, those of every `keep_every`-th step and of `keep_steps`
    (which are also saved then), and with keep_best the one of the best validation (saved at each improvement).
    keep_best: the name of a validation metric in metrics.jsonl; True: validation_loss. patience: the run ends once that
    metric (validation_loss if keep_best is False) has not improved in this many consecutive validations; 0: never.
    checkpoint_start: save a fresh run before its first step, so that one that diverges early still has parameters to
    look at. microbatch: rows per microbatch, instead of the execution's `accumulate`; "auto": as many as the device's
    memory holds. memory: bytes per device to plan for; None: what the device has. announce: print the memory that the
    program needs in one line, before the first step. wandb: a Weights & Biases project. profile: write a trace of a few
    steps into the run's folder. compact: whether lanes move to a program of half as many lanes once that holds all
    members still training; None: only if lanes run vmapped, as a sequential lane that has ended costs nothing.
    """

    evaluate_every: int = 0
    evaluate_tokens: int = 65_536
    tasks: tuple[TaskSet, ...] = ()
    checkpoint_every: int = 0
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 2
    keep_every: int = 0
    keep_best: bool | str = False
    keep_steps: tuple[int, ...] = ()
    patience: int = 0
    checkpoint_start: bool = True
    microbatch: int | str | None = None
    memory: int | None = None
    announce: bool = False
    wandb: str | None = None
    profile: bool = False
    compact: bool | None = None
    description: str = "training"

    @property
    def metric(self) -> str:
        """Return the validation metric that `keep_best` and `patience` use."""
        return metric_of(self.keep_best)

    @property
    def task_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of the tasks in a run's record."""
        return tuple(name for one in self.tasks for name in one.metrics)

    def rises(self, objective: "Objective") -> bool:
        """Return whether a higher value of `metric` is better."""
        return higher_is_better(self.metric) if is_task_metric(self.metric) else objective.rises(self.metric)

    def check_metric(self, measured: tuple[str, ...]) -> None:
        """Raise InputError if a run that measures these validation metrics cannot do what is requested."""
        measured = (*measured, *self.task_metrics)
        if self.metric not in measured:
            raise InputError(
                f"keep_best={self.keep_best!r} is not measured by this run, which measures {', '.join(measured)}"
            )
        check_whole("patience", self.patience, hint="0 never stops early")
        if self.patience and self.evaluate_every < 1:
            raise InputError(
                f"patience={self.patience} counts validations, and without evaluate_every there is one at the end "
                "only; set evaluate_every to the steps between validations"
            )

    def plans_checkpoint(self, step: int) -> bool:
        """Return whether the step is saved independently of the run's timing."""
        by_step = any(every > 0 and step % every == 0 for every in (self.checkpoint_every, self.keep_every))
        return by_step or step in self.keep_steps


refuse_moved(RunOptions, "mesh")

Shell = RunOptions  # the former name, which callers of `train` use
