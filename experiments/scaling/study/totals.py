"""The parts of a study's plan: the runs with what they need, their static shapes, and the totals."""

import dataclasses
from typing import Any

from experiments.scaling.study.rungs import Rung


@dataclasses.dataclass(frozen=True)
class ExpectedOptimum:
    """The compute-optimal run that is expected at a budget."""

    flops: float
    params: float
    tokens: float


@dataclasses.dataclass(frozen=True)
class ShapePlan:
    """The memory and storage that the runs of one static shape need."""

    names: list[str]
    d_model: int
    batch_size: int
    lanes: int
    state_bytes: int
    """Bytes of the parameters and moments of one run."""
    checkpoint_bytes: int
    """Bytes of the checkpoints at the end of every run, and of base runs where branches leave them."""
    memory_bytes: int | None
    """Bytes of memory on this machine; None for other hardware."""


@dataclasses.dataclass(frozen=True)
class TrainingTotal:
    """Sums over what is trained: the part that runs share with their base run counts once."""

    runs: int
    tokens: int
    flops_6nd: float
    flops_exact: float
    hours: float | None
    """Hours with validation and compilation; None, like compile_hours, without a probe."""
    compile_hours: float | None


@dataclasses.dataclass(frozen=True)
class PlannedRung:
    """A run of the ladder, with what it needs."""

    rung: Rung
    hours: float | None
    """None without a probe."""
    memory_bytes: int | None
    state_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        needs = {"hours": self.hours, "memory_bytes": self.memory_bytes, "state_bytes": self.state_bytes}
        return self.rung.to_dict() | needs


@dataclasses.dataclass(frozen=True)
class StudyTotal(TrainingTotal):
    """The sums over a study's runs and shapes; of the memory, the most."""

    compiles: int
    repeated: int
    """Runs that see some tokens more than once."""
    checkpoint_bytes: int
    memory_bytes: int | None
    """Bytes of memory on this machine; None for other hardware."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """The share that branches save."""

    flops_6nd: float
    flops_6nd_fitted: float
    """The share saved of the runs that are not held out."""
    hours: float | None


@dataclasses.dataclass(frozen=True)
class WithoutBranches(TrainingTotal):
    """The same runs, each from its start."""

    saved: Saved
