"""Arithmetic at the ends of floating point, for laws that a resample left without one of their terms."""

from typing import Any

import numpy as np

LARGEST_LOG = 700.0  # e^700 is still a number


def exponential(log: Any) -> Any:
    """e^x, infinite beyond the largest number: documents show an infinite bound as null."""
    with np.errstate(over="ignore"):
        return np.exp(log)


def quantiles(draws: np.ndarray, per_cent: list[float]) -> np.ndarray:
    """Percentiles along the first axis, without the NaN draws; infinite draws count as larger or smaller than any.

    A percentile between a number and an infinite draw is infinite; one of no draws at all is NaN.
    """
    draws = np.asarray(draws, np.float64)
    empty = np.isnan(draws).all(axis=0)
    finite = np.where(empty, 0.0, np.clip(draws, -1e300, 1e300))  # a difference of infinite draws would be NaN
    found = np.nanpercentile(finite, per_cent, axis=0)
    found = np.where(np.abs(found) > 1e250, np.copysign(np.inf, found), found)
    return np.where(empty, np.nan, found)
