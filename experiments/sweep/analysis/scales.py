"""Classify the values of an axis: numbers on a linear or logarithmic scale, or names."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Scale = Literal["log", "linear", "rank"]
MANY = 12  # number of distinct values from which an axis counts as sampled from an interval


def is_number(value: Any) -> bool:
    """Return whether a value is a number and not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values without None: numbers sorted, others in order of appearance."""
    found = list(dict.fromkeys(value for value in values if value is not None))
    return sorted(found) if all(map(is_number, found)) else found


def scale_of(values: Iterable[Any]) -> Scale:
    """Return the scale of an axis: logarithmic if that spaces its values more evenly, else linear.

    "rank": names, and a few numbers that neither scale spaces well, such as 0, 0.01, 0.1.
    """
    found = distinct(values)
    if not found or not all(map(is_number, found)):
        return "rank"
    if len(found) < 3:
        return "log" if found[0] > 0 and found[-1] / found[0] >= 4 else "linear"
    linear = _unevenness(found)
    if found[0] > 0:
        return "log" if _unevenness(np.log(found)) < linear and found[-1] / found[0] > 1.5 else "linear"
    return "rank" if len(found) <= MANY and linear > 0.7 else "linear"


def _unevenness(values: Sequence[float] | np.ndarray) -> float:
    gaps = np.diff(np.asarray(values, float))
    return float(gaps.std() / gaps.mean())


def positions(values: Sequence[Any], among: Sequence[Any]) -> np.ndarray:
    """Return positions on the axis with the values `among`: log10, the number or the rank, by its scale.

    A missing value is NaN.
    """
    scale, listed = scale_of(among), distinct(among)
    if scale == "rank":
        return np.array([np.nan if value is None else listed.index(value) for value in values], float)
    numbers = np.array([np.nan if value is None else value for value in values], float)
    return np.log10(numbers) if scale == "log" else numbers


def edge_of(values: Sequence[Any], value: Any) -> Literal["lowest", "highest"] | None:
    """Return whether a value is at the end of an axis of numbers, so that a better one may be beyond it.

    Of two values one is always at an end, and names have none. Zero is a bound, not an end, if no value is below it. Of
    many values sampled from an interval, those in its outer 5 % count as its end.
    """
    found = distinct(values)
    if value is None or len(found) < 3 or not all(map(is_number, found)) or value == found[0] == 0:
        return None
    if len(found) > MANY:
        low, high, place = positions([found[0], found[-1], value], found)
        share = (place - low) / (high - low)
        return "lowest" if share <= 0.05 else "highest" if share >= 0.95 else None
    return "lowest" if value == found[0] else "highest" if value == found[-1] else None


def text(value: Any) -> str:
    """Return a value as its author would type it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_text(setting: Mapping[str, Any]) -> str:
    """Return a setting in a line: learning_rate=0.004, num_layers=2."""
    return ", ".join(f"{name}={text(value)}" for name, value in setting.items() if value is not None)
