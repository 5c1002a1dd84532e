"""Compute percentile intervals of bootstrap draws, infinite ones included, in the form that every fit returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

LEVELS = (80, 95)
LARGEST_LOG = 700.0  # e^700 is still a number
MINIMUM_DISTINCT = 3  # distinct values of N and of D each: two points cannot separate a power law from its floor

Intervals = dict[str, dict[int | float, tuple[float, float]]]


def exponential(log: Any) -> Any:
    """Return e^x, infinite beyond the largest number: documents show an infinite bound as null."""
    with np.errstate(over="ignore"):
        return np.exp(log)


def quantiles(draws: np.ndarray, per_cent: list[float]) -> np.ndarray:
    """Return percentiles along the first axis, without NaN draws; infinite draws count as beyond all others.

    A percentile between a number and an infinite draw is infinite; one of no draws at all is NaN.
    """
    draws = np.asarray(draws, np.float64)
    empty = np.isnan(draws).all(axis=0)
    finite = np.where(empty, 0.0, np.clip(draws, -1e300, 1e300))  # a difference of infinite draws would be NaN
    found = np.nanpercentile(finite, per_cent, axis=0)
    found = np.where(np.abs(found) > 1e250, np.copysign(np.inf, found), found)
    return np.where(empty, np.nan, found)


def percentile_interval(draws: np.ndarray, level: int | float) -> tuple[Any, Any]:
    """Return the central `level` per cent of the draws (first axis); NaN marks a failed draw and is left out."""
    tail = (100.0 - level) / 2
    low, high = quantiles(draws, [tail, 100.0 - tail])
    return low, high


def intervals_of(draws: Mapping[str, np.ndarray]) -> Intervals:
    """Return `intervals["a"][95] -> (low, high)` from one array of draws per name; LEVELS in per cent."""
    return {
        name: {
            level: (float(low), float(high)) for level in LEVELS for low, high in [percentile_interval(values, level)]
        }
        for name, values in draws.items()
    }


def own_interval_warnings(values: Mapping[str, float], intervals: Intervals) -> list[str]:
    """Return a sentence for each value outside one of its own intervals, by the highest such level."""
    found = []
    for name, value in values.items():
        outside = [
            (level, low, high) for level, (low, high) in intervals.get(name, {}).items() if value < low or value > high
        ]
        if outside:
            level, low, high = max(outside)
            found.append(
                f"{name} = {value:.4g} is outside its own {level:g} % interval, {low:.4g} … {high:.4g}: fits to "
                "resamples are on one side of it, a bias that the interval does not correct"
            )
    return found


def draw_counts(
    columns: Sequence[np.ndarray], least: int, rng: np.random.Generator, count: int
) -> Float[np.ndarray, "draws rows"]:
    """Return how often each run is drawn in `count` tables of runs drawn with replacement.

    Tables of fewer than `least` different runs, or of fewer than MINIMUM_DISTINCT values in one of the columns, do not
    determine a fit and are drawn again.
    """
    rows = len(columns[0])
    groups = [_same_value(values) for values in columns]
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < count:
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(np.float64)
        enough = (counts > 0).sum(1) >= least
        for order, first in groups:
            enough &= (np.add.reduceat(counts[:, order], first, axis=1) > 0).sum(1) >= MINIMUM_DISTINCT
        kept.append(counts[enough])
    return np.concatenate(kept)[:count]


def _same_value(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order that puts rows of one value next to each other, and where each value begins in it."""
    order = np.argsort(values, kind="stable")
    return order, np.flatnonzero(np.append(True, np.diff(values[order]) != 0))
