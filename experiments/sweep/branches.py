"""List trials by name, as a scaling study does, with those that branch off another run.

A branch leaves its base run at a constant rate and has a decay phase of its own (`train/branch.py`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from experiments.sweep.space.kinds import describe
from experiments.sweep.space.overlay import apply
from experiments.sweep.trial import Trial
from model.errors import InputError, UnknownNameError
from model.fields import FrozenDict
from train import HParams

_OWN = ("total_steps", "decay_steps", "decay_fraction", "final_fraction")


@dataclasses.dataclass(frozen=True)
class Listed:
    """A trial by its name. point: its fields, "seed" among them. trunk: the name of the base run that it branches off
    after leave_step updates; None: it starts fresh."""

    name: str
    point: Mapping[str, Any]
    trunk: str | None = None
    leave_step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "point", FrozenDict(self.point))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self) | {"point": dict(self.point)}

    @classmethod
    def from_former(cls, point: Mapping[str, Any]) -> Self:
        """Read a point of an older version, which stored name, base run and step as three additional fields."""
        rest = {name: value for name, value in point.items() if name not in ("_name", "_trunk", "_leave")}
        return cls(point["_name"], rest, point.get("_trunk"), point.get("_leave", 0))


def list_trials(base: Trial, listed: Iterable[Listed]) -> list[Trial]:
    """Return the trials over the base of their sweep, with their parents.

    Raises InputError if there is no such base run, or if its rate is not at the peak at the branch point.
    """
    entries = list(listed)
    made = [apply(base, entry.point).replace(name=entry.name) for entry in entries]
    named = {(trial.name, _seed(trial)): (trial, entry) for trial, entry in zip(made, entries, strict=True)}
    found = []
    for trial, entry in zip(made, entries, strict=True):
        if entry.trunk is not None:
            trunk, of_trunk = named.get((entry.trunk, _seed(trial)), (None, None))
            if trunk is None or of_trunk is None:
                raise UnknownNameError("base run", entry.trunk, sorted({str(name) for name, _ in named}))
            try:
                if of_trunk.trunk is not None:
                    raise InputError(f"its base run {trunk.name!r} is itself a branch")
                _check(trunk, trial, entry.leave_step)
            except InputError as error:
                raise InputError(f"{describe(trial.point)}: {error}") from None
            trial = trial.replace(parent=(trunk.id, entry.leave_step))
        found.append(trial)
    return found


def branch_points(trials: Sequence[Trial], trunks: Sequence[str]) -> set[int]:
    """Return the updates after which branches start from these trials."""
    return {trial.parent[1] for trial in trials if trial.parent is not None and trial.parent[0] in trunks}


def _check(trunk: Trial, branch: Trial, step: int) -> None:
    mine, other = branch.recipe, trunk.recipe
    if branch.cohort != trunk.cohort or mine.train.schedule != "wsd":
        raise InputError("a branch has the model and the TrainConfig of its base run, both with schedule=wsd")
    for name in HParams.NAMES:
        here, there = float(getattr(mine.hparams, name)), float(getattr(other.hparams, name))
        if name not in _OWN and here != there:
            raise InputError(f"{name}={here:g}, but {there:g} in its base run, up to the step that both share")
    warmup = int(mine.hparams.warmup_steps)
    last = min(_constant_until(trial) for trial in (trunk, branch))
    if not warmup or not warmup <= step <= last:
        raise InputError(
            f"leave_step={step} must be between the end of the warm-up, warmup_steps={warmup} (more than 0), and "
            f"{last}, where the first of the two begins its decay phase"
        )


def _constant_until(trial: Trial) -> int:
    hparams = trial.recipe.hparams
    total = int(hparams.total_steps)
    return total - (int(hparams.decay_steps) or round(float(hparams.decay_fraction) * total))


def _seed(trial: Trial) -> int:
    return int(trial.recipe.hparams.seed)
