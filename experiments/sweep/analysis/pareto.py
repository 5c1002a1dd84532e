"""Find the Pareto front of several objectives, allowing for noise."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from experiments.sweep.analysis.settings import by_setting, candidates_of, group
from experiments.sweep.capacity import CAPACITY
from experiments.sweep.objectives import direction
from train.task_sets import ERROR

NOISES = 2.0  # standard errors of a difference within which two settings count as equal


@dataclass(frozen=True)
class ParetoSetting:
    """The means of every objective over the seeds of one setting."""

    setting: dict[str, Any]
    values: list[float]
    errors: list[float]
    """The larger of two standard errors: by the seeds' spread pooled over settings, zero if no setting has two seeds,
    and by the errors of the runs' own measurements (of the objective capacity), zero for the others."""
    seeds: int
    place: Literal["front", "near", "behind"]
    """near: dominated, but within the noise of the front."""


@dataclass(frozen=True)
class ParetoFront:
    """The settings that may win, by several objectives at once."""

    objectives: list[str]
    directions: list[str]
    """"minimize" or "maximize" of each objective."""
    settings: list[ParetoSetting]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def front(values: Float[np.ndarray, "settings objectives"]) -> Bool[np.ndarray, " settings"]:
    """Return which rows no other row dominates: none is at least as low in every objective and lower in one."""
    lower_or_equal = (values[:, None, :] <= values[None, :, :]).all(-1)
    lower = (values[:, None, :] < values[None, :, :]).any(-1)
    return np.logical_not((lower_or_equal & lower).any(0))


def near_front(
    values: Float[np.ndarray, "settings objectives"], errors: Float[np.ndarray, "settings objectives"]
) -> Bool[np.ndarray, " settings"]:
    """Return which dominated rows are within noise of the front: no row dominates them by more than the noise.

    errors: standard errors of the means. A row stays dominated where another one is better by more than twice the
    standard error of the difference in at least one objective, and not worse by more than that in any.
    """
    reach = NOISES * np.sqrt(errors[:, None, :] ** 2 + errors[None, :, :] ** 2)
    gain = values[None, :, :] - values[:, None, :]  # of the first over the second
    surely = (gain >= -reach).all(-1) & (gain > reach).any(-1)
    dominated_exactly = ((gain >= 0).all(-1) & (gain > 0).any(-1)) & surely
    return ~front(values) & ~dominated_exactly.any(0)


def pareto(names: Sequence[str], rows: Sequence[dict[str, Any]], objectives: Sequence[str]) -> ParetoFront | None:
    """Return the Pareto front of the settings' means over seeds; None with a single objective or no finished trial.

    Only settings that were trained to the end without a diverged run can win: `candidates_of`.
    """
    ended = [row for row in rows if row["state"] == "finished" and all(row[name] is not None for name in objectives)]
    allowed = {setting.key for setting in candidates_of(group(names, rows))}
    settings = {key: members for key, members in by_setting(names, ended).items() if key in allowed}
    if len(objectives) < 2 or not settings:
        return None
    runs = [np.array([[row[name] for name in objectives] for row in members], float) for members in settings.values()]
    means, counts = np.array([group.mean(0) for group in runs]), np.array([len(group) for group in runs])
    freedom = (counts - 1).sum()
    squares = sum(((group - group.mean(0)) ** 2).sum(0) for group in runs)
    noise = np.sqrt(squares / freedom) if freedom else np.zeros(len(objectives))
    own = np.array([_own_errors(members, objectives) for members in settings.values()])
    errors = np.maximum(noise[None, :] / np.sqrt(counts)[:, None], own)
    directions = [direction(name) for name in objectives]
    sign = np.array([1.0 if way == "minimize" else -1.0 for way in directions])
    best, near = front(means * sign), near_front(means * sign, errors)
    listed = [
        ParetoSetting(
            setting=dict(zip(names, point, strict=False)),
            values=means[i].tolist(),
            errors=errors[i].tolist(),
            seeds=int(counts[i]),
            place="front" if best[i] else "near" if near[i] else "behind",
        )
        for i, point in enumerate(settings)
    ]
    return ParetoFront(list(objectives), directions, listed)


def _own_errors(members: Sequence[dict[str, Any]], objectives: Sequence[str]) -> list[float]:
    """Return the standard error of the mean over runs, by their measurements' errors; zero without such errors."""
    squares = [sum(row[f"{name}{ERROR}"] ** 2 for row in members) if name == CAPACITY else 0.0 for name in objectives]
    return [square**0.5 / len(members) for square in squares]
