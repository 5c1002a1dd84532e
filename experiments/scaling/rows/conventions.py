"""Fit one set of runs under every convention of N and C, to show how far the choice moves the exponents.

Kaplan et al. 2020 leave embeddings out of N and C, Hoffmann et al. 2022 count them; Porian et al. 2024 (arXiv
2406.19146) and Pearce & Song 2024 (arXiv 2406.12907) show that this explains most of the distance between their
exponents. It matters most for small models, whose parameters are mostly embeddings.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.intervals import Intervals
from experiments.scaling.law.parametric import ParametricFit, fit_parametric
from experiments.scaling.rows.columns import require
from experiments.scaling.rows.files import column_names, read_records
from experiments.scaling.rows.numerals import read_numbers
from experiments.scaling.rows.table import DroppedRow, Table, read_header
from experiments.scaling.valleys.isoflop import fit_isoflop
from experiments.scaling.valleys.valley import group_budgets
from model import ModelConfig, accounting
from model.errors import InputError
from train.objectives import LanguageModeling, Objective

PARAMS = {
    "params_total": "every parameter, the embedding table once",
    "params_non_embedding": "without the tables of tokens and positions; an untied head counts",
    "params_without_head": "without tables and without the head's matrix",
}
FLOPS = {
    "flops_exact": "every product, attention's scores and mix included",
    "flops_without_attention": "every product but attention's scores and mix",
}


@dataclass(frozen=True)
class Counts:
    """Runs with the available columns of `PARAMS` (counts) and `FLOPS` (of the whole run), by name."""

    tokens: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]
    params: Mapping[str, Float[np.ndarray, " rows"]]
    flops: Mapping[str, Float[np.ndarray, " rows"]]

    def __post_init__(self) -> None:
        if not self.params:
            raise InputError(f"a table of conventions needs at least one column of {', '.join(PARAMS)}")


def count(config: ModelConfig, seq_len: int, objective: Objective = LanguageModeling()) -> dict[str, float]:
    """Return every column of `PARAMS`, and of `FLOPS` per training token, of one model."""
    counted = accounting.parameters(config)
    head = sum(size for name, size in counted.by_group.items() if name == "head" or name.startswith("head/"))
    products = objective.training_flops_by_product(config, seq_len)
    pairwise = sum(value for name, value in products.items() if name.endswith((" scores", " mix")))
    exact = sum(products.values())
    return {
        "params_total": counted.total,
        "params_non_embedding": counted.non_embedding,
        "params_without_head": counted.non_embedding - head,
        "flops_exact": exact,
        "flops_without_attention": exact - pairwise,
    }


def read_counts(
    path: str | Path, *, tokens: str = "tokens", loss: str = "loss", rows: Collection[int] | None = None
) -> Counts:
    """Read the counts of a table with columns named as in `PARAMS` and `FLOPS`; those that it lacks are left out.

    rows: by number.
    """
    path = Path(path)
    records = [(row, record) for row, record in read_records(path) if rows is None or row in rows]
    if not records:
        raise InputError(f"{path} has no rows")
    present = column_names(records)
    require(path, [tokens, loss], present)
    counts = [name for name in (tokens, *PARAMS, *FLOPS) if name in present]
    numbers, _ = read_numbers(path, records, dict.fromkeys(counts, True) | {loss: False})

    def column(name: str) -> np.ndarray:
        return np.array(numbers[name])

    return Counts(
        column(tokens),
        column(loss),
        {name: column(name) for name in PARAMS if name in present},
        {name: column(name) for name in FLOPS if name in present},
    )


def counts_beside(path: str | Path, table: Table) -> Counts | None:
    """Return what `read_counts` finds in a table's own file, for the rows of the table; None if it has no choice."""
    present = read_header(path)
    if not any(name in present for name in PARAMS) or sum(name in present for name in (*PARAMS, *FLOPS)) < 2:
        return None
    return read_counts(path, tokens=table.columns["tokens"], loss=table.columns["loss"], rows=set(table.rows))


@dataclass(frozen=True)
class LawExponents:
    """The parametric law in one N, and the exponents of its optimum under one C."""

    alpha: float
    beta: float
    a: float
    b: float
    flops_per_token_exponent: float
    """γ: FLOPs per token grow as N^γ through the runs."""
    intervals: Intervals
    """The 95 % intervals of a and b."""


@dataclass(frozen=True)
class ValleyExponents:
    """The exponents of the IsoFLOP valleys under one pair of N and C."""

    a: float
    b: float
    intervals: Intervals | None
    """The 95 % intervals of a and b; None if they were refused."""


