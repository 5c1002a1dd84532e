"""Compute critical values for selecting the best of many settings, with a correction for the selection."""

import functools

import numpy as np
from scipy import optimize, stats


@functools.cache
def best_of_many(others: int, freedom: int) -> float:
    """Return how many standard errors of a difference above the lowest mean a setting may still be the best.

    Settings within it hold the truly best one with 95 % probability, whatever the true means are (subset selection,
    Gupta 1965; multiple comparisons with the best, Hsu 1984). It is Dunnett's one-sided critical value (1955) for
    `others` comparisons with one common mean, equal replicates, and a variance of `freedom` degrees of freedom; for one
    comparison it is Student's t.
    """
    z, weight = _normal_nodes()
    scale, density = _deviation_nodes(freedom)

    def coverage(d: float) -> float:
        inner = (stats.norm.cdf(z[:, None] + np.sqrt(2) * d * scale[None, :]) ** others * weight[:, None]).sum(0)
        return float((inner * density).sum())

    return float(optimize.brentq(lambda d: coverage(d) - 0.95, 0.0, 1000.0, xtol=1e-6))


@functools.cache
def largest_of_many(count: int, freedom: int) -> float:
    """Return the 97.5 % quantile of the largest of `count` t statistics with a common variance estimate.

    The lowest of `count` means may be this many standard errors below its true value, because it was selected.
    """
    scale, density = _deviation_nodes(freedom)

    def coverage(m: float) -> float:
        return float((stats.norm.cdf(m * scale) ** count * density).sum())

    return float(optimize.brentq(lambda m: coverage(m) - 0.975, -10.0, 1000.0, xtol=1e-6))


def highest_interval(mean: float, error: float, candidates: int, freedom: int) -> tuple[float, float]:
    """Return `selected_interval` of the setting with the highest mean, which is biased upward."""
    low, high = selected_interval(-mean, error, candidates, freedom)
    return -high, -low


def selected_interval(mean: float, error: float, candidates: int, freedom: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of the setting with the lowest of `candidates` means.

    error: its standard error.

    The lowest of many means is biased downward, so the upper bound holds for all candidates simultaneously. The lower
    bound needs no correction: the selected mean is at most the mean of the truly best setting.
    """
    low = mean - float(stats.t.ppf(0.975, freedom)) * error
    return low, mean + largest_of_many(candidates, freedom) * error


def _normal_nodes() -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(96)
    return 8.5 * nodes, 8.5 * weights * stats.norm.pdf(8.5 * nodes)


def _deviation_nodes(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Return quadrature nodes and weights for the ratio of an estimated to the true standard deviation."""
    nodes, weights = np.polynomial.legendre.leggauss(128)
    low, high = np.sqrt(stats.chi2.ppf([1e-9, 1 - 1e-9], freedom) / freedom)
    scale = (high - low) / 2 * nodes + (high + low) / 2
    density = 2 * freedom * scale * stats.chi2.pdf(freedom * scale**2, freedom)
    mass = weights * density
    return scale, mass / mass.sum()
