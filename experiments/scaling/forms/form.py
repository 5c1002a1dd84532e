"""Define forms of scaling laws: formula, columns, unknowns and terms.

A form is a sum of terms, each the exponential of log(coefficient) − Σ rate·feature, a feature being the logarithm of a
column or a product of two. The solver works on scaled unknowns: features are centred on the table's mean, rates are
multiplied by the features' spread; `natural` undoes both.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from experiments.scaling.forms.terms import Terms, log_prediction
from experiments.scaling.law.intervals import exponential

START_RATES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
LARGEST_RATE = 10.0
FADED = 30.0  # a term may shrink to e^−30 of the smallest loss: a floor there counts as E = 0

Columns = Mapping[str, np.ndarray]
Features = dict[str, np.ndarray]


def features_of(columns: Columns) -> Features:
    """Return ln N, ln D … of the columns present.

    With a column of active parameters N counts those, and G is the ratio total/active.
    """
    logs = {name: np.log(values) for name, values in columns.items()}
    found = {}
    if "params" in logs:
        found["N"] = logs["params"]
    if "tokens" in logs:
        found["D"] = logs["tokens"]
    if "flops" in logs:
        found["C"] = logs["flops"]
    if "unique_tokens" in logs:
        found["U"] = np.minimum(logs["unique_tokens"], found["D"])
    if "active_params" in logs:
        found["N"], found["G"] = logs["active_params"], logs["params"] - logs["active_params"]
        found["NG"], found["DG"] = found["N"] * found["G"], found["D"] * found["G"]
    return found


@dataclass(frozen=True)
class SolverScale:
    """The solver's coordinates: the features' centres, the rates' units, the range of log losses."""

    centre: dict[str, float]
    unit: dict[str, float]
    lowest: float
    highest: float


@dataclass(frozen=True)
class LawForm:
    """One form of law. `parts` lists, per term, its coefficient and the feature that each of its rates multiplies."""

    name: str
    formula: str
    source: str
    needs: tuple[str, ...]
    """Columns, besides the loss."""
    parts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    signed: tuple[str, ...] = ()
    """Rates that may have either sign; the others are positive."""
    frontier: bool = False
    """A law of the best runs of each budget only."""
    extra_starts: int = 1
    """Starts of a bootstrap draw, besides the best fit to the table."""
    rates: tuple[str, ...] = field(init=False)
    coefficients: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "coefficients", tuple(name for name, _ in self.parts))
        rates = dict.fromkeys(rate for _, powers in self.parts for rate, _ in powers)
        object.__setattr__(self, "rates", tuple(rates))

    @property
    def unknowns(self) -> tuple[str, ...]:
        """Coefficients, then rates: the order of θ."""
        return self.coefficients + self.rates

    def scale(self, features: Features, log_loss: np.ndarray) -> SolverScale:
        """Return the coordinates in which this table's problem is well conditioned."""
        unit: dict[str, float] = {}
        for _, powers in self.parts:
            for rate, feature in powers:
                unit[rate] = max(unit.get(rate, 1e-9), float(features[feature].std()))
        centre = {name: float(values.mean()) for name, values in features.items()}
        return SolverScale(centre, unit, float(log_loss.min()), float(log_loss.max()))

    def terms(self, theta: Float[np.ndarray, "problems unknowns"], features: Features, scale: SolverScale) -> Terms:
        """Return the law's terms at scaled θ; their Jacobians do not depend on θ."""
        rows = len(next(iter(features.values())))
        jacobians = []
        for i, (_, powers) in enumerate(self.parts):
            jacobian = np.zeros((len(self.unknowns), rows))
            jacobian[i] = 1.0
            for rate, feature in powers:
                jacobian[self.unknowns.index(rate)] -= (features[feature] - scale.centre[feature]) / scale.unit[rate]
            jacobians.append(jacobian[None])
        return Terms([theta @ jacobian[0] for jacobian in jacobians], jacobians)

    def bounds(self, scale: SolverScale) -> tuple[np.ndarray, np.ndarray]:
        """Return the box of scaled θ: terms may vanish, rates are in [0, 10] or [−10, 10]."""
        span = [LARGEST_RATE * scale.unit[rate] for rate in self.rates]
        lower = [-most if rate in self.signed else 0.0 for rate, most in zip(self.rates, span, strict=True)]
        count = len(self.coefficients)
        return np.array([scale.lowest - FADED] * count + lower), np.array([scale.highest + FADED] * count + span)

    def natural(self, theta: Float[np.ndarray, "problems unknowns"], scale: SolverScale) -> np.ndarray:
        """Return θ in the units of the columns, [problems, unknowns]; a floor at its lower bound is returned as 0."""
        values = np.array(theta)
        for k, rate in enumerate(self.rates, start=len(self.coefficients)):
            values[:, k] /= scale.unit[rate]
        for i, (_, powers) in enumerate(self.parts):
            shift = sum(values[:, self.unknowns.index(rate)] * scale.centre[feature] for rate, feature in powers)
            values[:, i] = exponential(theta[:, i] + shift)
            if not powers:
                values[theta[:, i] <= scale.lowest - FADED + 1, i] = 0.0
        return values

    def starts(self, features: Features, log_loss: np.ndarray, scale: SolverScale) -> np.ndarray:
        """Return a grid over the positive rates; the coefficients follow from linear least squares on L̂/L."""
        grid = itertools.product(*([0.0] if rate in self.signed else START_RATES for rate in self.rates))
        units = np.array([scale.unit[rate] for rate in self.rates])
        return self.with_coefficients(np.array(list(grid)) * units, features, log_loss, scale)

    def with_coefficients(
        self, rates: np.ndarray, features: Features, log_loss: np.ndarray, scale: SolverScale
    ) -> Float[np.ndarray, "starts unknowns"]:
        """Return starts at the given scaled rates, with coefficients from least squares."""
        count = len(self.coefficients)
        theta = np.concatenate([np.zeros((len(rates), count)), rates], axis=1)
        basis = np.exp(np.stack(self.terms(theta, features, scale).values, axis=2) - log_loss[:, None])
        for start, matrix in zip(theta, basis, strict=True):
            linear, _ = nnls(matrix, np.ones(len(log_loss)))
            # A term that least squares sets to zero starts small instead: its logarithm could not leave −∞.
            start[:count] = np.log(np.maximum(linear, 1e-3 * np.exp(scale.lowest)))
        return theta

    def predict(self, theta: np.ndarray, features: Features, scale: SolverScale) -> Float[np.ndarray, "problems rows"]:
        """Return log L̂ at scaled θ."""
        return log_prediction(self.terms(theta, features, scale), theta)
