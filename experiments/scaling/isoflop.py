"""IsoFLOP valleys: the compute-optimal model size at each budget (Hoffmann et al. 2022, approach 2).

At a fixed budget C the loss is a valley in log N. A parabola through each valley gives its minimum, and
power laws through the minima give N* ∝ C^a and D* ∝ C^b.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.scaling.intervals import Intervals, intervals_of, percentile_interval
from experiments.scaling.table import Table, clean
from model.errors import InputError

SAME_BUDGET = 1.05  # budgets within 5 % are one: whole numbers of steps and heads make exact budgets impossible
MINIMUM_SIZES = 3  # of one budget: a parabola
MINIMUM_BUDGETS = 2  # a power law
MINIMUM_VALID_DRAWS = 20  # fewer draws carry no percentile worth printing


@dataclass(frozen=True)
class Size:
    """The compute-optimal split of a budget, without a loss: the power laws do not speak of it."""

    params: Any
    tokens: Any


@dataclass(frozen=True)
class Valley:
    """The runs of one budget and the parabola loss = loss* + curvature·ln²(N/N*) through them."""

    flops: float
    """FLOPs; the geometric mean of the runs'."""
    params: Float[np.ndarray, " runs"]
    tokens: Float[np.ndarray, " runs"]
    loss: Float[np.ndarray, " runs"]
    coefficients: Float[np.ndarray, "3"] | None
    """Of loss = c0 + c1·u + c2·u² with u = ln N − mean(ln N); None with fewer than three sizes."""
    reason: str | None
    """Why the valley is rejected, or None."""

    @property
    def optimum(self) -> dict[str, float]:
        """{flops, params, tokens, loss, curvature, runs, smallest, largest} of an accepted valley."""
        assert self.coefficients is not None, "fewer than three sizes: no parabola"
        vertex, loss, _ = _vertex(self.coefficients)
        log_params, log_tokens = np.log(self.params), np.log(self.tokens)
        return {
            "flops": self.flops,
            "params": float(np.exp(vertex + log_params.mean())),
            "tokens": float(np.exp(_line(log_params, log_tokens) @ [1.0, vertex])),
            "loss": float(loss),
            "curvature": float(self.coefficients[2]),
            "runs": len(self.loss),
            "smallest": float(self.params.min()),
            "largest": float(self.params.max()),
        }

    def curve(self, params: Any) -> Any:
        """The parabola's loss at `params` parameters."""
        assert self.coefficients is not None, "fewer than three sizes: no parabola"
        u = np.log(params) - np.log(self.params).mean()
        return np.polyval(self.coefficients[::-1], u)


