"""Fit any form of law to a table of runs, with the same objective, solver and bootstrap for all.

The objective is that of the parametric fit, Σ Huber_δ over natural-log residuals; every start is optimised until its
gradient vanishes, and the best minimum is kept. Bootstrap draws are of runs, as counts, all solved in one batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.forms.form import LARGEST_RATE, Features, LawForm, SolverScale, features_of
from experiments.scaling.forms.registry import get
from experiments.scaling.forms.rows import UsableRuns, frontier, reason_against, resample, usable
from experiments.scaling.forms.terms import evaluate
from experiments.scaling.law.huber import MAX_ITERATIONS, Minimum, best_of, newton
from experiments.scaling.law.intervals import Intervals, exponential, intervals_of
from experiments.scaling.law.parametric import check_settings
from experiments.scaling.rows.table import Table
from model.errors import InputError

_BLOCK_ELEMENTS = 10_000  # rows × problems per batch: the fastest of 3k, 10k and 40k


@dataclass(frozen=True)
class FormProblem:
    """A form of law and the runs that it is fitted to, in the solver's coordinates."""

    form: LawForm
    features: Features
    log_loss: Float[np.ndarray, " rows"]
    scale: SolverScale
    delta: float

    @classmethod
    def of(cls, form: LawForm, columns: Mapping[str, np.ndarray], delta: float) -> "FormProblem":
        """Return the problem of these columns, the loss among them."""
        features, log_loss = features_of(columns), np.log(columns["loss"])
        return cls(form, features, log_loss, form.scale(features, log_loss), delta)

    @cached_property
    def grid(self) -> Float[np.ndarray, "starts unknowns"]:
        """The form's starts at this table."""
        return self.form.starts(self.features, self.log_loss, self.scale)

    def minimise(
        self, theta: np.ndarray, weights: np.ndarray | None = None, *, max_iterations: int = MAX_ITERATIONS
    ) -> Minimum:
        """Return every problem's minimum from its own start; `weights` [problems, rows]: how often each run counts;
        None: once.
        """
        limits: dict[str, Any] = {"delta": self.delta, "max_iterations": max_iterations}
        lower, upper = self.form.bounds(self.scale)

        def derivatives(theta: np.ndarray, weights: np.ndarray):
            return evaluate(
                self.form.terms(theta, self.features, self.scale), theta, weights, self.log_loss, self.delta
            )

        rows = len(self.log_loss)
        block = max(1, _BLOCK_ELEMENTS // rows)
        parts = []
        for i in range(0, len(theta), block):
            start = theta[i : i + block]
            weight = np.ones((len(start), rows)) if weights is None else weights[i : i + block]
            parts.append(newton(derivatives, start, weight, lower=lower, upper=upper, **limits))
        return Minimum(*(np.concatenate([getattr(part, key) for part in parts]) for key in Minimum.__annotations__))

    def refit(
        self, best: np.ndarray, weights: Float[np.ndarray, "draws rows"], *, max_iterations: int = MAX_ITERATIONS
    ) -> np.ndarray:
        """Return scaled θ of every weighting: the lowest minimum from `best` and a few starts of the grid."""
        picks = np.linspace(0, len(self.grid) - 1, self.form.extra_starts + 2)[1:-1].astype(int)
        first = np.concatenate([best[None], self.grid[picks]])
        batch = np.tile(first, (len(weights), 1)), np.repeat(weights, len(first), axis=0)
        end = self.minimise(*batch, max_iterations=max_iterations)
        lowest = end.objective.reshape(len(weights), len(first)).argmin(1)
        return end.theta.reshape(len(weights), len(first), -1)[np.arange(len(weights)), lowest]

    def log_prediction(self, theta: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return log L̂ [problems, rows] of other runs at scaled θ."""
        return self.form.predict(theta, features_of(columns), self.scale)


@dataclass(frozen=True)
class FormFit:
    """A converged fit of one form. Columns in their own units, losses in nats per token."""

    form: LawForm
    values: dict[str, float]
    """Every unknown by name."""
    objective: float
    gradient: float
    """Largest entry of the gradient at the minimum, as a fraction of δ per run."""
    starts: int
    starts_at_best: int
    bootstraps: int
    seed: int
    rows: UsableRuns = field(repr=False)
    problem: FormProblem = field(repr=False)
    scaled: Float[np.ndarray, " unknowns"] = field(repr=False)

    @property
    def residuals(self) -> Float[np.ndarray, " rows"]:
        """log L̂ − log L of the runs fitted."""
        return self.problem.log_prediction(self.scaled[None], self.rows.columns)[0] - self.problem.log_loss

    @cached_property
    def draws(self) -> Float[np.ndarray, "draws unknowns"]:
        """The unknowns (order: `form.unknowns`) refitted to bootstrap tables; solved on first use."""
        rng = np.random.default_rng(self.seed)
        counts = resample(self.form, self.rows.columns, rng, self.bootstraps)
        return self.form.natural(self.problem.refit(self.scaled, counts), self.problem.scale)

    @cached_property
    def intervals(self) -> Intervals:
        """`intervals["alpha"][95] -> (low, high)` for every unknown; percentiles of the bootstrap."""
        return intervals_of(dict(zip(self.form.unknowns, self.draws.T, strict=True)))

    def predict(self, **columns: Any) -> Any:
        """Return the loss of runs given by the form's columns (`params=`, `tokens=` …); arrays broadcast."""
        if set(columns) != set(self.form.needs):
            raise InputError(f"{self.form.name} predicts from {', '.join(self.form.needs)}; got {', '.join(columns)}")
        arrays = np.broadcast_arrays(*(np.asarray(values, np.float64) for values in columns.values()))
        flat = {name: array.ravel() for name, array in zip(columns, arrays, strict=True)}
        return exponential(self.problem.log_prediction(self.scaled[None], flat))[0].reshape(arrays[0].shape)[()]

    def document(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; a bound that is not finite is null."""
        return {
            "form": self.form.name,
            "formula": self.form.formula,
            "source": self.form.source,
            "values": {name: _finite(value) for name, value in self.values.items()},
            "objective": self.objective,
            "gradient": self.gradient,
            "starts": self.starts,
            "starts_at_best": self.starts_at_best,
            "delta": self.problem.delta,
            "rows": len(self.rows),
            "bootstraps": self.bootstraps,
            "seed": self.seed,
            "intervals": {
                name: {f"{level:g}": [_finite(bound) for bound in pair] for level, pair in by.items()}
                for name, by in self.intervals.items()
            },
            "dropped": [row.to_dict() for row in self.rows.dropped],
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def fit_form(
    name: str,
    table: Table | Mapping[str, Any],
    *,
    delta: float | int = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
) -> FormFit:
    """Fit the form `name` to a `Table` or to columns by name (params, tokens, …, loss).

    A form of the frontier (L(C)) is fitted to the runs that no cheaper run beats, the others being listed as dropped.
    Among noisy runs of similar compute this selects low losses, which biases the law downward: prefer the optima of
    budgets (`fit_isoflop(...).optima`) if there are any.

    Raises `InputError`, with the reason, if the runs cannot determine the form's unknowns.
    """
    check_settings(delta, bootstraps)
    form = get(name)
    rows = usable(table, form.needs)
    return fit_rows(form, frontier(rows) if form.frontier else rows, delta=delta, bootstraps=bootstraps, seed=seed)


def fit_rows(form: LawForm, rows: UsableRuns, *, delta: float | int, bootstraps: int, seed: int) -> FormFit:
    """Fit rows as they are, in their order; raises as `fit_form` does."""
    if reason := reason_against(form, rows.columns):
        raise InputError(reason)
    problem = FormProblem.of(form, rows.columns, float(delta))
    end = problem.minimise(problem.grid)
    chosen, at_best = best_of(end.objective, end.gradient, len(rows), delta)
    best = end.theta[chosen]
    values = dict(zip(form.unknowns, map(float, form.natural(best[None], problem.scale)[0]), strict=True))
    for rate in form.rates:
        if rate not in form.signed and not 1e-6 < values[rate] < LARGEST_RATE * (1 - 1e-9):
            raise InputError(
                f"{form.name} cannot be fitted: {rate}={values[rate]:.2g}, so these runs follow no power law "
                f"with that exponent"
            )
    return FormFit(
        form=form,
        values=values,
        objective=float(end.objective[chosen]),
        gradient=float(end.gradient[chosen]),
        starts=len(problem.grid),
        starts_at_best=at_best,
        bootstraps=int(bootstraps),
        seed=int(seed),
        rows=rows,
        problem=problem,
        scaled=best,
    )
