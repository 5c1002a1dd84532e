"""Rank tasks by their signal-to-noise ratio at one's own model sizes, and choose the tasks to decide by.

Heineman et al. 2025, "Signal and Noise" (arXiv 2508.13144).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from model.errors import InputError


@dataclass(frozen=True)
class TaskScores:
    """The scores of a set of models on one task.

    final: of each model at the end of training. repeated: of the same models at their last checkpoints or with other
    seeds. larger: of larger models of the same recipes in the same order, if there are any.
    """

    final: Float[np.ndarray, " models"]
    repeated: Float[np.ndarray, "models repeats"]
    larger: Float[np.ndarray, " models"] | None = None


@dataclass(frozen=True)
class TaskSignal:
    """Signal and noise of a task, with 95 % intervals from resampled models."""

    task: str
    signal: float
    noise: float
    ratio: float
    """Signal over noise; infinite without noise."""
    ratio_interval: tuple[float, float]
    decision_accuracy: float | None
    """Share of pairs of models that are ordered as their larger ones are; None without larger models."""
    decision_interval: tuple[float, float] | None


def relative_dispersion(final: Float[np.ndarray, "*batch models"]) -> Float[np.ndarray, "*batch"]:
    """Return the signal: the largest difference between two models, over the mean of all.

    It grows with the number of models, so compare tasks by the same ones.
    """
    return np.asarray(np.ptp(final, axis=-1) / np.abs(final.mean(-1)))


def relative_deviation(repeated: Float[np.ndarray, "*batch models repeats"]) -> Float[np.ndarray, "*batch"]:
    """Return the noise: the standard deviation of a model's last checkpoints or seeds, over the mean of all scores.

    Variances are averaged over models.
    """
    return np.asarray(np.sqrt(repeated.var(-1, ddof=1).mean(-1)) / np.abs(repeated.mean((-1, -2))))


def decision_accuracy(
    small: Float[np.ndarray, "*batch models"], large: Float[np.ndarray, "*batch models"]
) -> Float[np.ndarray, "*batch"]:
    """Return the share of pairs of models whose order by small models is that by large ones; a tie counts one half.

    Pairs that the large models do not order are left out; NaN if there is no other.
    """
    first, second = np.triu_indices(small.shape[-1], k=1)
    at_small = np.sign(small[..., first] - small[..., second])
    at_large = np.sign(large[..., first] - large[..., second])
    ordered = at_large != 0
    right = np.where(at_small == 0, 0.5, at_small == at_large) * ordered
    with np.errstate(invalid="ignore"):
        return np.asarray(right.sum(-1) / ordered.sum(-1))


def rank_tasks(tasks: Mapping[str, TaskScores], bootstraps: int = 1000, seed: int = 0) -> list[TaskSignal]:
    """Return the signal-to-noise ratio of each task with its interval, the largest ratio first.

    Intervals are percentiles over resampled models. A resample has no larger spread than the models themselves, so the
    ratio may be near the upper end of its interval. Raises `InputError` for fewer than three models or two repeats.
    """
    found = [_signal_of(name, scores, bootstraps, seed) for name, scores in tasks.items()]
    return sorted(found, key=lambda row: -row.ratio)


def choose_tasks(ranked: Sequence[TaskSignal], threshold: float, *, surely: bool = True) -> list[str]:
    """Return the tasks whose signal-to-noise ratio is at least the threshold.

    surely: the lower end of the interval must reach it, not only the estimate.
    """
    return [row.task for row in ranked if (row.ratio_interval[0] if surely else row.ratio) >= threshold]


def _signal_of(name: str, scores: TaskScores, bootstraps: int, seed: int) -> TaskSignal:
    models = len(scores.final)
    if models < 3 or scores.repeated.shape[1] < 2:
        raise InputError(
            f"{name}: {models} models with {scores.repeated.shape[1]} checkpoints or seeds each; a signal-to-noise "
            "ratio needs three models and two checkpoints or seeds"
        )
    if len(scores.repeated) != models or (scores.larger is not None and len(scores.larger) != models):
        raise InputError(f"{name}: final, repeated and larger scores must be of the same {models} models")
    drawn = np.random.default_rng(seed).integers(0, models, (bootstraps, models))
    drawn = drawn[(drawn != drawn[:, :1]).any(1)]  # one model alone has no spread
    signal, noise = relative_dispersion(scores.final), relative_deviation(scores.repeated)
    interval = _percentiles(
        _ratio(relative_dispersion(scores.final[drawn]), relative_deviation(scores.repeated[drawn]))
    )
    accuracy, accuracy_interval = None, None
    if scores.larger is not None:
        accuracy = float(decision_accuracy(scores.final, scores.larger))
        accuracy_interval = _percentiles(_resampled_accuracy(scores.final, scores.larger, drawn))
    return TaskSignal(
        name, float(signal), float(noise), float(_ratio(signal, noise)), interval, accuracy, accuracy_interval
    )


def _ratio(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(signal == 0, 0.0, np.divide(signal, noise))


def _resampled_accuracy(
    small: Float[np.ndarray, " models"],
    large: Float[np.ndarray, " models"],
    drawn: Int[np.ndarray, "bootstraps models"],
) -> Float[np.ndarray, " bootstraps"]:
    """Return the decision accuracy of each resample; a model drawn twice is no pair with itself."""
    return decision_accuracy(small[drawn], large[drawn])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    quantile = partial(np.quantile, values[~np.isnan(values)], method="inverted_cdf")
    return float(quantile(0.025)), float(quantile(0.975))
