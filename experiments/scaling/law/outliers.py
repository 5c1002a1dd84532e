"""Screen gross outliers by a rule: runs that the table's own noise does not explain. Each is listed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

LEVEL = 1e-4  # two-sided probability that a valid run is taken for an outlier under normal noise
NOISE_FLOOR = 1e-4  # relative; no validation set resolves smaller differences of runs
CUBIC_SIZES = 6  # from this many sizes on a cubic is fitted, so that a valley's skew is not taken for outliers
LARGEST_SHARE = 1 / 3  # of a valley's runs that may be left out
SURFACE_DEGREES = ((5, 4), (4, 4), (3, 2))  # (degree, runs needed per term); the first one with enough runs is used
SURFACE_FLOOR = 5e-3  # relative; the surface follows published laws to 5e-4 over three decades, not to the last digit
ROUNDS = 30
ROUNDS_OF_LEAST_ABSOLUTE = 50


@dataclass(frozen=True)
class Outlier:
    """A run that was left out of a fit as a gross outlier."""

    params: float
    tokens: float
    loss: float
    reason: str
    flops: float | None = None
    """The compute of the run, where a valley left it out; None if the parametric law did."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without `flops` if it is None."""
        run = {"params": self.params, "tokens": self.tokens, "loss": self.loss, "reason": self.reason}
        return run if self.flops is None else {"flops": self.flops} | run


def limit(freedom: float) -> float:
    """Return the distance, in robust standard deviations, beyond which a run is an outlier.

    A median deviation has about half a standard deviation's degrees of freedom (37 % asymptotically, more in small
    samples), so that few runs need a larger distance.
    """
    return float(stats.t.isf(LEVEL / 2, max(freedom / 2, 1.0)))


def robust_scale(values: Float[np.ndarray, " values"]) -> float:
    """Return 1.4826 times the median absolute value, as if normal and centred; never below the floor."""
    return max(1.4826 * float(np.median(np.abs(values))), NOISE_FLOOR) if len(values) else NOISE_FLOOR


