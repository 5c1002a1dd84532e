"""Choose the rows that are used of a very large table, for computations that would not fit, and explain the choice."""

import numpy as np
from jaxtyping import Int

SAMPLE = 2_000
"""Rows behind what is solved many times: the starts of a law, each draw of its bootstrap, the choice between forms."""
MOST_SAMPLES = 10
"""Separate samples that a bootstrap draws from."""
PER_BUDGET = 400
ALL_BUDGETS = 10_000
"""Runs of one budget and of all budgets together that enter the valleys: a curve through n runs takes n³ operations."""
DOTS = 2_000
"""Runs drawn in a figure: more are one blot, and megabytes of the page."""


def sample(rows: int, most: int, seed: int) -> Int[np.ndarray, " sample"]:
    """Return row numbers, ascending: all of them, or `most` drawn without replacement."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng([seed, rows]).choice(rows, size=most, replace=False))


def samples(rows: int, seed: int) -> list[Int[np.ndarray, " sample"]]:
    """Return at most MOST_SAMPLES disjoint sets of SAMPLE row numbers; for a small table one set of all rows."""
    if rows <= SAMPLE:
        return [np.arange(rows)]
    order = np.random.default_rng([seed, rows]).permutation(rows)
    count = min(rows // SAMPLE, MOST_SAMPLES)
    return [np.sort(order[i * SAMPLE : (i + 1) * SAMPLE]) for i in range(count)]


def most_per_budget(sizes: list[int]) -> int:
    """Return how many runs of each budget enter, so that neither PER_BUDGET nor, together, ALL_BUDGETS is exceeded."""
    most = min(PER_BUDGET, max(sizes, default=1))
    while most > 1 and sum(min(size, most) for size in sizes) > ALL_BUDGETS:
        most -= 1
    return most


def evenly(count: int, most: int) -> Int[np.ndarray, " kept"]:
    """Return at most `most` of `count` places in equal steps, the first and the last among them."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)
