"""Laws for the best learning rate and the best batch size: log y* = c + p·log N (+ q·log D).

Best values found by a sweep at several sizes follow power laws (Bi et al. 2024, DeepSeek LLM, section 3.1, in compute;
Li et al. 2025, Step Law, in N and D). Weighted least squares in logarithms, as each optimum comes with its own
interval; intervals by a parametric bootstrap, since four to eight sizes are too few to draw with replacement: draws
take the scatter about the law, itself uncertain as a χ² with the rows less the unknowns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.intervals import Intervals, intervals_of, percentile_interval
from model.errors import InputError

MINIMUM_SIZES = 3
Z95 = 1.959964  # half of a 95 % interval in standard deviations


@dataclass(frozen=True)
class RateFit:
    """log y* = c + p·ln(N/N₀) (+ q·ln(D/D₀)), N₀ and D₀ the geometric means of the rows."""

    value: float
    """y* at N₀ (and D₀)."""
    exponents: dict[str, float]
    """"params" (p) and, if fitted, "tokens" (q)."""
    scatter: float
    """Standard deviation of ln y* about the law, of a row of the mean weight."""
    rows: list[int]
    """The rows that entered, from 1."""
    dropped: list[dict[str, Any]]
    bootstraps: int
    seed: int
    _design: Float[np.ndarray, "rows unknowns"] = field(repr=False)
    _centre: Float[np.ndarray, " features"] = field(repr=False)
    _weights: Float[np.ndarray, " rows"] = field(repr=False)

    @cached_property
    def draws(self) -> Float[np.ndarray, "draws unknowns"]:
        """(ln value, exponents …) of the bootstrap."""
        return self._coefficients + self._noise[0] * self._noise[1][:, None]

    @property
    def _coefficients(self) -> np.ndarray:
        return np.array([np.log(self.value), *self.exponents.values()])

    @cached_property
    def _noise(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each draw: the coefficients' error at unit scatter, and the scatter."""
        rng = np.random.default_rng(self.seed)
        rows, unknowns = self._design.shape
        root = np.sqrt(self._weights)[:, None]
        errors = rng.normal(size=(self.bootstraps, rows)) @ np.linalg.pinv(self._design * root).T
        return errors, self.scatter * np.sqrt((rows - unknowns) / rng.chisquare(rows - unknowns, self.bootstraps))

    @cached_property
    def intervals(self) -> Intervals:
        """`intervals["params"][95] -> (low, high)` for the exponents and `value`."""
        named = {"value": np.exp(self.draws[:, 0])}
        named |= {name: self.draws[:, i] for i, name in enumerate(self.exponents, start=1)}
        return intervals_of(named)

    def predict(self, params: float, tokens: float | None = None) -> float:
        """y* at N parameters (and D tokens, where the law has them)."""
        return float(np.exp(self._at(params, tokens) @ self._coefficients))

    def predict_interval(
        self, params: float, tokens: float | None = None, level: int | float = 95
    ) -> tuple[float, float]:
        """Where the best value of a new size should be found: the law's uncertainty and the scatter of one optimum."""
        rng = np.random.default_rng(self.seed + 1)
        spread = self._noise[1] * rng.normal(size=self.bootstraps)
        low, high = percentile_interval(np.exp(self.draws @ self._at(params, tokens) + spread), level)
        return float(low), float(high)

    def _at(self, params: float, tokens: float | None) -> np.ndarray:
        if ("tokens" in self.exponents) != (tokens is not None):
            needs = "params and tokens" if "tokens" in self.exponents else "params only"
            raise InputError(f"this law predicts from {needs}")
        logs = np.log([params] if tokens is None else [params, tokens])
        return np.append(1.0, logs - self._centre)

    def document(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        centre = dict(zip(self.exponents, np.exp(self._centre).tolist(), strict=True))
        intervals = {
            name: {f"{level:g}": list(pair) for level, pair in by.items()} for name, by in self.intervals.items()
        }
        return {
            "law": "value · product over names of (x / centre)^exponent",
            "value": self.value,
            "centre": centre,
            "exponents": self.exponents,
            "scatter": self.scatter,
            "rows": self.rows,
            "dropped": self.dropped,
            "bootstraps": self.bootstraps,
            "seed": self.seed,
            "intervals": intervals,
        }


def fit_rate(
    params: Any,
    best: Any,
    *,
    tokens: Any = None,
    intervals: Sequence[tuple[float, float]] | None = None,
    at_edge: Sequence[bool] | None = None,
    bootstraps: int = 2000,
    seed: int = 0,
) -> RateFit:
    """Fit the best learning rates or batch sizes `best`, one per row, at N = `params` (and D = `tokens`).

    `intervals` are 95 % intervals of the optima; a row counts by the inverse square of its interval's width in
    logarithms. Rows whose optimum lies at an edge of the values tried (`at_edge`) only bound it: they are left out
    and listed, as are numbers that are not positive. Raises `InputError` for fewer than three sizes, too few rows,
    or N and D that move together.
    """
    if bootstraps < 1:
        raise InputError(f"bootstraps={bootstraps} must be at least 1")
    names = ["params"] + (["tokens"] if tokens is not None else [])
    try:
        columns = [
            np.asarray(column, np.float64) for column in (params, *([tokens] if tokens is not None else []), best)
        ]
        width = None if intervals is None else np.asarray(intervals, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"sizes, optima and intervals must be numbers: {error}") from error
    count = len(columns[0]) if columns[0].ndim == 1 else 0
    lengths = [column.shape for column in columns] + ([] if at_edge is None else [(len(at_edge),)])
    if any(shape != (count,) for shape in lengths) or (width is not None and width.shape != (count, 2)):
        raise InputError(
            "params, tokens, best, at_edge and intervals must have one entry per row (low and high in intervals)"
        )

    kept, dropped = [], []
    for i in range(count):
        if at_edge is not None and at_edge[i]:
            reason = "the optimum is at the edge of the values tried"
        elif not all(np.isfinite(column[i]) and column[i] > 0 for column in columns):
            reason = "a number is not positive and finite"
        elif width is not None and not 0 < width[i, 0] < width[i, 1] < np.inf:
            reason = f"its interval {width[i, 0]:g} to {width[i, 1]:g} is not one of positive numbers"
        else:
            kept.append(i)
            continue
        dropped.append({"row": i + 1, "reason": reason})
    logs = [np.log(column[kept]) for column in columns]
    sizes = len(np.unique(logs[0]))
    left_out = (
        f" ({len(dropped)} of {count} rows left out, the first because {dropped[0]['reason']})" if dropped else ""
    )
    if sizes < MINIMUM_SIZES:
        raise InputError(
            f"{sizes} different sizes cannot carry a power law; at least {MINIMUM_SIZES} are needed{left_out}"
        )
    if len(kept) <= len(names) + 1:
        raise InputError(f"{len(kept)} rows cannot carry {len(names) + 1} unknowns; one more is needed{left_out}")
    features = np.stack(logs[:-1], axis=1)
    centre = features.mean(0)
    spread = np.linalg.svd(features - centre, compute_uv=False)
    if spread[-1] < 0.01 * spread[0]:
        raise InputError(
            "params and tokens move together in these rows, so their exponents cannot be told apart; leave tokens out"
        )

    weights = np.ones(len(kept))
    if width is not None:
        deviation = np.diff(np.log(width[kept]), axis=1)[:, 0] / (2 * Z95)
        weights = deviation**-2 / (deviation**-2).mean()
    design = np.column_stack([np.ones(len(kept)), features - centre])
    root = np.sqrt(weights)
    coefficients = np.linalg.pinv(design * root[:, None]) @ (logs[-1] * root)
    residuals = (design @ coefficients - logs[-1]) * root
    return RateFit(
        value=float(np.exp(coefficients[0])),
        exponents=dict(zip(names, map(float, coefficients[1:]), strict=True)),
        scatter=float(np.sqrt((residuals**2).sum() / (len(kept) - design.shape[1]))),
        rows=[i + 1 for i in kept],
        dropped=dropped,
        bootstraps=bootstraps,
        seed=seed,
        _design=design,
        _centre=centre,
        _weights=weights,
    )
