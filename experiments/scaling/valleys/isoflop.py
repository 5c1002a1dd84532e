"""IsoFLOP valleys: the compute-optimal model size at each budget (Hoffmann et al. 2022, approach 2).

At a fixed budget C the loss is a valley in log N. A curve through each valley gives its minimum, and power
laws through the minima give N* ∝ C^a and D* ∝ C^b.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.intervals import Intervals, exponential, intervals_of, percentile_interval
from experiments.scaling.law.outliers import Outlier
from experiments.scaling.rows.table import DroppedRow, Table, clean
from experiments.scaling.valleys.budgets import fewer_per_budget, thinned_in_words, valleys_of, with_shape
from experiments.scaling.valleys.recognise import BY_CHANCE
from experiments.scaling.valleys.skew import common_skew, skewed_minima
from experiments.scaling.valleys.spline import Spline, choose_smoothing
from experiments.scaling.valleys.valley import (
    MINIMUM_SIZES,
    PARABOLA,
    SAME_BUDGET,
    Convex,
    Valley,
    ValleyMinimum,
    ValleyShape,
    group_budgets,
    rejection,
    tokens_line,
)
from experiments.words import counted
from model.errors import InputError, check_at_least_one

__all__ = [
    "DEFAULT",
    "METHODS",
    "SAME_BUDGET",
    "IsoflopFit",
    "Method",
    "Size",
    "Valley",
    "fit_isoflop",
    "group_budgets",
]

Method = Literal["spline", "skewed", "parabola"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT: Method = "spline"  # `known_valleys.py` says why
MINIMUM_BUDGETS = 2  # a power law
MINIMUM_VALID_DRAWS = 20  # fewer draws give no useful percentiles


@dataclass(frozen=True)
class Size:
    """The compute-optimal N and D of a budget; the power laws predict no loss."""

    params: Any
    tokens: Any


@dataclass(frozen=True)
class RejectedBudget:
    """A budget whose valley has no trustworthy minimum, and why."""

    flops: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class IsoflopFit:
    """Power laws N* = params_coefficient·C^a and D* = tokens_coefficient·C^b through the valleys' minima."""

    a: float
    b: float
    params_coefficient: float
    tokens_coefficient: float
    valleys: list[Valley] = field(repr=False)
    """Every budget, accepted or not, in ascending order."""
    bootstraps: int
    seed: int
    dropped: list[DroppedRow] = field(repr=False)
    method: Method = DEFAULT
    shape: ValleyShape = PARABOLA
    thinned: str | None = None
    """Remark on results from fewer rows than the table has; None if all rows were used."""

    @property
    def outliers(self) -> list[Outlier]:
        """The runs left out as gross outliers."""
        return [outlier for valley in self.valleys for outlier in valley.outliers]

    @property
    def optima(self) -> list[ValleyMinimum]:
        """The minimum of each accepted valley."""
        return [valley.optimum for valley in self.accepted]

    @property
    def accepted(self) -> list[Valley]:
        """The valleys whose minima the power laws go through."""
        return [valley for valley in self.valleys if valley.reason is None]

    @property
    def rejected(self) -> list[RejectedBudget]:
        """The budgets without a reliable minimum."""
        return [RejectedBudget(v.flops, v.reason) for v in self.valleys if v.reason is not None]

    def optimal(self, C: Any) -> Size:
        """Return N* and D* at a budget of C FLOPs; arrays are fine."""
        log_c = np.log(np.asarray(C, np.float64))
        params = exponential(np.log(self.params_coefficient) + self.a * log_c)
        return Size(params[()], exponential(np.log(self.tokens_coefficient) + self.b * log_c)[()])

    @cached_property
    def intervals(self) -> Intervals:
        """`intervals["a"][95] -> (low, high)` for a and b at 80 and 95 %. Raises as `draws` does."""
        return intervals_of({"a": self.draws[:, 1], "b": self.draws[:, 3]})

    def optimal_interval(self, C: Any, level: int | float = 95) -> dict[str, tuple[Any, Any]]:
        """Return `{"params": (low, high), "tokens": (low, high)}` of N*(C) and D*(C)."""
        log_c = np.log(np.asarray(C, np.float64))
        draws = self.draws.reshape(len(self.draws), 4, *(1,) * log_c.ndim)
        params = percentile_interval(exponential(draws[:, 0] + draws[:, 1] * log_c), level)
        return {
            "params": params,
            "tokens": percentile_interval(exponential(draws[:, 2] + draws[:, 3] * log_c), level),
        }

    @property
    def broken_draws(self) -> int:
        """Bootstrap draws that kept fewer than two valleys; they are left out of the intervals."""
        return int(np.isnan(self.draws[:, 1]).sum())

    @cached_property
    def draws(self) -> Float[np.ndarray, "bootstraps 4"]:
        """(log coefficient, a) of N* and (log coefficient, b) of D* refitted to each bootstrap draw.

        The bootstrap resamples *residuals*, not runs: with five runs a tenth of the resamples would have fewer than
        three sizes, and half of the others an open valley, so that resampling runs mostly measures the failures of
        resampling. Each draw keeps every budget's sizes and adds, to the fitted curve, relative residuals drawn with
        replacement from those of all accepted budgets together (each has few runs, all together have many). Residuals
        are divided by √(1 − leverage), as a curve through few points hides most of the noise, and each draw multiplies
        them by √(f/χ²) with f the degrees of freedom left: how large the noise is, is itself uncertain (Student's
        argument). The curve's misfit counts as noise, which widens the intervals.

        Each draw is then treated like the data: a skew is fitted again; a valley that comes out non-convex, with its
        lowest size at an edge or with its minimum outside the sizes is left out of that draw's power laws, and a draw
        with fewer than two valleys left is NaN and out of the percentiles (`broken_draws` counts them).

        Measured on 400 simulated ladders of six budgets with nine runs each (`known_laws.py`): the 95 % interval of
        `a` holds the truth in 94 % with windows centred on the optimum and in 93 % with windows that drift across it;
        with five budgets of seven runs in 94 %. On 200 of each of twelve kinds (`known_valleys.py`) the spline's holds
        it in 93 to 99.5 %; bias-corrected percentiles (BC) held it less often, in 82 to 95 %.

        Raises `InputError` if no budget has a run more than its curve needs (so that the noise is unknown), or if
        nearly every bootstrap draw failed.
        """
        valleys = self.accepted
        rng = np.random.default_rng(self.seed)
        residuals, freedom = _pooled_residuals(valleys, shared=1 if self.method == "skewed" else 0)
        if not len(residuals):
            raise InputError(
                f"every accepted budget has just three runs, through which a {self.shape.name} passes exactly: the "
                "noise of a run, and so an interval, is unknown; add a run to a budget"
            )
        size = np.sqrt(freedom / rng.chisquare(freedom, size=(self.bootstraps, 1)))
        us = [valley.u for valley in valleys]
        fitted = [valley.curve(valley.params) for valley in valleys]
        losses = [f * (1 + size * rng.choice(residuals, size=(self.bootstraps, len(f)))) for f in fitted]
        log_n, log_d = (np.full((self.bootstraps, len(valleys)), np.nan) for _ in range(2))
        for i, (vertex, curvature) in enumerate(_minima(self.method, self.shape, us, losses)):
            params = valleys[i].params
            flat, edge, outside = rejection(params, losses[i], vertex, curvature)
            vertex = np.where(flat | edge | outside, np.nan, vertex)
            log_params = np.log(params)
            level, slope = tokens_line(log_params, np.log(valleys[i].tokens))
            log_n[:, i], log_d[:, i] = vertex + log_params.mean(), level + slope * vertex
        log_c = np.log([valley.flops for valley in valleys])
        draws = np.concatenate([_power_law(log_c, log_n), _power_law(log_c, log_d)], axis=1)
        valid = int(np.isfinite(draws[:, 1]).sum())
        if valid < min(MINIMUM_VALID_DRAWS, self.bootstraps):
            raise InputError(
                f"only {valid} of {self.bootstraps} bootstrap draws kept two valleys: the noise is as large as "
                "the valleys are deep, so no interval can be given"
            )
        return draws


