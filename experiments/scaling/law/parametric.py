"""Fit the parametric scaling law L(N, D) = E + A·N^−α + B·D^−β (Hoffmann et al. 2022, approach 3).

The objective is the *sum* over runs of Huber_δ(log L̂ − log L). Besiroglu et al. 2024 (arXiv 2404.10102)
showed why it matters to sum and to converge: averaged, the objective is so small that an optimiser's
default tolerance ends far from the minimum. Here every start runs until its gradient vanishes
(`huber.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.huber import best_of, log_law
from experiments.scaling.law.intervals import MINIMUM_DISTINCT, Intervals, intervals_of, percentile_interval
from experiments.scaling.law.outliers import ROUNDS, Outlier, screen_residuals
from experiments.scaling.law.problem import LARGEST_EXPONENT, NAMES, ParametricProblem
from experiments.scaling.rows.table import Table, clean
from experiments.scaling.rows.thin import SAMPLE, sample, samples
from experiments.words import counted
from model.errors import InputError, check_at_least_one, check_number

MINIMUM_ROWS = 6  # five unknowns and one degree of freedom


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal run at a budget: parameters, tokens and the law's loss in nats per token."""

    params: Any
    tokens: Any
    loss: Any


def law(theta: Float[np.ndarray, "*draws 5"], N: Any, D: Any) -> Any:
    """Return E + A·N^−α + B·D^−β for θ = (E, A, B, α, β); draws come first, then the shape of N and D."""
    N, D = np.broadcast_arrays(np.asarray(N, np.float64), np.asarray(D, np.float64))
    parts = np.moveaxis(np.asarray(theta), -1, 0)
    E, A, B, alpha, beta = (part.reshape(part.shape + (1,) * N.ndim) for part in parts)
    with np.errstate(all="ignore"):  # if a term of the law vanished, N or D at the optimum is 0, infinite or NaN
        return E + A * np.exp(-alpha * np.log(N)) + B * np.exp(-beta * np.log(D))


def optimum(theta: Float[np.ndarray, "*draws 5"], C: Any) -> tuple[Any, Any]:
    """Return N* and D* that minimise the law at C = 6·N·D FLOPs.

    N* = G·(C/6)^a and D* = (C/6)^b / G with G = (αA/βB)^(1/(α+β)) (Hoffmann et al. 2022, equation 4).
    """
    C = np.asarray(C, np.float64)
    parts = np.moveaxis(np.asarray(theta), -1, 0)
    _, A, B, alpha, beta = (part.reshape(part.shape + (1,) * C.ndim) for part in parts)
    with np.errstate(all="ignore"):  # a bootstrap draw may have lost its A or B term: its optimum is then inf or NaN
        log_g = (np.log(alpha * A) - np.log(beta * B)) / (alpha + beta)
        log_params = log_g + beta / (alpha + beta) * np.log(C / 6)
        return np.exp(log_params), C / 6 / np.exp(log_params)


