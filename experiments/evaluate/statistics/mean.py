"""Estimate the mean score of a set of questions, with an error that allows for clusters of questions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from train.clusters import standard_error

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over questions, its standard error and its 95 % interval; None where one question or cluster is alone."""

    value: float
    standard_error: float | None
    freedom: float | None
    """Degrees of freedom of the standard error."""
    low: float | None
    high: float | None
    questions: int
    clusters: int | None
    """None: the questions count as independent."""


def linearised(
    values: Float[np.ndarray, " questions"], weights: Float[np.ndarray, " questions"] | None
) -> Float[np.ndarray, " questions"]:
    """Return values whose plain mean is the weighted mean Σwv/Σw, and whose standard error is that of the ratio.

    The error is of first order (the delta method). Bits per byte of a text are such a mean over its documents, weighted
    by their bytes.
    """
    if weights is None:
        return values
    mean = (weights * values).sum() / weights.sum()
    return mean + weights * (values - mean) / weights.mean()


def estimate_mean(
    values: Float[np.ndarray, " questions"], clusters: Int[np.ndarray, " questions"] | None = None
) -> Mean:
    """Return the mean with its 95 % interval.

    Scores of 0 and 1 get Wilson's interval, for clusters with the effective number of questions; others Student's t.
    """
    count = len(values)
    number = None if clusters is None else len(np.unique(clusters))
    value = float(values.mean())
    error, freedom = standard_error(values, clusters)
    if not freedom:
        return Mean(value, None, None, None, None, count, number)
    if is_binary(values):
        plain = float(np.sqrt(value * (1 - value) / count))
        effect = 1.0 if clusters is None or plain == 0 or error == 0 else float(error / plain) ** 2
        quantile = None if clusters is None else float(stats.t.ppf((1 + LEVEL) / 2, freedom))
        low, high = wilson(value * count / effect, count / effect, quantile)
        return Mean(value, float(error), freedom, float(low), float(high), count, number)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * error)
    return Mean(value, float(error), freedom, value - half, value + half, count, number)


def is_binary(values: Float[np.ndarray, "*batch"]) -> bool:
    """Return whether all scores are 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def wilson(
    successes: float | Float[np.ndarray, " bins"], total: float | Float[np.ndarray, " bins"], z: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) of Wilson's score interval of a share (1927); z: by default the quantile for 95 %.

    The counts may be fractions, as an effective number of questions is.
    """
    z = float(stats.norm.ppf((1 + LEVEL) / 2)) if z is None else z
    total = np.asarray(total, float)
    share = successes / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return np.asarray(np.clip(middle - half, 0.0, 1.0)), np.asarray(np.clip(middle + half, 0.0, 1.0))
