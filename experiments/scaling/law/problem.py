"""Fit the parametric law to one table: starting points, the minimum, and the minima of resampled tables."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import nnls

from experiments.scaling.law.huber import minimise
from experiments.scaling.law.intervals import draw_counts, exponential
from experiments.scaling.rows.table import Table
from experiments.scaling.rows.thin import samples

START_EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
LARGEST_EXPONENT = 10.0
NAMES = ("E", "A", "B", "alpha", "beta")
_BLOCK_ELEMENTS = 60_000  # rows × problems per batch: the fastest between 15k and 240k


@dataclass(frozen=True)
class ParametricProblem:
    """The runs in the solver's coordinates: x and y are log N and log D, centred and of unit spread."""

    x: Float[np.ndarray, " rows"]
    y: Float[np.ndarray, " rows"]
    log_loss: Float[np.ndarray, " rows"]
    centre: tuple[float, float]
    spread: tuple[float, float]
    delta: float

    @classmethod
    def of(cls, table: Table, delta: float) -> "ParametricProblem":
        """Return the runs of a table, with N in parameters and D in tokens; delta: of Huber's loss."""
        log_n, log_d = np.log(table.params), np.log(table.tokens)
        centre, spread = (log_n.mean(), log_d.mean()), (log_n.std(), log_d.std())
        x, y = (log_n - centre[0]) / spread[0], (log_d - centre[1]) / spread[1]
        return cls(x, y, np.log(table.loss), centre, spread, delta)

    def of_rows(self, rows: Int[np.ndarray, " chosen"]) -> "ParametricProblem":
        """Return the same problem of fewer runs, in the same coordinates."""
        return replace(self, x=self.x[rows], y=self.y[rows], log_loss=self.log_loss[rows])

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The box for θ: a term may shrink to e^−30 of the smallest loss (E = 0), exponents are in [0, 10]."""
        floor, ceiling = self.log_loss.min() - 30, self.log_loss.max() + 30
        steepest = [LARGEST_EXPONENT * spread for spread in self.spread]
        return np.array([floor] * 3 + [0, 0]), np.array([ceiling] * 3 + steepest)

    def starts(self) -> Float[np.ndarray, "starts 5"]:
        """Return a grid over (α, β); E, A and B, in which the law is linear, start at their least-squares values.

        Relative errors are small, so that least squares on L̂/L − 1 approximates least squares on log L̂ − log L.
        """
        weight = np.exp(-self.log_loss)[:, None]
        thetas = []
        for alpha in START_EXPONENTS:
            for beta in START_EXPONENTS:
                rates = alpha * self.spread[0], beta * self.spread[1]
                terms = [np.ones_like(self.x), np.exp(-rates[0] * self.x), np.exp(-rates[1] * self.y)]
                linear, _ = nnls(np.stack(terms, 1) * weight, np.ones(len(self.x)))
                # A term that least squares sets to zero starts small instead: its logarithm could not leave −∞.
                thetas.append([*np.log(np.maximum(linear, 1e-3 * np.exp(self.log_loss.min()))), *rates])
        return np.array(thetas)

    def minimise(self, theta: np.ndarray, weights: np.ndarray | None = None):
        """Return (θ, objective, gradient) of every problem's minimum; without weights every run counts once."""
        lower, upper = self.bounds
        rows = len(self.x)
        block = max(1, _BLOCK_ELEMENTS // rows)
        parts = []
        for i in range(0, len(theta), block):
            weight = np.ones((1, rows)) if weights is None else weights[i : i + block]
            parts.append(
                minimise(
                    theta[i : i + block],
                    weight,
                    self.x,
                    self.y,
                    self.log_loss,
                    delta=self.delta,
                    lower=lower,
                    upper=upper,
                )
            )
        return tuple(np.concatenate([getattr(p, key) for p in parts]) for key in ("theta", "objective", "gradient"))

    def natural(self, theta: Float[np.ndarray, "problems 5"]) -> Float[np.ndarray, "problems 5"]:
        """Return (E, A, B, α, β) in the units of N, D and L. A floor at its lower bound is returned as E = 0."""
        alpha, beta = theta[:, 3] / self.spread[0], theta[:, 4] / self.spread[1]
        E = np.where(theta[:, 0] <= self.bounds[0][0] + 1.0, 0.0, np.exp(theta[:, 0]))
        A = exponential(theta[:, 1] + alpha * self.centre[0])
        B = exponential(theta[:, 2] + beta * self.centre[1])
        return np.stack([E, A, B, alpha, beta], axis=1)

    def bootstrap(
        self, best: np.ndarray, count: int, seed: int, advance: Callable[..., None] | None
    ) -> Float[np.ndarray, "draws 5"]:
        """Refit `count` tables of runs drawn with replacement.

        A draw is a vector of counts, so all draws share one set of rows. Draws that cannot determine a fit (fewer than
        five different runs, or three different N or D) are drawn again. Every draw starts from the best fit and from
        the middle of the starting grid; the lower minimum is kept. (Measured: on tables of 25 and 240 runs the best of
        six far-apart starts was lower in fewer than 1 draw in 200.)

        For more than SAMPLE rows the draws come from disjoint samples of SAMPLE rows each, equally many from each: the
        distance between a draw's fit and its own sample's fit, times √(sample / rows), approximates the distance
        between a draw of all rows and the fit to all rows (errors shrink with the square root of the rows).
        """
        rows = len(self.x)
        parts = samples(rows, seed)
        shares = [count * (i + 1) // len(parts) - count * i // len(parts) for i in range(len(parts))]
        rng = np.random.default_rng(seed)
        if len(parts) == 1 and len(parts[0]) == rows:
            return self.natural(self._draws(best, count, rng, advance))
        draws = []
        for part, share in zip(parts, shares, strict=True):
            if share:
                problem = self.of_rows(part)
                centre = problem.minimise(best[None])[0]
                draws.append((problem._draws(centre[0], share, rng, advance) - centre) * np.sqrt(len(part) / rows))
        lower, upper = self.bounds
        return self.natural(np.clip(best + np.concatenate(draws), lower, upper))

    def _draws(
        self, best: np.ndarray, count: int, rng: np.random.Generator, advance: Callable[..., None] | None
    ) -> Float[np.ndarray, "draws 5"]:
        """Return the fitted θ, in scaled units, of `count` tables that are drawn with replacement from these rows."""
        weights = draw_counts((self.x, self.y), len(NAMES), rng, count)
        grid = self.starts()
        starts = np.stack([best, grid[len(grid) // 2]])
        block = max(1, _BLOCK_ELEMENTS // len(self.x) // len(starts))
        draws = []
        for i in range(0, count, block):
            part = weights[i : i + block]
            # Problem k · len(starts) + s is draw k from start s.
            theta, objective, _ = self.minimise(np.tile(starts, (len(part), 1)), np.repeat(part, len(starts), axis=0))
            best_start = objective.reshape(len(part), len(starts)).argmin(1)
            theta_by_start = theta.reshape(len(part), len(starts), 5)
            draws.append(theta_by_start[np.arange(len(part)), best_start])
            if advance is not None:
                advance(len(part))
        return np.concatenate(draws)