@dataclass(frozen=True)
class ParametricFit:
    """A converged fit. N in parameters, D in tokens, losses in nats per token, C in FLOPs with C = 6·N·D."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float
    """Σ Huber_δ over runs of the natural-log residuals."""
    gradient: float
    """Largest entry of the gradient at the minimum, as a fraction of δ per run, the most there could be."""
    starts: int
    starts_at_best: int
    """Starts that ended within 1e-6 (relative) of the best objective; of a large table, on a sample of its rows."""
    delta: float
    bootstraps: int
    seed: int
    table: Table = field(repr=False)
    """The runs that entered, and those that did not (`.dropped`)."""
    _problem: ParametricProblem = field(repr=False)
    _scaled: Float[np.ndarray, "5"] = field(repr=False)
    outliers: list[Outlier] = field(default_factory=list, repr=False)
    """[{params, tokens, loss, reason}] of the runs that screening left out; empty unless it was requested."""
    screened: bool = False

    @property
    def a(self) -> float:
        """N* ∝ C^a with a = β/(α+β)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """D* ∝ C^b with b = α/(α+β)."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def thinned(self) -> str | None:
        """Return what was done with fewer rows than the table has, in words; None if nothing was."""
        rows = len(self.table)
        if rows <= SAMPLE:
            return None
        parts = counted(len(samples(rows, self.seed)), "separate sample")
        return (
            f"the law is fitted to all {rows:,} runs, from the best of {self.starts} starts on {SAMPLE:,} of them; its "
            f"intervals come from {parts} of {SAMPLE:,} runs, narrowed by √({SAMPLE:,}/{rows:,}): to fit the whole "
            f"table {counted(self.bootstraps, 'time')} over would take hours"
        )

    @property
    def theta(self) -> Float[np.ndarray, "5"]:
        """(E, A, B, alpha, beta)."""
        return np.array([self.E, self.A, self.B, self.alpha, self.beta])

    @property
    def residuals(self) -> Float[np.ndarray, " rows"]:
        """log L̂ − log L of the runs in `table`."""
        return np.log(self.predict(self.table.params, self.table.tokens)) - np.log(self.table.loss)

    @cached_property
    def draws(self) -> Float[np.ndarray, "bootstraps 5"]:
        """(E, A, B, alpha, beta) refitted to each bootstrap table; solved on first use."""
        return self._problem.bootstrap(self._scaled, self.bootstraps, self.seed, None)

    def bootstrap(self, advance: Callable[..., None]) -> None:
        """Solve the bootstrap now, calling `advance(number of draws)` as it goes (for a progress bar)."""
        if "draws" not in self.__dict__:
            draws = self._problem.bootstrap(self._scaled, self.bootstraps, self.seed, advance)
            self.__dict__["draws"] = draws  # where cached_property looks first

    @cached_property
    def intervals(self) -> Intervals:
        """`intervals["a"][95] -> (low, high)` for E, A, B, alpha, beta, a, b; percentiles of the bootstrap.

        Measured on 400 simulated ladders of six budgets with nine runs each (`known_laws.py`): the 95 % interval of
        alpha holds the truth in 96 %, of beta in 94 %, of a in 96 %; with three budgets of four runs each in 98 to
        99 %. On 350 of them basic intervals (the same percentiles, mirrored at the estimate) hold it in 92, 88, 90 %.
        """
        draws = dict(zip(NAMES, self.draws.T, strict=True))
        with np.errstate(invalid="ignore"):
            draws["a"] = draws["beta"] / (draws["alpha"] + draws["beta"])
            draws["b"] = draws["alpha"] / (draws["alpha"] + draws["beta"])
        return intervals_of(draws)

    def predict(self, N: Any, D: Any) -> Any:
        """Return the loss in nats per token at N parameters and D tokens; arrays broadcast."""
        return law(self.theta, N, D)[()]

    def predict_interval(self, N: Any, D: Any, level: int | float = 95) -> tuple[Any, Any]:
        """Return the `level` % prediction interval of the measured loss of one *new* run at (N, D).

        It combines the two uncertainties that can be estimated from the table: the law's own (each bootstrap draw's
        prediction) and the scatter of single runs about it (the residuals of the best fit, resampled; widened by
        √(n/(n−5)) as five fitted numbers make residuals too small). It covers neither a wrong form of law beyond the
        ladder nor a run trained with another recipe.
        """
        residuals = self.residuals
        count = len(residuals)
        # At most 200 evenly spaced quantiles stand for the residuals, so that draws × residuals stays small
        # and the convolution of the two distributions is exact rather than sampled.
        scatter = np.quantile(-residuals, (np.arange(min(count, 200)) + 0.5) / min(count, 200))
        factors = np.exp(scatter * np.sqrt(count / (count - len(NAMES))))
        N, D = np.broadcast_arrays(np.asarray(N, np.float64), np.asarray(D, np.float64))
        bounds = [
            percentile_interval((law(self.draws, n, d)[:, None] * factors).ravel(), level)
            for n, d in zip(N.ravel(), D.ravel(), strict=True)
        ]
        low, high = (
            np.array(bounds).reshape(*N.shape, 2)[..., 0],
            np.array(bounds).reshape(*N.shape, 2)[..., 1],
        )
        return low[()], high[()]

    def optimal(self, C: Any) -> Optimum:
        """Return the compute-optimal N*, D* and loss at C = 6·N·D FLOPs, in closed form; arrays broadcast."""
        params, tokens = optimum(self.theta, C)
        return Optimum(params[()], tokens[()], self.predict(params, tokens))

    def optimal_interval(self, C: Any, level: int | float = 95) -> dict[str, tuple[Any, Any]]:
        """Return `{"params": (low, high), "tokens": (low, high)}` of the optimum at C, by percentile bootstrap."""
        params, tokens = optimum(self.draws, C)
        return {"params": percentile_interval(params, level), "tokens": percentile_interval(tokens, level)}


def fit_parametric(
    params: Any,
    tokens: Any,
    loss: Any,
    *,
    delta: float | int = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    screen: bool = False,
) -> ParametricFit:
    """Fit L(N, D) = E + A·N^−α + B·D^−β to runs: N in parameters, D in tokens, L in nats per token.

    Minimises the sum of Huber_delta over natural-log residuals from 49 starts, each to a vanishing
    gradient, and keeps the best. The result depends neither on the order of the rows nor on exact
    duplicates (they are dropped, as are non-finite and non-positive rows; see `.table.dropped`).
    `bootstraps` and `seed` govern the intervals, which are computed when first requested. E = 0 is allowed.

    Every usable run is fitted: Huber's loss bounds the influence of a wrong one. With `screen`, runs that the noise of
    the table does not explain are left out and listed (`.outliers`). They are found by the residuals of the robust fit
    (`outliers.screen_residuals`); the law is fitted without them and all runs are screened again until the selection no
    longer changes, so that it does not depend on the first fit, which the outliers biased. If the remaining runs cannot
    be fitted, none is left out.

    Raises `InputError`, with the reason, if the table cannot determine the five unknowns.
    """
    check_settings(delta, bootstraps)
    table = clean(params, tokens, loss)
    order = np.lexsort((table.loss, table.tokens, table.params))
    table = Table(table.params[order], table.tokens[order], table.loss[order], None, table.dropped)
    whole = _fit(table, delta, bootstraps, seed)
    return _screened(whole) if screen else whole


def _fit(table: Table, delta: float | int, bootstraps: int, seed: int) -> ParametricFit:
    """Return the fit of every run of a clean, sorted table."""
    _check(table)
    problem = ParametricProblem.of(table, float(delta))
    chosen_from = problem.of_rows(sample(len(table), SAMPLE, seed))
    starts = chosen_from.starts()
    theta, objective, gradient = chosen_from.minimise(starts)
    chosen, at_best = best_of(objective, gradient, len(chosen_from.x), delta)
    if len(chosen_from.x) < len(table):
        theta, objective, gradient = problem.minimise(theta[chosen][None])
        chosen = 0
    best = theta[chosen]
    E, A, B, alpha, beta = (float(value) for value in problem.natural(best[None])[0])
    _check_terms(problem, best, alpha, beta)
    return ParametricFit(
        E=E,
        A=A,
        B=B,
        alpha=alpha,
        beta=beta,
        objective=float(objective[chosen]),
        gradient=float(gradient[chosen]),
        starts=len(starts),
        starts_at_best=at_best,
        delta=float(delta),
        bootstraps=int(bootstraps),
        seed=int(seed),
        table=table,
        _problem=problem,
        _scaled=best,
    )


def _screened(whole: ParametricFit) -> ParametricFit:
    """Return the fit without gross outliers, as `fit_parametric` says."""
    fit, table = whole, whole.table
    keep, residuals = np.ones(len(table), bool), whole.residuals
    for _ in range(ROUNDS):
        again = screen_residuals(residuals, keep, len(NAMES))
        if np.array_equal(again, keep):
            break
        keep = again
        rest = Table(table.params[keep], table.tokens[keep], table.loss[keep], None, table.dropped)
        try:
            fit = _fit(rest, whole.delta, whole.bootstraps, whole.seed)
        except InputError:
            return replace(whole, screened=True)
        residuals = np.log(fit.predict(table.params, table.tokens)) - np.log(table.loss)
    outliers = [
        Outlier(
            params=float(table.params[i]),
            tokens=float(table.tokens[i]),
            loss=float(table.loss[i]),
            reason=f"gross outlier: {100 * np.expm1(-residuals[i]):+.1f} % off the law, far beyond the noise",
        )
        for i in np.flatnonzero(~keep)
    ]
    return replace(fit, outliers=outliers, screened=True)


def check_settings(delta: float | int, bootstraps: int) -> None:
    """Refuse settings that no table could make sense of."""
    check_number("delta", delta, above=0, hint="Hoffmann et al. use 1e-3")
    check_at_least_one(bootstraps=bootstraps)


def _check(table: Table) -> None:
    """Raise InputError for a table that cannot determine five unknowns."""
    if len(table) < MINIMUM_ROWS:
        dropped = f" ({len(table.dropped)} dropped)" if table.dropped else ""
        raise InputError(
            f"{counted(len(table), 'usable run')}{dropped} cannot determine the five unknowns of E + A·N^−α + B·D^−β; "
            f"at least {MINIMUM_ROWS} are needed"
        )
    for name, values in (("model size", table.params), ("token count", table.tokens)):
        distinct = len(np.unique(values))
        if distinct < MINIMUM_DISTINCT:
            raise InputError(
                f"only {counted(distinct, f'different {name}')}; a power law with a floor needs "
                f"{MINIMUM_DISTINCT} or more"
            )
    if np.ptp(np.log(table.loss)) < 1e-12:
        raise InputError("every run has the same loss; there is no law to fit")
    log_n, log_d = np.log(table.params), np.log(table.tokens)
    points = np.stack([log_n - log_n.mean(), log_d - log_d.mean()], axis=1)
    width, length = sorted(np.linalg.svd(points, compute_uv=False))
    if width < 0.01 * length:
        raise InputError(
            "all runs are on one line in (log N, log D), as at a fixed D/N or a single budget; N and D cannot "
            "be distinguished, so vary them independently"
        )


def _check_terms(problem: ParametricProblem, theta: np.ndarray, alpha: float, beta: float) -> None:
    """Raise InputError for a fit in which the term of N or D vanishes: its exponent would be noise."""
    _, (_, share_n, share_d) = log_law(theta[None], problem.x, problem.y)
    for letter, name, exponent, share in (("N", "alpha", alpha, share_n), ("D", "beta", beta, share_d)):
        if exponent < 1e-6 or share.max() < 1e-6:
            raise InputError(
                f"the loss does not fall with {letter} in these runs ({name}={exponent:.2g}, its term is at "
                f"most {share.max():.1e} of the loss); the law cannot be fitted"
            )
        if exponent > LARGEST_EXPONENT * (1 - 1e-9):
            raise InputError(
                f"{name} runs away beyond {LARGEST_EXPONENT:g}: these runs follow no power law in {letter}"
            )
