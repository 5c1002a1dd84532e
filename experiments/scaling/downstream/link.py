"""Fit links: accuracy as a logistic function of the bits per byte of the gold answer.

A link is floor + (ceiling − floor)·σ(s − k·x), x being the bits per byte or their logarithm, centred and of unit
spread. By default the floor is chance and the ceiling is the task's. Few ladders determine which of the variants holds,
and they differ most where a prediction extrapolates, so that all of `LINKS` are fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.huber import Derivatives, huber, newton

DELTA = 0.01  # accuracy from where Huber's loss is linear: one point, about the noise of a benchmark's last checkpoints
LEAST_SHARE = 0.2  # of the way from chance to the task's ceiling that a free ceiling is at least
FLOOR_FREEDOM = 0.05  # accuracy by which a free floor may differ from chance
_START_SLOPES = (0.5, 1.0, 2.0)
_START_SHARES = (1.0, 0.8, 0.6)
_ITERATIONS = 40


@dataclass(frozen=True)
class Link:
    """One variant of the link."""

    name: str
    logarithmic: bool = False
    """Whether x is the logarithm of the bits per byte."""
    free_ceiling: bool = False
    free_floor: bool = False
    """Models that know nothing may score a little below chance: lengths of answers are no random guess."""

    @property
    def unknowns(self) -> int:
        """The number of unknowns: slope and middle, and a free floor or ceiling."""
        return 2 + self.free_ceiling + self.free_floor


LINKS = tuple(
    Link(f"{name}{of}", logarithmic, free_ceiling, free_floor)
    for logarithmic, of in ((False, ""), (True, " of the logarithm"))
    for name, free_ceiling, free_floor in (
        ("logistic", False, False),
        ("logistic with a free ceiling", True, False),
        ("logistic with a free floor", False, True),
    )
)


@dataclass(frozen=True)
class LinkFit:
    """A link fitted to a batch of weightings of the same runs."""

    link: Link
    centre: float
    spread: float
    theta: Float[np.ndarray, "problems 4"] = field(repr=False)
    """Ceiling, s, k and floor of every problem."""

    @property
    def first(self) -> "LinkFit":
        """The fit of the first problem alone."""
        return replace(self, theta=self.theta[:1])

    def predict(self, bits_per_byte: Float[np.ndarray, "problems points"]) -> Float[np.ndarray, "problems points"]:
        """Return the accuracy of every problem at its own bits per byte."""
        x = ((np.log(bits_per_byte) if self.link.logarithmic else bits_per_byte) - self.centre) / self.spread
        top, shift, slope, floor = (self.theta[:, i : i + 1] for i in range(4))
        return floor + (top - floor) * _sigmoid(shift - slope * x)


def fit_link(
    link: Link,
    bits_per_byte: Float[np.ndarray, " runs"],
    accuracy: Float[np.ndarray, " runs"],
    weights: Float[np.ndarray, "problems runs"],
    *,
    chance: float,
    ceiling: float = 1.0,
) -> LinkFit:
    """Minimise Σ_i w_i·Huber(link(x_i) − accuracy_i) of every weighting.

    The runs counted once are fitted from several starts, each weighting from that fit and from the middle start.
    """
    x = np.log(bits_per_byte) if link.logarithmic else bits_per_byte
    centre, spread = float(x.mean()), float(x.std()) or 1.0
    x = (x - centre) / spread
    height = ceiling - chance
    freedom = FLOOR_FREEDOM if link.free_floor else 0.0
    least = chance + LEAST_SHARE * height if link.free_ceiling else ceiling
    lower = np.array([least, -20.0, 1e-3, max(chance - freedom, 0.0)])
    upper = np.array([ceiling, 20.0, 10.0, chance + freedom])
    starts = _starts(link, x, accuracy, chance, height)

    def derivatives(theta: np.ndarray, weights: np.ndarray) -> Derivatives:
        return _evaluate(theta, weights, x, accuracy)

    bounds: dict[str, Any] = {"delta": DELTA, "lower": lower, "upper": upper, "max_iterations": _ITERATIONS}
    once = newton(derivatives, starts, np.ones((len(starts), len(x))), **bounds)
    first = np.stack([once.theta[once.objective.argmin()], starts[len(starts) // 2]])
    end = newton(derivatives, np.tile(first, (len(weights), 1)), np.repeat(weights, len(first), axis=0), **bounds)
    best = end.objective.reshape(len(weights), -1).argmin(1)
    theta = end.theta.reshape(len(weights), len(first), 4)[np.arange(len(weights)), best]
    return LinkFit(link, centre, spread, theta)


def _starts(link: Link, x: np.ndarray, accuracy: np.ndarray, chance: float, height: float) -> np.ndarray:
    found: list[Sequence[float]] = []
    for share in _START_SHARES if link.free_ceiling else _START_SHARES[:1]:
        for slope in _START_SLOPES:
            risen = np.clip((accuracy - chance) / (share * height), 0.01, 0.97)
            shift = float(np.median(np.log(risen / (1 - risen)) + slope * x))
            found.append((chance + share * height, shift, slope, chance))
    return np.array(found)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * z))


def _evaluate(theta: np.ndarray, weights: np.ndarray, x: np.ndarray, accuracy: np.ndarray) -> Derivatives:
    """Return the objective of every problem, its gradient and its exact Hessian."""
    top, shift, slope, floor = (theta[:, i : i + 1] for i in range(4))
    risen = _sigmoid(shift - slope * x)
    first = risen * (1 - risen)
    along = (top - floor) * first
    second = along * (1 - 2 * risen)
    residual = floor + (top - floor) * risen - accuracy
    objective = (weights * huber(residual, DELTA)).sum(1)
    pull = weights * np.clip(residual, -DELTA, DELTA)
    jacobian = np.stack([risen, along, -x * along, 1 - risen], axis=1)
    gradient = np.matmul(jacobian, pull[:, :, None])[:, :, 0]
    inside = weights * (np.abs(residual) <= DELTA)
    hessian = np.matmul(jacobian * inside[:, None], jacobian.transpose(0, 2, 1))
    for i, j, curvature in (
        (0, 1, first),
        (0, 2, -x * first),
        (1, 1, second),
        (1, 2, -x * second),
        (2, 2, x * x * second),
        (3, 1, -first),
        (3, 2, x * first),
    ):
        added = (pull * curvature).sum(1)
        hessian[:, i, j] += added
        if i != j:
            hessian[:, j, i] += added
    return objective, gradient, hessian
