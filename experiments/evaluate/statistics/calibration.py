"""Measure calibration: whether a model that says 70 % is right in 70 % of such cases."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.evaluate.statistics.mean import wilson

BINS = 10
FEWEST = 20
"""Questions in a bin, at least; with fewer, there are fewer bins."""


@dataclass(frozen=True)
class ReliabilityBin:
    """Questions of similar confidence."""

    confidence: float
    """The mean probability of the predicted choice."""
    accuracy: float
    low: float
    """Lower end of Wilson's 95 % interval of the accuracy."""
    high: float
    questions: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of a model's predictions on a task of choices."""

    questions: int
    ece: float
    """Expected calibration error: mean |accuracy − confidence| over bins, weighted by their questions."""
    ece_if_calibrated: float
    """The 95 % quantile of the ECE of a perfectly calibrated model with these confidences: the noise floor."""
    brier: float
    """Multi-class Brier score."""
    brier_predicted: float
    """Brier score of the predicted choice alone."""
    confidence: float
    accuracy: float
    bins: tuple[ReliabilityBin, ...]


def choice_probabilities(logprobs: Sequence[float] | np.ndarray) -> Float[np.ndarray, " choices"]:
    """Return the softmax of the choices' log-probabilities: the model's belief if one of them must be right."""
    values = np.asarray(logprobs, float)
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def calibrate(
    probabilities: Sequence[Float[np.ndarray, " _"]], gold: Sequence[Sequence[int]], bins: int = BINS
) -> Calibration:
    """Return ECE, Brier scores and reliability curve of predictions over choices.

    probabilities: one row per question, each adding up to 1; rows may have different numbers of choices. gold: the
    correct choices of each question; several count as one class. bins: fewer where questions are few.
    """
    predicted = [int(row.argmax()) for row in probabilities]
    confidence = np.array([row[choice] for row, choice in zip(probabilities, predicted, strict=True)])
    correct = np.array([choice in right for choice, right in zip(predicted, gold, strict=True)])
    bins = max(1, min(bins, len(correct) // FEWEST))
    return Calibration(
        questions=len(correct),
        ece=float(expected_calibration_error(confidence, correct, bins)),
        ece_if_calibrated=noise_floor(confidence, bins),
        brier=brier(probabilities, gold),
        brier_predicted=float(((confidence - correct) ** 2).mean()),
        confidence=float(confidence.mean()),
        accuracy=float(correct.mean()),
        bins=tuple(reliability(confidence, correct, bins)),
    )


def brier(probabilities: Sequence[Float[np.ndarray, " _"]], gold: Sequence[Sequence[int]]) -> float:
    """Return the multi-class Brier score, from 0 (certain and right) to 2 (certain and wrong).

    It is Brier's own sum over choices (1950), which scikit-learn's brier_score_loss gives for more than two classes and
    with scale_by_half=False; for two choices scikit-learn's default is half of it.
    """
    total = 0.0
    for row, right in zip(probabilities, gold, strict=True):
        correct = row[list(right)]
        total += (1 - correct.sum()) ** 2 + (row**2).sum() - (correct**2).sum()
    return float(total / len(gold))


def expected_calibration_error(
    confidence: Float[np.ndarray, " questions"], correct: Bool[np.ndarray, "*batch questions"], bins: int = BINS
) -> Float[np.ndarray, "*batch"]:
    """Return the ECE over bins of equal mass: each has about the same number of questions."""
    order = np.argsort(confidence, kind="stable")
    _, starts = np.unique(_bin_of(confidence, bins)[order], return_index=True)
    gaps = np.add.reduceat(correct[..., order] - confidence[order], starts, axis=-1)
    return np.asarray(np.abs(gaps).sum(-1) / len(confidence))


def noise_floor(
    confidence: Float[np.ndarray, " questions"], bins: int = BINS, draws: int = 1000, seed: int = 0
) -> float:
    """Return the 95 % quantile of the ECE if every prediction is right with exactly its confidence.

    It is simulated (consistency resampling, Bröcker & Smith 2007). An ECE below it cannot be distinguished from perfect
    calibration.
    """
    random = np.random.default_rng(seed)
    found = [
        expected_calibration_error(confidence, random.random((part, len(confidence))) < confidence, bins)
        for part in [100] * (draws // 100)  # in parts, for the memory
    ]
    return float(np.quantile(np.concatenate(found), 0.95))


def reliability(
    confidence: Float[np.ndarray, " questions"], correct: Bool[np.ndarray, " questions"], bins: int = BINS
) -> list[ReliabilityBin]:
    """Return the reliability curve over bins of equal mass, with Wilson intervals; empty bins are left out.

    The bins are those of scikit-learn's calibration_curve(strategy="quantile").
    """
    index = _bin_of(confidence, bins)
    found = []
    for number in np.unique(index):
        inside = index == number
        count, right = int(inside.sum()), int(correct[inside].sum())
        low, high = wilson(float(right), float(count))
        found.append(ReliabilityBin(float(confidence[inside].mean()), right / count, float(low), float(high), count))
    return found


def _bin_of(confidence: Float[np.ndarray, " questions"], bins: int) -> Int[np.ndarray, " questions"]:
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1))
    return np.searchsorted(edges[1:-1], confidence)
