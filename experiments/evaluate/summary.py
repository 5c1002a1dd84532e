"""Summarise the answers to a task: each metric's mean with its standard error and 95 % interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

_Z = 1.959964  # quantile of the normal distribution for 95 %


def summarise(kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return {metric: {"value", "standard_error", "low", "high"}} over the rows of an answers file.

    Standard errors are clustered where rows name clusters (arXiv:2411.00640). A metric that is 0 or 1 has Wilson's
    interval, for as many independent questions as have that standard error; others that of the normal distribution.
    For texts, bits per byte and perplexity are ratios of sums, and the texts are independent.
    """
    if kind == "text":
        return _of_texts(rows)
    clusters = [row["cluster"] or f"\0{number}" for number, row in enumerate(rows)]
    names = rows[0]["metrics"]
    return {name: _mean(np.array([row["metrics"][name] for row in rows], np.float64), clusters) for name in names}


def _mean(values: Float64[np.ndarray, " questions"], clusters: Sequence[str]) -> dict[str, float]:
    mean = float(values.mean())
    error = clustered_error(values - mean, clusters)
    if not np.isin(values, (0.0, 1.0)).all():
        return _normal(mean, error)
    independent = mean * (1 - mean) / error**2 if error > 0 else len(set(clusters))
    return {"value": mean, "standard_error": error} | dict(zip(("low", "high"), wilson(mean, independent), strict=True))


def clustered_error(deviations: Float64[np.ndarray, " questions"], clusters: Sequence[str]) -> float:
    """Return the standard error of a mean from deviations, whose sums over clusters are independent.

    With every question its own cluster it is the usual one: standard deviation over the root of the number. One
    cluster tells nothing about others: the error is then NaN.
    """
    _, of_row = np.unique(np.array(clusters, object).astype(str), return_inverse=True)
    sums = np.bincount(of_row, deviations)
    if len(sums) < 2:
        return math.nan
    return float(math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(deviations))


def wilson(mean: float, number: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion that was observed over this number of independent questions."""
    if math.isnan(number):
        return math.nan, math.nan
    centre = (mean + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = _Z / (1 + _Z**2 / number) * math.sqrt(mean * (1 - mean) / number + _Z**2 / (4 * number**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _normal(mean: float, error: float) -> dict[str, float]:
    return {"value": mean, "standard_error": error, "low": mean - _Z * error, "high": mean + _Z * error}


def _of_texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    nats, tokens, size = (np.array([row[name] for row in rows], np.float64) for name in ("nats", "tokens", "bytes"))
    texts = [str(number) for number in range(len(rows))]
    bits, loss = nats.sum() / size.sum() / math.log(2), nats.sum() / tokens.sum()
    bits_error = clustered_error(nats / math.log(2) - bits * size, texts) / size.mean()
    loss_error = clustered_error(nats - loss * tokens, texts) / tokens.mean()
    perplexity = {
        "value": math.exp(loss),
        "standard_error": math.exp(loss) * float(loss_error),
        "low": math.exp(loss - _Z * loss_error),
        "high": math.exp(loss + _Z * loss_error),
    }
    return {"bits_per_byte": _normal(float(bits), float(bits_error)), "perplexity": perplexity}
