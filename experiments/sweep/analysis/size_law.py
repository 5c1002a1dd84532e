"""Fit how the best learning rate or batch size depends on the size of the run: log y* = c + Σ p·log size.

Best values found by a sweep at several sizes follow power laws (Bi et al. 2024, DeepSeek LLM, section 3.1, in compute;
Li et al. 2025, Step Law, in N and D). Each optimum has its own interval, so the fit is weighted least squares in
logarithms. A study accepts the law as printed: `learning_rate = {value = …, centre = {…}, exponents = {…}}`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from experiments.words import counted
from model.errors import InputError

MINIMUM_SIZES = 3  # 2 if all have intervals; without, residuals must give the noise


@dataclass(frozen=True)
class SizeLaw:
    """y* = value · product over names of (size / centre)^exponent, centres being geometric means of the rows."""

    value: float
    centre: dict[str, float]
    exponents: dict[str, float]
    scatter: float
    """Standard deviation of ln y* about the law, of a row of the mean weight."""
    freedom: float
    """Degrees of freedom of the scatter; infinite if it is given by the optima's intervals."""
    rows: list[int]
    """The rows that entered, from 1."""
    dropped: list[dict[str, Any]]
    _covariance: Float[np.ndarray, "unknowns unknowns"] = field(repr=False)
    """Of (ln value, exponents …) at unit scatter."""

    def interval(self, name: str, level: int | float = 95) -> tuple[float, float]:
        """Return the interval of one exponent; level in per cent."""
        k = list(self.exponents).index(name)
        half = self._quantile(level) * self.scatter * np.sqrt(self._covariance[k + 1, k + 1])
        return float(self.exponents[name] - half), float(self.exponents[name] + half)

    def predict(self, **sizes: float) -> float:
        """Return y* at sizes by name, all those of the law."""
        return float(np.exp(self._at(sizes) @ [np.log(self.value), *self.exponents.values()]))

    def predict_interval(self, level: int | float = 95, **sizes: float) -> tuple[float, float]:
        """Return the interval of the best value at a new size: the law's uncertainty and the scatter of one optimum."""
        at = self._at(sizes)
        half = self._quantile(level) * self.scatter * np.sqrt(1 + at @ self._covariance @ at)
        best = self.predict(**sizes)
        return float(best * np.exp(-half)), float(best * np.exp(half))

    def document(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts."""
        return {
            "value": self.value,
            "centre": self.centre,
            "exponents": self.exponents,
            "intervals_95": {name: list(self.interval(name)) for name in self.exponents},
            "scatter": self.scatter,
            "rows": self.rows,
            "dropped": self.dropped,
        }

    def _at(self, sizes: Mapping[str, float]) -> Float[np.ndarray, " unknowns"]:
        if set(sizes) != set(self.centre):
            raise InputError(f"this law predicts from {' and '.join(self.centre)}")
        return np.array([1.0, *(np.log(sizes[name] / centre) for name, centre in self.centre.items())])

    def _quantile(self, level: int | float) -> float:
        return float(stats.t.ppf(0.5 + level / 200, self.freedom))


def fit_size_law(
    sizes: Mapping[str, Any],
    best: Any,
    *,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> SizeLaw:
    """Fit the best learning rates or batch sizes `best`, one per row, to the rows' sizes by name.

    `intervals` are 95 % intervals of the optima: a row counts by the inverse square of its interval's width in
    logarithms, and they are the noise, unless the rows scatter significantly wider (χ² test at 5 %). An optimum at an
    edge of the values tried only bounds it: leave it out. Numbers that are not positive are left out and listed. Raises
    `InputError` for too few sizes or rows, or sizes that move together.
    """
    columns, width = _columns(sizes, best, intervals)
    kept, dropped = _usable(columns, width)
    logs = [np.log(column[kept]) for column in columns]
    _check(list(sizes), logs, dropped, needed=MINIMUM_SIZES if width is None else MINIMUM_SIZES - 1)
    features, y = np.stack(logs[:-1], axis=1), logs[-1]
    centre = features.mean(0)

    deviation = np.ones(len(y)) if width is None else np.diff(np.log(width[kept]), axis=1)[:, 0] / (2 * 1.96)
    weights = deviation**-2 / (deviation**-2).mean()
    design = np.column_stack([np.ones(len(y)), features - centre])
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design))
    coefficients = covariance @ design.T @ (weights * y)
    squares = float(weights @ (design @ coefficients - y) ** 2)
    scatter, freedom = _noise(squares, len(y) - design.shape[1], None if width is None else (deviation**-2).mean())
    return SizeLaw(
        value=float(np.exp(coefficients[0])),
        centre=dict(zip(sizes, np.exp(centre).tolist(), strict=True)),
        exponents=dict(zip(sizes, coefficients[1:].tolist(), strict=True)),
        scatter=scatter,
        freedom=freedom,
        rows=(np.flatnonzero(kept) + 1).tolist(),
        dropped=dropped,
        _covariance=covariance,
    )


def _noise(squares: float, left: int, precision: float | None) -> tuple[float, float]:
    """Return (scatter, its degrees of freedom); left: those of the residuals; precision: of the intervals."""
    if precision is not None and squares * precision <= (stats.chi2.ppf(0.95, left) if left else np.inf):
        return float(precision**-0.5), np.inf
    return float(np.sqrt(squares / left)), left


def _columns(
    sizes: Mapping[str, Any], best: Any, intervals: Any
) -> tuple[list[Float[np.ndarray, " rows"]], Float[np.ndarray, "rows 2"] | None]:
    """Return the sizes and then `best` as float64, and the intervals."""
    try:
        columns = [np.asarray(column, np.float64) for column in (*sizes.values(), best)]
        width = None if intervals is None else np.asarray(intervals, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"sizes, optima and intervals must be numbers: {error}") from error
    count = columns[-1].size
    if any(column.shape != (count,) for column in columns) or (width is not None and width.shape != (count, 2)):
        raise InputError("sizes, best and intervals must have one entry per row (low and high in intervals)")
    return columns, width


def _usable(
    columns: Sequence[np.ndarray], width: np.ndarray | None
) -> tuple[Bool[np.ndarray, " rows"], list[dict[str, Any]]]:
    """Return which rows are used, and why the others are not."""
    kept, dropped = np.zeros(columns[-1].size, bool), []
    for i in range(len(kept)):
        if not all(np.isfinite(column[i]) and column[i] > 0 for column in columns):
            reason = "a number is not positive and finite"
        elif width is not None and not 0 < width[i, 0] < width[i, 1] < np.inf:
            reason = f"its interval {width[i, 0]:g} to {width[i, 1]:g} is not one of positive numbers"
        else:
            kept[i] = True
            continue
        dropped.append({"row": i + 1, "reason": reason})
    return kept, dropped


def _check(names: Sequence[str], logs: Sequence[np.ndarray], dropped: Sequence[dict[str, Any]], needed: int) -> None:
    """Raise `InputError` if the rows do not determine the law."""
    rows, left_out = len(logs[0]), ""
    if dropped:
        left_out = (
            f" ({len(dropped)} of {counted(rows + len(dropped), 'row')} left out, the first: {dropped[0]['reason']})"
        )
    distinct = len(np.unique(logs[0]))
    if distinct < needed:
        less = "" if needed < MINIMUM_SIZES else f", or {needed - 1} whose optima all have an interval"
        raise InputError(
            f"{counted(distinct, 'different size')} cannot determine a power law; at least {needed} "
            f"are needed{less}{left_out}"
        )
    if rows < needed + len(names) - 1:
        unknowns = len(names) + 1
        raise InputError(f"{counted(rows, 'row')} cannot determine {unknowns} unknowns; one more is needed{left_out}")
    spread = np.linalg.svd(np.stack([log - log.mean() for log in logs[:-1]]), compute_uv=False)
    if spread[-1] < 0.01 * spread[0]:
        raise InputError(
            f"{' and '.join(names)} move together in these rows, so their exponents cannot be separated; leave one out"
        )