def _vertex(coefficients):
    """(u, loss, curvature) of the parabola's extremum, for coefficients [..., 3]."""
    c0, c1, c2 = np.moveaxis(np.asarray(coefficients), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -c1 / (2 * c2), c0 - c1**2 / (4 * c2), c2


def _line(log_params: np.ndarray, log_tokens: np.ndarray) -> Float[np.ndarray, "2"]:
    """log D = c0 + c1·u at one budget; D = C/(6N) makes it exact with c1 = −1, other conventions bend it."""
    u = log_params - log_params.mean()
    return np.array([log_tokens.mean(), u @ (log_tokens - log_tokens.mean()) / (u @ u)])


def _design(params: np.ndarray) -> Float[np.ndarray, "runs 3"]:
    u = np.log(params) - np.log(params).mean()
    return np.stack([np.ones_like(u), u, u**2], axis=1)


def _mean_by_size(params: np.ndarray) -> Float[np.ndarray, "sizes runs"]:
    """Averages the runs of each size; sizes ascend."""
    member = params[None] == np.unique(params)[:, None]
    return member / member.sum(1, keepdims=True)


def _rejection(params: np.ndarray, loss: np.ndarray, coefficients: np.ndarray) -> tuple[Any, Any, Any]:
    """For losses [..., runs], yes or no: not convex; lowest loss at an edge; vertex outside the sizes."""
    vertex, _, curvature = _vertex(coefficients)
    flat = ~(curvature > 1e-12 * np.abs(coefficients[..., 0]))
    lowest = (loss @ _mean_by_size(params).T).argmin(-1)
    edge = (lowest == 0) | (lowest == len(np.unique(params)) - 1)
    u = np.log(params) - np.log(params).mean()
    outside = ~((vertex > u.min()) & (vertex < u.max()))
    return flat, edge, outside


def _valley(flops: float, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Valley:
    sizes = np.unique(params)
    if len(sizes) < MINIMUM_SIZES:
        some = f"{len(sizes)} model size{'s' if len(sizes) > 1 else ''}"
        return Valley(flops, params, tokens, loss, None, f"{some} where a parabola needs {MINIMUM_SIZES}")
    coefficients = np.linalg.lstsq(_design(params), loss, rcond=None)[0]
    flat, edge, outside = _rejection(params, loss, coefficients)
    reason: str | None = None
    if edge:
        side = sizes[(_mean_by_size(params) @ loss).argmin()]
        where, toward = ("smallest", "smaller") if side == sizes[0] else ("largest", "larger")
        reason = f"the lowest loss is at the {where} size, N={side:.3g}: an edge, so {toward} models are needed"
    elif flat:
        reason = "the parabola through the losses is not convex: it has no minimum"
    elif outside:
        at = float(np.exp(_vertex(coefficients)[0] + np.log(params).mean()))
        reason = f"the parabola's minimum, N={at:.3g}, lies outside the sizes {sizes[0]:.3g}…{sizes[-1]:.3g}"
    return Valley(flops, params, tokens, loss, coefficients, reason)


def group_budgets(flops: Float[np.ndarray, " runs"]) -> list[Int[np.ndarray, " members"]]:
    """Row numbers by budget, ascending. A run joins while it is within 5 % of the run below it and the
    group stays within ±5 % of its middle, so that a dense ladder of budgets cannot chain into one.
    """
    order = np.argsort(flops, kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if (
            groups
            and flops[i] <= SAME_BUDGET * flops[groups[-1][-1]]
            and flops[i] <= SAME_BUDGET**2 * flops[groups[-1][0]]
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [np.array(sorted(group)) for group in groups]


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
    dropped: list[dict[str, Any]] = field(repr=False)

    @property
    def optima(self) -> list[dict[str, float]]:
        """The minimum of each accepted valley: {flops, params, tokens, loss, curvature, runs, smallest,
        largest}.

        The parabola is loss + curvature·ln²(N/params), fitted to `runs` runs of sizes smallest…largest.
        """
        return [valley.optimum for valley in self.accepted]

    @property
    def accepted(self) -> list[Valley]:
        """The valleys whose minima the power laws go through."""
        return [valley for valley in self.valleys if valley.reason is None]

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """[{flops, reason}] of the budgets that hold no trustworthy minimum."""
        return [{"flops": v.flops, "reason": v.reason} for v in self.valleys if v.reason is not None]

    def optimal(self, C: Any) -> Size:
        """N* and D* at a budget of C FLOPs; arrays are fine."""
        log_c = np.log(np.asarray(C, np.float64))
        params = np.exp(np.log(self.params_coefficient) + self.a * log_c)
        return Size(params[()], np.exp(np.log(self.tokens_coefficient) + self.b * log_c)[()])

    @cached_property
    def intervals(self) -> Intervals:
        """`intervals["a"][95] -> (low, high)` for a and b at 80 and 95 %. Raises as `draws` does."""
        return self.intervals_at()

    def intervals_at(self, levels: Sequence[int | float] = (80, 95)) -> Intervals:
        """The same at any levels in per cent."""
        return intervals_of({"a": self.draws[:, 1], "b": self.draws[:, 3]}, levels)

    def optimal_interval(self, C: Any, level: int | float = 95) -> dict[str, tuple[Any, Any]]:
        """`{"params": (low, high), "tokens": (low, high)}` of N*(C) and D*(C)."""
        log_c = np.log(np.asarray(C, np.float64))
        draws = self.draws.reshape(len(self.draws), 4, *(1,) * log_c.ndim)
        params = percentile_interval(np.exp(draws[:, 0] + draws[:, 1] * log_c), level)
        return {
            "params": params,
            "tokens": percentile_interval(np.exp(draws[:, 2] + draws[:, 3] * log_c), level),
        }

    @property
    def broken_draws(self) -> int:
        """Bootstrap draws that kept fewer than two valleys; they are left out of the intervals."""
        return int(np.isnan(self.draws[:, 1]).sum())

    @cached_property
    def draws(self) -> Float[np.ndarray, "bootstraps 4"]:
        """(log coefficient, a) of N* and (log coefficient, b) of D* refitted to each bootstrap draw.

        The bootstrap resamples *residuals*, not runs: of five runs a tenth of the resamples would hold
        fewer than three sizes, and half of the rest a valley open at one side, so that resampling runs
        mostly measures its own degeneracy. Each draw keeps every budget's sizes and adds, to the fitted
        parabola, relative residuals drawn with replacement from those of all accepted budgets together (few
        runs each, many together). Residuals are divided by √(1 − leverage), as a parabola through few
        points hides most of the noise. What the true valley has of a cubic counts as noise, which widens
        the intervals.

        Each draw is then treated as the data were: a valley that comes out non-convex, with its lowest size
        at an edge or with its minimum outside the sizes is left out of that draw's power laws, and a draw
        with fewer than two valleys left is NaN and out of the percentiles (`broken_draws` counts them).
        Measured on 300 simulated ladders of four budgets with five or seven runs each: the 95 % interval of `a`
        holds the truth in 92 to 93 %, the 80 % one in 80 %.

        Raises `InputError` where no budget has a run more than its parabola needs (nothing tells the
        noise), and where nearly every draw broke.
        """
        valleys = self.accepted
        rng = np.random.default_rng(self.seed)
        residuals = _pooled_residuals(valleys)
        if not len(residuals):
            raise InputError(
                "every accepted budget has just three runs, through which a parabola passes exactly: the noise "
                "of a run, and so an interval, is unknown; add a run to a budget"
            )
        log_n, log_d = (np.full((self.bootstraps, len(valleys)), np.nan) for _ in range(2))
        for i, valley in enumerate(valleys):
            log_params = np.log(valley.params)
            fitted = valley.curve(valley.params)
            noise = rng.choice(residuals, size=(self.bootstraps, len(fitted)))
            loss = fitted * (1 + noise)
            coefficients = loss @ np.linalg.pinv(_design(valley.params)).T
            flat, edge, outside = _rejection(valley.params, loss, coefficients)
            vertex = np.where(flat | edge | outside, np.nan, _vertex(coefficients)[0])
            level, slope = _line(log_params, np.log(valley.tokens))
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


def _pooled_residuals(valleys: list[Valley]) -> np.ndarray:
    """Relative residuals of all valleys, corrected for leverage and centred."""
    pool = []
    for valley in valleys:
        design = _design(valley.params)
        leverage = np.diag(design @ np.linalg.pinv(design))
        fitted = valley.curve(valley.params)
        free = leverage < 1 - 1e-9  # a run that the parabola must pass through tells nothing of the noise
        pool.append(((valley.loss - fitted) / fitted)[free] / np.sqrt(1 - leverage[free]))
    residuals = np.concatenate(pool)
    return residuals - residuals.mean() if len(residuals) else residuals


def _power_law(
    log_c: Float[np.ndarray, " budgets"], log_y: Float[np.ndarray, "draws budgets"]
) -> Float[np.ndarray, "draws 2"]:
    """(log coefficient, exponent) of y ∝ C^exponent by least squares in logs; NaN budgets are left out."""
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
    *, params: Any, tokens: Any, loss: Any, flops: Any = None, bootstraps: int = 1000, seed: int = 0
) -> IsoflopFit:
    """Fit a parabola in log N to the losses of each budget, and power laws in C through the minima.

    N in parameters, D in tokens, L in nats per token, C in FLOPs (without `flops`: 6·N·D); budgets within 5
    % are one. A valley with fewer than three sizes, with its lowest loss at an edge, without a minimum or
    with the minimum outside its sizes is rejected and listed with the reason. D* is read off each budget's
    own line of log D over log N. Rows that no fit can use are dropped as in `table.clean`; row order does
    not matter.

    Raises `InputError` with the reasons where fewer than two budgets are accepted.
    """
    if bootstraps < 1:
        raise InputError(f"bootstraps={bootstraps} must be at least 1")
    table = _sorted(clean(params, tokens, loss, flops))
    budgets = 6 * table.params * table.tokens if table.flops is None else table.flops
    valleys = [
        _valley(float(np.exp(np.log(budgets[i]).mean())), table.params[i], table.tokens[i], table.loss[i])
        for i in group_budgets(budgets)
    ]
    optima = [valley.optimum for valley in valleys if valley.reason is None]
    if len(optima) < MINIMUM_BUDGETS:
        reasons = [f"{valley.flops:.3g} FLOPs: {valley.reason}" for valley in valleys if valley.reason is not None]
        shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
        raise InputError(
            f"{len(optima)} of {len(valleys)} budgets give a minimum and a power law needs {MINIMUM_BUDGETS}"
            + (f" ({shown})" if reasons else "")
        )
    log_c = np.log([optimum["flops"] for optimum in optima])
    laws = [_power_law(log_c, np.log([[o[name] for o in optima]]))[0] for name in ("params", "tokens")]
    return IsoflopFit(
        a=float(laws[0][1]),
        b=float(laws[1][1]),
        params_coefficient=float(np.exp(laws[0][0])),
        tokens_coefficient=float(np.exp(laws[1][0])),
        valleys=valleys,
        bootstraps=int(bootstraps),
        seed=int(seed),
        dropped=table.dropped,
    )


def _sorted(table: Table) -> Table:
    """By parameters, tokens and loss, so that nothing depends on the order of the rows."""
    order = np.lexsort((table.loss, table.tokens, table.params))
    flops = None if table.flops is None else table.flops[order]
    return Table(table.params[order], table.tokens[order], table.loss[order], flops, table.dropped)
