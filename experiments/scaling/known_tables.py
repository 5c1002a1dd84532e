"""Simulate tables of a known law, to test the estimators: the ladder, its noise, and its corruptions."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "a": 0.28 / 0.62, "b": 0.34 / 0.62}
"""The law as Hoffmann et al. 2022 published it (approach 3), in nats per token."""
OUTLIER_SHARE = 0.05
WRONG_BY = {"added": (1.1, 2.0), "replaced": (1.1, 2.0), "mild": (1.03, 1.1), "low": (0.8, 0.95)}
"""The range of the factor by which the losses of outliers are wrong."""
BUDGET_WRONG_BY = 1.02


@dataclass(frozen=True)
class TableKind:
    """One kind of table. noise: standard deviation of ln L; span: largest over middle size of a budget; drift: ln of
    the factor by which the windows of the first and last budget miss the optimum, to either side.
    """

    name: str
    budgets: int = 6
    sizes: int = 9
    noise: float = 0.003
    span: float = 4.0
    drift: float = 0.0
    outliers: str | None = None
    """"added": 5 % of the runs once more with a wrong loss, and two rows whose loss is no number; "replaced", "mild",
    "low": 5 % of the runs have a loss that is wrong (the factors: `WRONG_BY`); "budget": one budget's losses are all
    2 % too high, which no law without a term for it can see through."""
    required: bool = True
    """Whether the limits must be met; else the numbers are only reported."""


CASES = (
    TableKind("centred"),
    TableKind("off centre", drift=math.log(1.8)),
    TableKind("outliers", outliers="added"),
    TableKind("replaced", outliers="replaced"),
    TableKind("mild", outliers="mild", required=False),
    TableKind("low", outliers="low", required=False),
    TableKind("budget", outliers="budget", required=False),
    TableKind("5 × 7", budgets=5, sizes=7, required=False),
    TableKind("few", budgets=3, sizes=4, required=False),
)
CLEAN = (TableKind("clean", noise=0.0), TableKind("clean, off centre", noise=0.0, drift=math.log(1.8)))


def law(params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the true loss in nats per token."""
    return TRUTH["E"] + TRUTH["A"] * params ** -TRUTH["alpha"] + TRUTH["B"] * tokens ** -TRUTH["beta"]


def simulate(case: TableKind, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (the honest runs of a table, the whole table), as columns params, tokens, loss.

    Tables of one ladder and seed have the same noise under every corruption.
    """
    rng = np.random.default_rng([seed, 7])
    budgets = np.geomspace(1e18, 1e21, case.budgets)
    rate = TRUTH["alpha"] + TRUTH["beta"]
    g = (TRUTH["alpha"] * TRUTH["A"] / (TRUTH["beta"] * TRUTH["B"])) ** (1 / rate)
    centre = g * (budgets / 6) ** TRUTH["a"] * np.exp(case.drift * np.linspace(-1, 1, case.budgets))
    params = (centre[:, None] * np.geomspace(1 / case.span, case.span, case.sizes)).ravel()
    tokens = np.repeat(budgets, case.sizes) / (6 * params)
    loss = law(params, tokens) * np.exp(rng.normal(0, case.noise, len(params)))
    table = {"params": params, "tokens": tokens, "loss": loss}
    if case.outliers is None:
        return table, table
    if case.outliers == "budget":
        first = case.sizes * int(rng.integers(case.budgets))
        wrong = np.arange(first, first + case.sizes)
        loss = loss.copy()
        loss[wrong] *= BUDGET_WRONG_BY
        return table, table | {"loss": loss}
    wrong = rng.choice(len(loss), size=max(1, round(OUTLIER_SHARE * len(loss))), replace=False)
    wrong_loss = loss[wrong] * rng.uniform(*WRONG_BY[case.outliers], len(wrong))
    if case.outliers == "added":
        lost = rng.choice(len(loss), size=2, replace=False)
        spoiled = {name: np.concatenate([column, column[wrong], column[lost]]) for name, column in table.items()}
        spoiled["loss"] = np.concatenate([loss, wrong_loss, np.full(2, np.nan)])
        return table, spoiled
    honest = {name: np.delete(column, wrong) for name, column in table.items()}
    loss = loss.copy()
    loss[wrong] = wrong_loss
    return honest, table | {"loss": loss}
