"""Fit one skew for all valleys: how much steeper their right walls are than their left ones.

In a window off the minimum a valley's cubic term matters, and a parabola's vertex moves towards the gentler wall. Where
the windows drift with the budget, so does the bias, and the exponents with it. A cubic per budget would cost a degree
of freedom each; the usual laws give all valleys one skew (`valley.Convex`), which costs one in total.
"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar

from experiments.scaling.valleys.valley import bent_bases, bent_minimum
from experiments.words import counted, is_or_are
from model.errors import InputError

LARGEST_SKEW = 1.5  # |β − α|; published exponents are below 1
GRID = np.linspace(-LARGEST_SKEW, LARGEST_SKEW, 301)


def _unexplained(us: list[np.ndarray], losses: list[np.ndarray], skews: np.ndarray) -> np.ndarray:
    """Return the sum of squares that the curves of each skew leave, [skews, draws]."""
    left = np.zeros(())
    for u, loss in zip(us, losses, strict=True):
        q, _ = np.linalg.qr(bent_bases(u, skews))
        centred = loss - loss.mean(-1, keepdims=True)  # the basis contains the constants; centring avoids cancellation
        left = left + (centred**2).sum(-1) - (np.matmul(centred, q) ** 2).sum(-1)
    return left


def common_skews(
    us: list[Float[np.ndarray, " _runs"]], losses: list[Float[np.ndarray, "draws _runs"]]
) -> Float[np.ndarray, " draws"]:
    """Return the least-squares skew of each draw, to the nearest point of a grid of 0.01."""
    return GRID[_unexplained(us, losses, GRID).argmin(0)]


def common_skew(us: list[Float[np.ndarray, " _runs"]], losses: list[Float[np.ndarray, " _runs"]]) -> float:
    """Return the least-squares skew of all valleys.

    Raises `InputError` if no run is left to distinguish it from a parabola.
    """
    freedom = sum(len(np.unique(u)) - 3 for u in us)
    if freedom < 2:
        raise InputError(
            f"a common skew needs two runs more than the parabolas of {counted(len(us), 'budget')} use up and there "
            f"{is_or_are(freedom)} {freedom}; add sizes, or use method='parabola'"
        )
    curves = [loss[None] for loss in losses]
    start = float(common_skews(us, curves)[0])
    step = GRID[1] - GRID[0]
    found = minimize_scalar(
        lambda skew: float(_unexplained(us, curves, np.array([skew]))[0, 0]),
        bounds=(start - step, start + step),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x)


def skewed_minima(
    us: list[Float[np.ndarray, " _runs"]], losses: list[Float[np.ndarray, "draws _runs"]]
) -> list[tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]]:
    """Return (vertex, curvature) of every draw, per valley; each draw has its own common skew."""
    skews, of_draw = np.unique(common_skews(us, losses), return_inverse=True)
    found = []
    for u, loss in zip(us, losses, strict=True):
        solve = np.linalg.pinv(bent_bases(u, skews))[of_draw]
        vertex, _, curvature = bent_minimum(np.matmul(solve, loss[:, :, None])[..., 0], skews[of_draw])
        found.append((vertex, curvature))
    return found
