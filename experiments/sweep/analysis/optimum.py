"""Find the optimal learning rate: a parabola in the logarithm of the rate, with an interval from the seed noise."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments.sweep.analysis.scales import is_number
from experiments.sweep.analysis.settings import NEAR, Setting
from experiments.sweep.analysis.size_law import SizeLaw, fit_size_law
from model.errors import InputError

NEIGHBOURS = 2  # on either side of the best
SHAPES = ("d_model", "d_ff", "num_layers", "num_heads", "batch_size", "seq_len")


@dataclass(frozen=True)
class RateOptimum:
    """The lowest point of a parabola through mean losses over the logarithm of the learning rate."""

    learning_rate: float
    loss: float
    interval_95: list[float] | None
    """The interval of the learning rate; None if the data do not bound it."""
    interval_reason: str
    """The reason why there is no interval; empty if there is one."""
    coefficients: list[float]
    """[c0, c1, c2, centre] of c0 + c1·x + c2·x² with x = ln(rate) − centre."""
    rates: list[float]
    """The learning rates in the fit."""
    rough: bool
    """True if the means scatter around the parabola by significantly more than the seed noise."""


@dataclass(frozen=True)
class RatePoint:
    """The mean loss at one learning rate."""

    learning_rate: float
    mean: float


@dataclass(frozen=True)
class SizeOptimum:
    """The optimum of the learning rate at one size."""

    size: float
    best: dict[str, Any]
    """The setting with the lowest mean at this size."""
    mean: float
    optimum: RateOptimum | None
    refused: str | None
    """The reason why there is no optimum."""
    line: list[RatePoint]
    """The settings that have all but the rate of the best."""


@dataclass(frozen=True)
class RateTransfer:
    """The optimum of the learning rate at each size, and the power law through these optima."""

    axis: str
    """The field that is the size."""
    sizes: list[SizeOptimum]
    law: SizeLaw | None
    law_refused: str | None
    factor_per_doubling: float | None
    """The optimum at the double of a size over that at the size; 1: it transfers."""
    interval_95: list[float] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "axis": self.axis,
            "sizes": [asdict(size) for size in self.sizes],
            "law": None if self.law is None else self.law.document(),
            "law_refused": self.law_refused,
            "factor_per_doubling": self.factor_per_doubling,
            "interval_95": self.interval_95,
        }


def log_parabola(
    rates: Sequence[float],
    losses: Sequence[float],
    seeds: Sequence[int],
    noise: float | None,
    freedom: int,
) -> RateOptimum | str:
    """Fit weighted least squares of mean losses against log rates; if there is no minimum inside the rates, say why.

    seeds: runs behind each mean, the weights. noise: the standard deviation of one run, known to `freedom` degrees of
    freedom; the scatter around the parabola is pooled with it, and replaces it if it is significantly larger (F test at
    5 %), since the curve then is only roughly a parabola. The interval is Fieller's (1954): the rates at which the
    slope is not significantly different from zero.
    """
    centre = math.log(rates[int(np.argmin(losses))])
    x, y, weight = np.log(rates) - centre, np.asarray(losses, float), np.asarray(seeds, float)
    if len(x) < 3:
        return "fewer than three rates near the best"
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    covariance = np.linalg.inv(design.T @ (weight[:, None] * design))
    c0, c1, c2 = covariance @ design.T @ (weight * y)
    if c2 <= 0:
        return "the losses near the best do not curve upwards"
    vertex = -c1 / (2 * c2)
    if not x.min() <= vertex <= x.max():
        return "the parabola's lowest point is outside the rates that were tried"
    left = len(x) - 3
    scatter = float(weight @ (y - design @ (c0, c1, c2)) ** 2)
    variance, known, rough = _variance(noise, freedom, scatter, left)
    low_high, reason = (None, "one seed and no rate to spare: the noise is not known")
    if variance is not None:
        low_high, reason = _fieller(c1, c2, covariance, float(stats.t.ppf(0.975, known)) ** 2 * variance)
    return RateOptimum(
        learning_rate=float(np.exp(vertex + centre)),
        loss=float(c0 - c1**2 / (4 * c2)),
        interval_95=None if low_high is None else [float(np.exp(end + centre)) for end in low_high],
        interval_reason=reason,
        coefficients=[float(c0), float(c1), float(c2), centre],
        rates=[float(rate) for rate in rates],
        rough=rough,
    )


def _variance(noise: float | None, freedom: int, scatter: float, left: int) -> tuple[float | None, int, bool]:
    """Return (variance of one run around the parabola, degrees of freedom, whether the fit is rough)."""
    if noise is None:
        return (scatter / left, left, False) if left else (None, 0, False)
    if left and noise > 0 and scatter / left / noise**2 > stats.f.ppf(0.95, left, freedom):
        return scatter / left, left, True
    return (freedom * noise**2 + scatter) / (freedom + left), freedom + left, False


def _fieller(c1: float, c2: float, covariance: np.ndarray, bound: float) -> tuple[tuple[float, float] | None, str]:
    """Return all x with (c1 + 2·c2·x)² ≤ bound · its variance, if that is an interval.

    bound: t² times the variance.
    """
    a = 4 * (c2**2 - bound * covariance[2, 2])
    b = 4 * (c1 * c2 - bound * covariance[1, 2])
    c = c1**2 - bound * covariance[1, 1]
    if a <= 0:
        return None, "the curvature is within the noise: no rate is ruled out"
    half = math.sqrt(max(b**2 - 4 * a * c, 0.0)) / (2 * a)
    return (-b / (2 * a) - half, -b / (2 * a) + half), ""


def rate_optimum(
    names: Sequence[str], best: Setting, candidates: Sequence[Setting], noise: float | None, freedom: int
) -> RateOptimum | str:
    """Return `log_parabola` through `best` and its neighbours in learning rate, all other axes at the values of `best`.

    candidates: settings that were trained to the end. Only those up to 0.5 nats above the best and at most two to
    either side, but always the next one.
    """
    if best.member is not None:
        return "the learning rate of the best run changed along it"
    line = _line(names, best, candidates)
    if len(line) < 3:
        return "fewer than three learning rates were trained to the end with the other axes' values of the best"
    index = next((i for i, row in enumerate(line) if row is best), -1)
    if not 0 < index < len(line) - 1:
        return "the best learning rate is at an end of those that were trained to the end"
    low, high = index - 1, index + 1
    while low > max(0, index - NEIGHBOURS) and line[low - 1].known_mean < best.known_mean + NEAR:
        low -= 1
    while high < min(len(line) - 1, index + NEIGHBOURS) and line[high + 1].known_mean < best.known_mean + NEAR:
        high += 1
    near = line[low : high + 1]
    return log_parabola(
        [row.values["learning_rate"] for row in near],
        [row.known_mean for row in near],
        [row.seeds for row in near],
        noise,
        freedom,
    )


def _line(names: Sequence[str], best: Setting, candidates: Sequence[Setting]) -> list[Setting]:
    """Return the settings that differ from `best` only in the learning rate, by their (positive) rates."""
    others = [name for name in names if name != "learning_rate"]
    alone = [row for row in candidates if row.member is None]
    held = [row for row in alone if all(row.values[name] == best.values[name] for name in others)]
    rated = [row for row in held if _is_positive(row.values["learning_rate"])]
    return sorted(rated, key=lambda row: row.values["learning_rate"])


def _is_positive(rate: Any) -> bool:
    return is_number(rate) and rate > 0


def transfer(
    names: Sequence[str], candidates: Sequence[Setting], noise: float | None, freedom: int
) -> RateTransfer | None:
    """Return the optimum of the learning rate at each size; None if the sweep has no axis of size or none of rates.

    The power law of the optimum in the size (`size_law`) is weighted by the intervals where every size has one. A
    factor per doubling of 1 is what muP promises (Yang et al. 2022).
    """
    axis = next((name for name in SHAPES if name in names and len(_numbers(candidates, name)) > 1), None)
    if axis is None or "learning_rate" not in names:
        return None
    sizes = []
    for size in _numbers(candidates, axis):
        members = [row for row in candidates if row.values[axis] == size]
        best = min(members, key=lambda row: row.known_mean)
        found = rate_optimum(names, best, members, noise, freedom)
        line = _line(names, best, members)
        sizes.append(
            SizeOptimum(
                size=size,
                best={name: best.values[name] for name in names},
                mean=best.known_mean,
                optimum=found if isinstance(found, RateOptimum) else None,
                refused=found if isinstance(found, str) else None,
                line=[RatePoint(row.values["learning_rate"], row.known_mean) for row in line],
            )
        )
    return _with_law(axis, sizes)


def _numbers(rows: Sequence[Setting], name: str) -> list[float]:
    return sorted({row.values[name] for row in rows if is_number(row.values[name])})


def _with_law(axis: str, sizes: list[SizeOptimum]) -> RateTransfer:
    """Return the sizes with their law, or why too few of them have an optimum."""
    found = [(row.size, row.optimum) for row in sizes if row.optimum is not None]
    intervals = [(low, high) for _, optimum in found if optimum.interval_95 for low, high in [optimum.interval_95]]
    known = intervals if found and len(intervals) == len(found) else None
    try:
        law = fit_size_law(
            {axis: [size for size, _ in found]},
            [optimum.learning_rate for _, optimum in found],
            intervals=known,
        )
    except InputError as error:
        return RateTransfer(axis, sizes, None, str(error), None, None)
    return RateTransfer(axis, sizes, law, None, 2 ** law.exponents[axis], [2**end for end in law.interval(axis)])
