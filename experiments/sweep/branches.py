"""Trials that go on from another trial's run: a trunk at a constant rate, left and cooled down at several lengths.

A point of a space says so by names that are no settings: `_name` of the trunk, and of its branches `_trunk`, that name,
and `_leave`, the number of updates after which they leave it.
"""

import dataclasses
from collections.abc import Sequence

from experiments.sweep.space.kinds import describe
from experiments.sweep.trial import Trial
from model.errors import InputError, UnknownNameError
from train import HParams

NAME, TRUNK, LEAVE = "_name", "_trunk", "_leave"
_OWN = ("total_steps", "decay_steps", "decay_fraction", "final_fraction")


def with_trunks(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, those whose points name a trunk as branches of its trial of the same seed.

    Raises InputError where there is no such trunk, or it is not at its peak rate where it is left.
    """
    named = {(trial.point[NAME], _seed(trial)): trial for trial in trials if NAME in trial.point}
    found = []
    for trial in trials:
        if TRUNK not in trial.point:
            found.append(trial)
            continue
        trunk = named.get((trial.point[TRUNK], _seed(trial)))
        if trunk is None:
            raise UnknownNameError("trunk", trial.point[TRUNK], sorted({name for name, _ in named}))
        step = trial.point.get(LEAVE, 0)
        try:
            _check(trunk, trial, step)
        except InputError as error:
            raise InputError(f"{describe(trial.point)}: {error}") from None
        found.append(dataclasses.replace(trial, parent=(trunk.id, step)))
    return found


def leaves(trials: Sequence[Trial], trunks: Sequence[str]) -> set[int]:
    """The updates after which branches leave these trials."""
    return {trial.parent[1] for trial in trials if trial.parent is not None and trial.parent[0] in trunks}


def _check(trunk: Trial, branch: Trial, step: int) -> None:
    if TRUNK in trunk.point:
        raise InputError(f"its trunk {trunk.point[NAME]!r} is itself a branch")
    mine, other = branch.setting, trunk.setting
    if mine.cohort != other.cohort or mine.train_config.schedule != "wsd":
        raise InputError("a branch has the model and the TrainConfig of its trunk, both with schedule=wsd")
    for name in HParams.NAMES:
        here, there = float(getattr(mine.hparams, name)), float(getattr(other.hparams, name))
        if name not in _OWN and here != there:
            raise InputError(f"{name}={here:g}, but {there:g} in its trunk, up to the step that both share")
    warmup = int(mine.hparams.warmup_steps)
    last = min(_constant_until(trial) for trial in (trunk, branch))
    if not warmup or not warmup <= step <= last:
        raise InputError(
            f"{LEAVE}={step} must lie between the end of the warm-up, warmup_steps={warmup} (more than 0), and {last}, "
            "where the first of the two begins to cool down"
        )


def _constant_until(trial: Trial) -> int:
    hparams = trial.setting.hparams
    total = int(hparams.total_steps)
    return total - (int(hparams.decay_steps) or round(float(hparams.decay_fraction) * total))


def _seed(trial: Trial) -> int:
    return int(trial.setting.hparams.seed)