def _studentised(u: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return relative residuals of a cubic (below six sizes: a parabola) over √(1 − leverage); 0 at leverage 1."""
    degree = 3 if len(np.unique(u)) >= CUBIC_SIZES else 2
    q, _ = np.linalg.qr(np.vander(u, degree + 1))
    residual = (loss - q @ (q.T @ loss)) / np.median(loss)  # a run's own influence on the fit must not hide its error
    free = 1 - (q**2).sum(1)
    return np.where(free > 1e-9, residual / np.sqrt(np.maximum(free, 1e-9)), 0.0)


def screen_valleys(
    valleys: list[tuple[Float[np.ndarray, " _runs"], Float[np.ndarray, " _runs"]]],
    first: list[Bool[np.ndarray, " _runs"]],
) -> tuple[list[Bool[np.ndarray, " _runs"]], list[float], list[bool]]:
    """Return which runs of each valley (u, loss) to keep, how far off each valley's worst was, and what cannot be
    decided.

    `first` are the runs that `screen_surface` keeps. One noise level is estimated for all budgets. The run farthest off
    its valley's curve is left out while it is beyond the limit; if that would remove more than a third of a budget's
    runs, or leave no degree of freedom, all are kept and the budget is marked as undecided: it has an error, but not in
    an identifiable run.
    """
    keep = [
        kept if len(np.unique(u[kept])) >= 4 else np.ones(len(u), bool)
        for (u, _), kept in zip(valleys, first, strict=True)
    ]
    undecided = [False] * len(valleys)
    worst = [0.0] * len(valleys)

    def studentised(i: int) -> np.ndarray:
        u, loss = valleys[i]
        return _studentised(u[keep[i]], loss[keep[i]]) if len(np.unique(u[keep[i]])) >= 4 else np.zeros(0)

    residuals = [studentised(i) for i in range(len(valleys))]
    while True:
        sound = [r for r, doubt in zip(residuals, undecided, strict=True) if not doubt and len(r)]
        if not sound:
            return keep, worst, undecided
        freedom = sum(max(len(r) - (4 if len(r) >= CUBIC_SIZES else 3), 0) for r in sound)
        scale, bound = robust_scale(np.concatenate(sound)), limit(freedom)
        sizes = [
            np.abs(r).max() / scale if len(r) and not d else 0.0 for r, d in zip(residuals, undecided, strict=True)
        ]
        i = int(np.argmax(sizes))
        if sizes[i] <= bound:
            return keep, worst, undecided
        worst[i] = max(worst[i], float(sizes[i]))
        u = valleys[i][0]
        rest = keep[i].copy()
        rest[np.flatnonzero(keep[i])[np.abs(residuals[i]).argmax()]] = False
        if (~rest).sum() > LARGEST_SHARE * len(u) or len(np.unique(u[rest])) < 4:
            keep[i], undecided[i] = np.ones(len(u), bool), True
        else:
            keep[i] = rest
        residuals[i] = studentised(i)


def screen_residuals(
    residuals: Float[np.ndarray, " rows"], fitted: Bool[np.ndarray, " rows"], unknowns: int
) -> Bool[np.ndarray, " rows"]:
    """Return which runs to keep, by a law (`unknowns` is the number of its unknowns) that was fitted robustly to some
    of them.

    The noise is that of the `fitted` runs. The residuals of the best fit are too small by √(rows / (rows − unknowns))
    on average, because of the fitted unknowns.
    """
    count = int(fitted.sum())
    freedom = max(count - unknowns, 1)
    scale = robust_scale(residuals[fitted] * np.sqrt(count / freedom))
    return np.abs(residuals) <= limit(freedom) * scale


def screen_surface(
    budget: Int[np.ndarray, " runs"], log_n: Float[np.ndarray, " runs"], log_c: Float[np.ndarray, " runs"], loss: Any
) -> Bool[np.ndarray, " runs"]:
    """Return which runs to keep, judged by all valleys together; all runs if there are too few to judge.

    One valley alone cannot show which of its outer runs is wrong: at its edge the curve follows the run. But valleys
    change slowly with the budget: ln L is taken for a polynomial in ln N and ln C, of third degree, or higher with
    enough runs, with a separate level for each budget, so that a budget which is shifted as a whole makes no run an
    outlier. It is fitted by least absolute residuals, which outliers cannot pull, and then by least squares to the runs
    within the limit, until those no longer change (reweighted least squares, in the manner of Rousseeuw & Leroy 1987,
    "Robust Regression and Outlier Detection"). A budget that would lose more than a third of its runs keeps all: it is
    the budget that disagrees, not single runs.
    """
    names, place, count = np.unique(budget, return_inverse=True, return_counts=True)
    keep = np.ones(len(budget), bool)
    bearable = [
        degree
        for degree, runs_per_term in SURFACE_DEGREES
        if len(budget) >= runs_per_term * (len(names) + degree * (degree + 1) // 2)
    ]
    if not bearable:
        return keep
    n, c = ((x - x.mean()) / max(float(x.std()), 1e-12) for x in (log_n, log_c))
    powers = np.stack([n**i * c**j for i in range(1, bearable[0] + 1) for j in range(bearable[0] + 1 - i)], 1)
    directions, sizes, _ = np.linalg.svd(_centred(powers, place, np.ones(len(place))), full_matrices=False)
    basis = directions[:, sizes > 1e-9 * max(float(sizes[0]), 1e-300)]
    terms = len(names) + basis.shape[1]
    y = np.log(loss)
    residuals = np.abs(_least_absolute(basis, place, y))
    # At the least absolute sum as many residuals as terms are zero; they carry no information on the noise.
    scale = robust_scale(np.sort(residuals)[terms:])
    keep = residuals <= max(limit(len(keep) - terms) * scale, SURFACE_FLOOR)
    for _ in range(ROUNDS):
        signed, leverage = _weighted_fit(basis, place, y, keep.astype(np.float64))
        # A fitted run pulls the surface towards itself; a run that was not fitted is predicted with an error.
        residuals = np.abs(signed) / np.sqrt(np.where(keep, np.maximum(1 - leverage, 1e-9), 1 + leverage))
        bound = limit(max(int(keep.sum()) - terms, 1)) * robust_scale(residuals[keep])
        again = residuals <= max(bound, SURFACE_FLOOR)
        if np.array_equal(again, keep):
            break
        keep = again
    lost = np.bincount(place, weights=~keep)
    return keep | (lost > LARGEST_SHARE * count)[place]


def _centred(values: np.ndarray, place: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the values [runs, columns] minus the weighted mean of their budget (0 for a budget without weight)."""
    total = np.bincount(place, weights)
    sums = np.stack([np.bincount(place, weights * column, len(total)) for column in values.T], 1)
    return values - (sums / np.where(total > 0, total, 1.0)[:, None])[place]


def _weighted_fit(
    basis: np.ndarray, place: np.ndarray, y: np.ndarray, weights: np.ndarray
) -> tuple[Float[np.ndarray, " runs"], Float[np.ndarray, " runs"]]:
    """Return (residuals, leverages) of weighted least squares in the basis and a level of its own for each budget.

    Centred within budgets, the levels drop out (Frisch & Waugh 1933, Econometrica 1), so that the work grows with the
    runs and not with the budgets.
    """
    columns, centred = _centred(basis, place, weights), _centred(y[:, None], place, weights)[:, 0]
    inverse = np.linalg.pinv((columns * weights[:, None]).T @ columns, hermitian=True)
    total = np.bincount(place, weights)
    level = np.where(total > 0, 1 / np.where(total > 0, total, 1.0), 0.0)[place]
    residuals = centred - columns @ (inverse @ (columns.T @ (weights * centred)))
    return residuals, level + ((columns @ inverse) * columns).sum(1)


def _least_absolute(basis: np.ndarray, place: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " runs"]:
    """Return the residuals of least Σ|residual|, by reweighted least squares (Schlossmacher 1973, JASA 68).

    Weights are bounded at a thousandth of the median residual: the sum need not be least to the last digit, only
    unmoved by outliers. Every table has a solution.
    """
    weights, residuals = np.ones(len(y)), np.zeros(len(y))
    for _ in range(ROUNDS_OF_LEAST_ABSOLUTE):
        before, residuals = residuals, _weighted_fit(basis, place, y, weights)[0]
        floor = max(1e-3 * float(np.median(np.abs(residuals))), 1e-12)
        weights = floor / np.maximum(np.abs(residuals), floor)
        if np.abs(residuals - before).max() <= floor:
            break
    return residuals
