"""Percentile intervals of bootstrap draws, in the shape that every fit hands out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVELS = (80, 95)

Intervals = dict[str, dict[int | float, tuple[float, float]]]


def percentile_interval(draws: np.ndarray, level: int | float) -> tuple[Any, Any]:
    """The central `level` per cent of the draws (first axis); NaN marks a draw that broke and is left out."""
    tail = (100.0 - level) / 2
    low, high = np.nanpercentile(draws, [tail, 100.0 - tail], axis=0)
    return low, high


def intervals_of(draws: Mapping[str, np.ndarray], levels: Sequence[int | float] = LEVELS) -> Intervals:
    """`intervals["a"][95] -> (low, high)` from one array of draws per name; levels in per cent."""
    return {
        name: {
            level: (float(low), float(high)) for level in levels for low, high in [percentile_interval(values, level)]
        }
        for name, values in draws.items()
    }