@dataclass(frozen=True)
class ConventionRow:
    """Each estimator's exponents under one pair of N and C; None if it was refused, with the reason in `refused`."""

    params: str
    flops: str
    parametric: LawExponents | None
    isoflop: ValleyExponents | None
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with levels as strings."""
        row = asdict(self)
        for estimator in ("parametric", "isoflop"):
            if row[estimator] is not None and row[estimator]["intervals"] is not None:
                row[estimator]["intervals"] = {
                    name: {f"{level:g}": list(pair) for level, pair in by.items()}
                    for name, by in row[estimator]["intervals"].items()
                }
        return row


@dataclass(frozen=True)
class ConventionTable:
    """The exponents of the same runs under every convention of N and C."""

    rows: list[ConventionRow]
    spread: dict[str, dict[str, float] | None]
    """The largest minus the smallest a and b of each estimator; None for an estimator that was always refused."""
    dropped: list[DroppedRow]
    conventions: dict[str, str]
    """The meaning of each count of N and C."""
    bootstraps: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "spread": self.spread,
            "dropped": [row.to_dict() for row in self.dropped],
            "conventions": self.conventions,
            "bootstraps": self.bootstraps,
        }


def conventions(counts: Counts, *, bootstraps: int = 200, seed: int = 0) -> ConventionTable:
    """Return each estimator's a and b under every pair of N and C.

    The parametric law is fitted in each N; under another C than 6·N·D its optimum follows from how FLOPs per token grow
    with N, as N^γ through the runs: a = β/(γβ + α). The budgets of the IsoFLOP valleys are those of the first N, as the
    runs were planned; under another C each run's loss is first moved along its law to its budget's mean compute, since
    only at one compute is there a valley. `spread` is the largest minus the smallest a and b per estimator: the effect
    of the convention alone. A refused estimator is null with its reason.
    """
    counts, dropped = _usable(counts)
    first = next(iter(counts.params))
    budgets = group_budgets(6 * counts.params[first] * counts.tokens)
    rows = []
    laws: dict[bytes, Any] = {}  # by the column: with tied embeddings two conventions of N are equal
    for name, params in counts.params.items():
        computes = {"6·N·D": 6 * params * counts.tokens, **counts.flops}
        for label, flops in computes.items():
            law = laws.get(params.tobytes()) or _law(params, counts.tokens, counts.loss, bootstraps, seed)
            laws[params.tobytes()] = law
            runs = params, counts.tokens, counts.loss
            rows.append(_row(name, label, *runs, flops, budgets, law, bootstraps, seed))
    spread = {
        "parametric": _spread([row.parametric for row in rows if row.parametric is not None]),
        "isoflop": _spread([row.isoflop for row in rows if row.isoflop is not None]),
    }
    described = {**PARAMS, "6·N·D": "six per parameter of this row's N and token", **FLOPS}
    return ConventionTable(rows, spread, dropped, described, bootstraps)


def _spread(found: Sequence[LawExponents | ValleyExponents]) -> dict[str, float] | None:
    """Return the largest minus the smallest a and b; None without any."""
    if not found:
        return None
    columns = {"a": [one.a for one in found], "b": [one.b for one in found]}
    return {name: max(values) - min(values) for name, values in columns.items()}


def _usable(counts: Counts) -> tuple[Counts, list[DroppedRow]]:
    """Return the counts without the rows that hold anything but positive numbers, which are listed by number from 1."""
    columns = {"tokens": counts.tokens, "loss": counts.loss, **counts.params, **counts.flops}
    wrong = {name: ~(np.isfinite(values) & (values > 0)) for name, values in columns.items()}
    bad = np.any(list(wrong.values()), axis=0)
    dropped = [
        DroppedRow(int(i) + 1, f"{next(name for name in wrong if wrong[name][i])} is not a positive number")
        for i in np.flatnonzero(bad)
    ]
    params, flops = ({name: v[~bad] for name, v in part.items()} for part in (counts.params, counts.flops))
    return Counts(counts.tokens[~bad], counts.loss[~bad], params, flops), dropped


def _law(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, bootstraps: int, seed: int) -> ParametricFit | str:
    """Return the parametric law with its resamples, or why it was refused."""
    try:
        fit = fit_parametric(params, tokens, loss, bootstraps=bootstraps, seed=seed)
        _ = fit.draws
    except InputError as error:
        return str(error)
    return fit


def _row(
    name: str,
    label: str,
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    flops: np.ndarray,
    budgets: list[Any],
    law: ParametricFit | str,
    bootstraps: int,
    seed: int,
) -> ConventionRow:
    parametric, isoflop, refused = None, None, {}
    rate = 1.0  # of FLOPs per token in N; 6·N exactly
    if label != "6·N·D":
        rate = float(np.polyfit(np.log(params), np.log(flops / tokens), 1)[0])
    fit = None
    if isinstance(law, str):
        refused["parametric"] = law
    else:
        fit = law
        alpha, beta = fit.draws[:, 3], fit.draws[:, 4]
        shares = np.stack([beta, alpha]) / (rate * beta + alpha)
        low, high = np.nanpercentile(shares, [2.5, 97.5], axis=1)
        parametric = LawExponents(
            alpha=fit.alpha,
            beta=fit.beta,
            a=fit.beta / (rate * fit.beta + fit.alpha),
            b=fit.alpha / (rate * fit.beta + fit.alpha),
            flops_per_token_exponent=rate,
            intervals={key: {95: (float(low[i]), float(high[i]))} for i, key in enumerate(("a", "b"))},
        )
    try:
        columns = _at_budgets(params, tokens, loss, flops, budgets, fit)
        iso = fit_isoflop(**columns, bootstraps=bootstraps, seed=seed)
        isoflop = ValleyExponents(iso.a, iso.b, None)
        isoflop = replace(isoflop, intervals={key: {95: by[95]} for key, by in iso.intervals.items()})
    except InputError as error:
        refused["isoflop" if isoflop is None else "isoflop.intervals"] = str(error)
    return ConventionRow(name, label, parametric, isoflop, refused)


def _at_budgets(
    params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, flops: np.ndarray, budgets: list[Any], fit: Any
) -> dict[str, Any]:
    """Move the runs in D, at fixed N, to the mean compute of their budget; scale the loss by the law's ratio."""
    target = flops.copy()
    for group in budgets:
        target[group] = np.exp(np.log(flops[group]).mean())
    moved = tokens * target / flops
    apart = np.abs(np.log(target / flops)) > 1e-9
    if apart.any():
        if fit is None:
            raise InputError(
                "this convention bends the budgets, and without a parametric law losses cannot be moved back"
            )
        loss = np.where(apart, loss * fit.predict(params, moved) / fit.predict(params, tokens), loss)
    return {"params": params, "tokens": moved, "loss": loss, "flops": target}