def _minima(
    method: str, shape: ValleyShape, us: list[np.ndarray], losses: list[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (vertex, curvature) of every draw, per valley; for the skewed method each draw has its own skew."""
    if method == "skewed":
        return skewed_minima(us, losses)
    return [shape.minimum(u, loss)[::2] for u, loss in zip(us, losses, strict=True)]


def _pooled_residuals(valleys: list[Valley], shared: int) -> tuple[np.ndarray, float]:
    """Return the relative residuals of all valleys, corrected for leverage and centred, and their degrees of freedom.

    `shared` coefficients were found from all valleys together.
    """
    pool, freedom = [], 0.0
    for valley in valleys:
        u = valley.u
        operator = valley.shape.operator(u, u)
        leverage = np.diag(operator)
        fitted = operator @ valley.loss
        free = leverage < 1 - 1e-9  # a run that the curve must pass through carries no information on the noise
        pool.append(((valley.loss - fitted) / fitted)[free] / np.sqrt(1 - leverage[free]))
        freedom += float((1 - leverage[free]).sum())
    residuals = np.concatenate(pool)
    if not len(residuals):
        return residuals, 0.0
    left = max(freedom - shared, 1.0)
    return (residuals - residuals.mean()) * np.sqrt(freedom / left), left


def _power_law(
    log_c: Float[np.ndarray, " budgets"], log_y: Float[np.ndarray, "draws budgets"]
) -> Float[np.ndarray, "draws 2"]:
    """Return (log coefficient, exponent) of y ∝ C^exponent by least squares in logs; NaN budgets are left out."""
    valid = np.isfinite(log_y)
    count = valid.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre_c = (valid * log_c).sum(1) / count
        centre_y = np.where(valid, log_y, 0).sum(1) / count
        c = np.where(valid, log_c - centre_c[:, None], 0)
        exponent = (c * np.where(valid, log_y - centre_y[:, None], 0)).sum(1) / (c**2).sum(1)
    exponent = np.where(count >= MINIMUM_BUDGETS, exponent, np.nan)
    return np.stack([centre_y - exponent * centre_c, exponent], axis=1)


def fit_isoflop(
    *,
    params: Any,
    tokens: Any,
    loss: Any,
    flops: Any = None,
    bootstraps: int = 1000,
    seed: int = 0,
    method: Method = DEFAULT,
    screen: bool = False,
) -> IsoflopFit:
    """Fit a curve in log N to the losses of each budget, and power laws in C through the minima.

    N in parameters, D in tokens, L in nats per token, C in FLOPs (without `flops`: 6·N·D); budgets within 5 % are one,
    and runs with similar compute by chance do not count as a budget (`recognise.py`). A valley with fewer than three
    sizes, with its lowest loss at an edge, without a minimum or with the minimum outside its sizes is rejected and
    listed with the reason. D* is read off each budget's own line of log D over log N. Rows that no fit can use are
    dropped as in `table.clean`; row order does not matter. With `screen`, gross outliers are left out by the rules of
    `outliers.py` and listed (`.outliers`).

    method: "spline", a smoothing spline that assumes no shape (`spline.py`); "skewed", a parabola bent by one skew
    common to all budgets (`skew.py`); "parabola".

    Raises `InputError` with the reasons if fewer than two budgets are accepted.
    """
    check_at_least_one(bootstraps=bootstraps)
    if method not in METHODS:
        raise InputError(f"method={method!r} must be one of {', '.join(METHODS)}")
    table = _sorted(clean(params, tokens, loss, flops))
    budgets = 6 * table.params * table.tokens if table.flops is None else table.flops
    rows = len(table)
    table, budgets, most = fewer_per_budget(table, budgets)
    valleys = valleys_of(table, budgets, screen=screen)
    shape: ValleyShape = PARABOLA
    if method != "parabola":
        sound = [v for v in valleys if v.reason is None] or [v for v in valleys if not v.runs_at_fault]
        if sound:
            us, losses = [valley.u for valley in sound], [valley.loss for valley in sound]
            shape = (
                Convex(common_skew(us, losses), "skewed parabola")
                if method == "skewed"
                else Spline(choose_smoothing(us, losses))
            )
            valleys = [with_shape(valley, shape) for valley in valleys]
    optima = [valley.optimum for valley in valleys if valley.reason is None]
    if len(optima) < MINIMUM_BUDGETS:
        chance = sum(valley.reason == BY_CHANCE for valley in valleys)
        if chance and all(valley.runs_at_fault for valley in valleys):
            raise InputError(
                f"the {counted(len(table), 'run')} share no budgets: their compute is spread, and "
                f"{counted(chance, 'group')} within {100 * (SAME_BUDGET - 1):.0f} % of one another came about by "
                f"chance; valleys need {MINIMUM_SIZES} sizes or more at each of {MINIMUM_BUDGETS} budgets or more"
            )
        reasons = [f"{valley.flops:.3g} FLOPs: {valley.reason}" for valley in valleys if valley.reason is not None]
        shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
        raise InputError(
            f"{len(optima)} of {counted(len(valleys), 'budget')} with a minimum, and a power "
            f"law needs {MINIMUM_BUDGETS}" + (f" ({shown})" if reasons else "")
        )
    log_c = np.log([optimum.flops for optimum in optima])
    laws = [_power_law(log_c, np.log([[getattr(o, name) for o in optima]]))[0] for name in ("params", "tokens")]
    return IsoflopFit(
        a=float(laws[0][1]),
        b=float(laws[1][1]),
        params_coefficient=float(exponential(laws[0][0])),
        tokens_coefficient=float(exponential(laws[1][0])),
        valleys=valleys,
        bootstraps=int(bootstraps),
        seed=int(seed),
        dropped=table.dropped,
        method=method,
        shape=shape,
        thinned=thinned_in_words(len(table), rows, most),
    )


def _sorted(table: Table) -> Table:
    """Return the table sorted by parameters, tokens and loss, so that nothing depends on the order of its rows."""
    order = np.lexsort((table.loss, table.tokens, table.params))
    flops = None if table.flops is None else table.flops[order]
    return Table(table.params[order], table.tokens[order], table.loss[order], flops, table.dropped)
