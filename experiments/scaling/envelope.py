"""Fit the envelope of training curves, approach 1 (Hoffmann et al. 2022, section 3.1).

Every run is a curve of loss over compute. At a given compute the run with the lowest smoothed loss gives the best size;
power laws N* ∝ C^a and D* ∝ C^b go through these. The learning rate must not be decaying along the curves: a decaying
run is worse at half its tokens than a run planned to end there, so that its inner points are above the true envelope.
The document records `schedule` for that reason.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.intervals import Intervals, intervals_of
from experiments.scaling.rows.curves import TrainingCurve
from experiments.words import counted
from model.errors import InputError

MINIMUM_SIZES = 3  # two sizes cross once: a point, not a law
MINIMUM_CROSSINGS = 2
FLOP_VALUES = 200  # values of compute at which the envelope is evaluated; Hoffmann et al. use 1,500
STEADY = ("constant",)  # schedules whose inner points are as good as ends


@dataclass(frozen=True)
class Crossing:
    """A point where the envelope passes from one size to the next larger one: both are equally good, N is between."""

    flops: float
    params: float
    tokens: float
    loss: float
    smaller: float
    """Parameters of the smaller size."""
    larger: float


@dataclass(frozen=True)
class RejectedCurve:
    """A training curve whose size gives no information on the optimum, and why."""

    params: float
    name: str
    reason: str


@dataclass(frozen=True)
class EnvelopeFit:
    """Power laws N* = params_coefficient·C^a and D* = tokens_coefficient·C^b through the points where sizes cross."""

    a: float
    b: float
    params_coefficient: float
    tokens_coefficient: float
    crossings: list[Crossing]
    rejected: list[RejectedCurve]
    schedules: list[str]
    bootstraps: int
    seed: int
    _curves: list[TrainingCurve] = field(repr=False)
    _grid: Float[np.ndarray, " flops"] = field(repr=False)
    _losses: Float[np.ndarray, "curves flops"] = field(repr=False)

    @property
    def warnings(self) -> list[str]:
        """Caveats of the exponents."""
        decaying = [name for name in self.schedules if name not in STEADY]
        found = []
        if decaying:
            found.append(
                f"schedule {', '.join(decaying)}: a run whose rate still falls is not at its end, so its inner "
                "points are above the true envelope and the exponents are biased (Hoffmann et al. 2022, section 3.1)"
            )
        if len(self.crossings) < 3:
            found.append(
                f"{counted(len(self.crossings), 'crossing')}: a straight line through two points shows no scatter"
            )
        return found

    @cached_property
    def draws(self) -> Float[np.ndarray, "bootstraps 4"]:
        """(log coefficient, a, log coefficient, b) of runs drawn with replacement; NaN if too few sizes cross."""
        rng = np.random.default_rng(self.seed)
        params = np.array([curve.params for curve in self._curves])
        rows = []
        for _ in range(self.bootstraps):
            chosen = np.unique(rng.integers(len(params), size=len(params)))
            crossings, _ = _crossings(params[chosen], self._grid, self._losses[chosen])
            rows.append(_laws(crossings) if len(crossings) >= MINIMUM_CROSSINGS else np.full(4, np.nan))
        draws = np.array(rows)
        if np.isfinite(draws[:, 1]).sum() < min(20, self.bootstraps):
            raise InputError(
                f"nearly every resample of {counted(len(params), 'run')} kept fewer than "
                f"{MINIMUM_CROSSINGS} crossings, so no "
                "interval can be given; add sizes"
            )
        return draws

    @cached_property
    def intervals(self) -> Intervals:
        """`intervals["a"][95] -> (low, high)` for a and b, percentiles of the draws. Raises as `draws` does."""
        return intervals_of({"a": self.draws[:, 1], "b": self.draws[:, 3]})

    def document(self) -> dict[str, Any]:
        """Return plain values for JSON; intervals are null, with a warning, if too few resamples crossed."""
        document: dict[str, Any] = {
            "a": self.a,
            "b": self.b,
            "params_coefficient": self.params_coefficient,
            "tokens_coefficient": self.tokens_coefficient,
            "crossings": [asdict(crossing) for crossing in self.crossings],
            "rejected": [asdict(curve) for curve in self.rejected],
            "schedules": self.schedules,
            "bootstraps": self.bootstraps,
            "seed": self.seed,
            "intervals": None,
        }
        warnings = self.warnings
        try:
            document["intervals"] = {
                name: {f"{level:g}": list(pair) for level, pair in by.items()} for name, by in self.intervals.items()
            }
        except InputError as error:
            warnings = [*warnings, str(error)]
        broken = None if document["intervals"] is None else int(np.isnan(self.draws[:, 1]).sum())
        return document | {"warnings": warnings, "broken_draws": broken}


def _crossings(
    params: np.ndarray, grid: Float[np.ndarray, " flops"], losses: Float[np.ndarray, "runs flops"]
) -> tuple[list[Crossing], np.ndarray]:
    """Return where the envelope passes from a size to the next larger one, and which sizes are ever on it.

    Only these points are used as optima: between them the best size in the table need not be the optimum. At a crossing
    both sizes are equally good, and for a valley that is symmetric in ln N the optimum is their geometric mean.
    """
    sizes = np.unique(params)
    with np.errstate(invalid="ignore"):  # no run has this size at this compute: 0/0 gives NaN on purpose
        finite = np.array([np.isfinite(losses[params == size]).sum(0) for size in sizes])
        total = np.array([np.where(np.isfinite(losses), losses, 0)[params == size].sum(0) for size in sizes])
        mean = total / finite
    known = (finite > 0).sum(0) >= 2  # with a single size at this compute there is nothing to choose
    best = np.where(known, np.where(finite > 0, mean, np.inf).argmin(0), -1)
    passages: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for i in np.flatnonzero((best[1:] != best[:-1]) & (best[1:] >= 0) & (best[:-1] >= 0)):
        pair = min(best[i], best[i + 1]), max(best[i], best[i + 1])
        gap = mean[pair[1], i : i + 2] - mean[pair[0], i : i + 2]
        # Both sizes must have losses on both sides: the end or beginning of a curve is not a crossing.
        if np.isfinite(gap).all() and gap[0] != gap[1]:
            share = gap[0] / (gap[0] - gap[1])
            at = np.log(grid[i]) + share * np.log(grid[i + 1] / grid[i])
            passages.setdefault(pair, []).append((at, mean[pair[0], i] + share * np.diff(mean[pair[0], i : i + 2])[0]))
    found = []
    for (small, large), points in sorted(passages.items()):
        log_flops, loss = np.mean(points, axis=0)  # noise makes neighbours cross more than once
        flops, size = float(np.exp(log_flops)), float(np.sqrt(sizes[small] * sizes[large]))
        found.append(Crossing(flops, size, flops / 6 / size, float(loss), float(sizes[small]), float(sizes[large])))
    return found, sizes[np.unique(best[best >= 0])]


def _laws(crossings: list[Crossing]) -> np.ndarray:
    log_c = np.log([point.flops for point in crossings])
    columns = [point.params for point in crossings], [point.tokens for point in crossings]
    return np.concatenate([np.polyfit(log_c, np.log(column), 1)[::-1] for column in columns])


def fit_envelope(
    curves: Sequence[TrainingCurve],
    *,
    bootstraps: int = 1000,
    seed: int = 0,
) -> EnvelopeFit:
    """Fit the envelope (approach 1 of Hoffmann et al.) from training curves of runs at three sizes or more; C = 6·N·D.

    Raises `InputError` if fewer than two pairs of neighbouring sizes cross.
    """
    curves = sorted(
        (usable for curve in curves if (usable := _usable(curve)) is not None), key=lambda c: (c.params, c.name)
    )
    params = np.array([curve.params for curve in curves])
    if len(np.unique(params)) < MINIMUM_SIZES:
        raise InputError(
            f"training curves of {counted(len(np.unique(params)), 'model size')} were given; an "
            f"envelope needs {MINIMUM_SIZES} or more"
        )
    spans = [6 * curve.params * curve.tokens[[0, -1]] for curve in curves]
    grid = np.geomspace(min(s[0] for s in spans), max(s[1] for s in spans), FLOP_VALUES)
    losses = np.array(
        [
            np.interp(np.log(grid / 6 / c.params), np.log(c.tokens), c.smoothed(), left=np.nan, right=np.nan)
            for c in curves
        ]
    )
    crossings, seen = _crossings(params, grid, losses)
    rejected = [
        RejectedCurve(curve.params, curve.name, _why_not(curve, curve.params in seen, params))
        for curve in curves
        if not any(curve.params in (point.smaller, point.larger) for point in crossings)
    ]
    if len(crossings) < MINIMUM_CROSSINGS:
        raise InputError(
            f"{counted(len(crossings), 'crossing')} of neighbouring sizes found, and a power law "
            f"needs {MINIMUM_CROSSINGS}: train the small sizes longer or add sizes between "
            f"{params.min():.3g} and {params.max():.3g}"
        )
    log_n, a, log_d, b = (float(value) for value in _laws(crossings))
    schedules = sorted({curve.schedule for curve in curves})
    return EnvelopeFit(
        a,
        b,
        float(np.exp(log_n)),
        float(np.exp(log_d)),
        crossings,
        rejected,
        schedules,
        bootstraps,
        seed,
        curves,
        grid,
        losses,
    )


def _why_not(curve: TrainingCurve, on_envelope: bool, params: np.ndarray) -> str:
    if not on_envelope:
        return "never the best size at any compute that two runs share"
    edge = "smallest" if curve.params == params.min() else "largest" if curve.params == params.max() else None
    if edge is not None:
        return f"the {edge} size is best at the edge of the data, so that a size beyond it may be better"
    return "best where its neighbours have no points: the curves do not overlap there"


def _usable(curve: TrainingCurve) -> TrainingCurve | None:
    good = np.isfinite(curve.loss) & (curve.loss > 0) & (curve.tokens > 0)
    tokens, first = np.unique(curve.tokens[good], return_index=True)
    if len(tokens) < 3:
        return None
    return TrainingCurve(curve.name, curve.params, tokens, curve.loss[good][first], curve.schedule)
