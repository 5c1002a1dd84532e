"""Fit valleys by a smoothing spline in log N: no shape is assumed, and noise makes no spurious minima.

The spline minimises Σ (f(u_i) − loss_i)² + λ·∫ f'''(u)² du, so that λ → ∞ is the parabola and λ → 0 interpolates (Wahba
1990, "Spline Models for Observational Data", chapter 1, with m = 3: a quintic spline whose penalty spares parabolas).
One λ serves all budgets, chosen by generalised cross-validation over all of their runs: it could not be chosen from
five runs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

SMOOTHINGS = np.geomspace(1e-4, 1e6, 41)  # in units of u⁻⁵, per run
GRID_POINTS = 201
SAME_SCORE = 4.0


@dataclass(frozen=True)
class Spline:
    """The family at one smoothing λ (log-N units: u = ln N)."""

    smoothing: float
    name: str = "spline"

    def operator(self, u: Float[np.ndarray, " runs"], at: Float[np.ndarray, " at"]) -> Float[np.ndarray, "at runs"]:
        """Return the spline at `at` is this matrix times the losses (Wahba 1990, equations 1.3.16 to 1.3.18)."""
        origin = u.min()
        # Below the leftmost run the kernel's remainder vanishes and the curve goes on as a parabola.
        gram = _kernel(u - origin, u - origin) + self.smoothing * np.eye(len(u))
        polynomial = np.vander(u, 3)
        solved, solved_polynomial = np.linalg.inv(gram), np.linalg.solve(gram, polynomial)
        slope = np.linalg.solve(polynomial.T @ solved_polynomial, solved_polynomial.T)
        bend = solved - solved_polynomial @ slope
        return np.vander(at, 3) @ slope + _kernel(np.maximum(at - origin, 0), u - origin) @ bend

    def minimum(self, u: Float[np.ndarray, " runs"], loss: Float[np.ndarray, "*draws runs"]) -> tuple[Any, Any, Any]:
        """Return the lowest of 201 points between the runs, refined by the parabola through its neighbours."""
        at = np.linspace(u.min(), u.max(), GRID_POINTS)
        step = at[1] - at[0]
        curve = loss @ self.operator(u, at).T
        lowest = curve.argmin(-1)
        inside = (lowest > 0) & (lowest < GRID_POINTS - 1)
        middle = np.clip(lowest, 1, GRID_POINTS - 2)
        left, centre, right = (
            np.take_along_axis(curve, np.asarray(middle + shift)[..., None], -1)[..., 0] for shift in (-1, 0, 1)
        )
        second = left - 2 * centre + right
        with np.errstate(divide="ignore", invalid="ignore"):
            offset = 0.5 * (left - right) / second
        vertex = np.where(inside, at[middle] + step * offset, at[lowest])
        return (
            vertex,
            np.where(inside, centre - 0.125 * (left - right) ** 2 / second, curve.min(-1)),
            second / step**2 / 2,
        )


def _kernel(s: np.ndarray, t: np.ndarray) -> Float[np.ndarray, "s t"]:
    """Return ∫ (s − w)₊² (t − w)₊² / 4 dw from 0, the reproducing kernel of functions by their third derivative."""
    low, high = np.minimum(s[:, None], t[None]), np.maximum(s[:, None], t[None])
    gap = high - low
    return low**3 * (gap**2 / 3 + gap * low / 2 + low**2 / 5) / 4


def choose_smoothing(us: list[Float[np.ndarray, " _runs"]], losses: list[Float[np.ndarray, " _runs"]]) -> float:
    """Return the largest λ that generalised cross-validation over all budgets (Wahba 1990, 4.3.1) cannot tell from the
    best.

    The score is n·ln(RSS / (n − freedom)²), with n the runs that parabolas leave over: a bend must gain 4, which
    one coefficient more does by chance once in twenty times. Freedom counts 1.4 times, the usual guard against the
    interpolation that the score is prone to on few runs (Kim & Gu 2004, Journal of the Royal Statistical Society B 66).
    """
    count = sum(map(len, us)) - 3 * len(us)
    left, freedom = np.zeros(len(SMOOTHINGS)), np.zeros(len(SMOOTHINGS))
    for u, loss in zip(us, losses, strict=True):
        operators = _smoothers(u, SMOOTHINGS)
        left += (((operators @ loss - loss) / loss.mean()) ** 2).sum(-1)
        freedom += np.trace(operators, axis1=1, axis2=2) - 3
    free = count - 1.4 * freedom
    if count == 0:  # three runs each: every λ is the parabola through them
        return float(SMOOTHINGS[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(free > 0, count * np.log(left / free**2), np.inf)
    return float(SMOOTHINGS[np.flatnonzero(score <= score.min() + SAME_SCORE)[-1]])


def _smoothers(
    u: Float[np.ndarray, " runs"], smoothings: Float[np.ndarray, " smoothings"]
) -> Float[np.ndarray, "smoothings runs runs"]:
    """Return `Spline(smoothing).operator(u, u)` of many smoothings at once.

    With Q the directions that no parabola takes, the spline leaves λ·Q·(Qᵀ·G·Q + λ)⁻¹·Qᵀ of the losses (Wahba 1990,
    section 1.3), which one eigendecomposition gives for every λ.
    """
    origin = u.min()
    free = np.linalg.qr(np.vander(u, 3), mode="complete")[0][:, 3:]
    sizes, turned = np.linalg.eigh(free.T @ _kernel(u - origin, u - origin) @ free)
    directions = free @ turned
    shares = smoothings[:, None] / (np.maximum(sizes, 0) + smoothings[:, None])
    return np.eye(len(u)) - (directions * shares[:, None]) @ directions.T
