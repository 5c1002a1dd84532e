"""Select the columns and rows that a form of law is fitted to, and check that they determine it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.forms.form import LawForm
from experiments.scaling.law.intervals import MINIMUM_DISTINCT, draw_counts
from experiments.scaling.rows.table import DroppedRow, Table
from experiments.words import counted
from model.errors import InputError

COLUMNS = ("params", "tokens", "flops", "unique_tokens", "active_params", "loss")


@dataclass(frozen=True)
class UsableRuns:
    """Usable runs as float64 columns by name, and what was left out; rows count from 1."""

    columns: dict[str, Float[np.ndarray, " rows"]]
    dropped: list[DroppedRow]

    def __len__(self) -> int:
        return len(self.columns["loss"])


def usable(table: Table | Mapping[str, Any], needs: Sequence[str]) -> UsableRuns:
    """Return the columns that a form needs, without non-finite or non-positive numbers and duplicates.

    Rows come back sorted, so that nothing depends on the order of the table. Where `flops` is requested and absent
    it is 6·N·D. Raises `InputError` for a column that is missing, is not of numbers, or differs in length.
    """
    if isinstance(table, Table):
        given = {name: getattr(table, name, None) for name in COLUMNS}
        given = {name: values for name, values in given.items() if values is not None}
        dropped = list(table.dropped)
    else:
        given, dropped = dict(table), []
    columns = {}
    for name in (*needs, "loss"):
        if name == "flops" and name not in given and {"params", "tokens"} <= set(given):
            columns[name] = 6.0 * np.asarray(given["params"], np.float64) * np.asarray(given["tokens"], np.float64)
            continue
        if name not in given:
            raise InputError(f"the form needs a column {name!r}; the table has {', '.join(map(repr, given))}")
        try:
            columns[name] = np.asarray(given[name], np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must be numbers: {error}") from error
    shapes = {name: values.shape for name, values in columns.items()}
    if len(set(shapes.values())) > 1 or len(shapes["loss"]) != 1:
        raise InputError(f"columns must be one-dimensional and of one length, got {shapes}")
    matrix = np.stack(list(columns.values()), axis=1)
    kept: dict[tuple[float, ...], int] = {}
    for i, row in enumerate(matrix):
        bad = [name for name, value in zip(columns, row, strict=True) if not (math.isfinite(value) and value > 0)]
        if bad:
            reason = f"{bad[0]} is not a positive number ({columns[bad[0]][i]:g})"
        elif (first := kept.setdefault(tuple(row), i)) != i:
            reason = f"exact duplicate of row {first + 1}"
        else:
            continue
        dropped.append(DroppedRow(i + 1, reason))
    chosen = np.array(sorted(kept.values(), key=lambda i: tuple(matrix[i])), dtype=np.int64)
    return UsableRuns({name: values[chosen] for name, values in columns.items()}, dropped)


def frontier(rows: UsableRuns) -> UsableRuns:
    """Return the runs with a lower loss than every run of the same or less compute."""
    flops, loss = rows.columns["flops"], rows.columns["loss"]
    order = np.lexsort((loss, flops))
    best = np.minimum.accumulate(np.append(np.inf, loss[order][:-1]))
    kept = np.sort(order[loss[order] < best])
    lost = len(rows) - len(kept)
    dropped = [*rows.dropped, DroppedRow(None, f"{counted(lost, 'run')} off the frontier")] if lost else rows.dropped
    return UsableRuns({name: values[kept] for name, values in rows.columns.items()}, dropped)


def reason_against(form: LawForm, columns: Mapping[str, np.ndarray]) -> str | None:
    """Return why these runs cannot determine the form's unknowns; None where they can."""
    rows = len(columns["loss"])
    if rows <= len(form.unknowns):
        unknowns = len(form.unknowns)
        return (
            f"{counted(rows, 'usable run')} cannot determine the {unknowns} unknowns of "
            f"{form.name}; {unknowns + 1} or more are needed"
        )
    for name in form.needs:
        distinct = len(np.unique(columns[name]))
        if name in ("params", "tokens", "flops", "active_params") and distinct < MINIMUM_DISTINCT:
            return f"only {distinct} different {name}; {form.name} needs {MINIMUM_DISTINCT} or more"
    if np.ptp(np.log(columns["loss"])) < 1e-12:
        return "every run has the same loss; there is no law to fit"
    if {"params", "tokens"} <= set(form.needs):
        points = np.log(np.stack([columns["params"], columns["tokens"]]))
        width, length = sorted(np.linalg.svd(points - points.mean(1, keepdims=True), compute_uv=False))
        if width < 0.01 * length:
            return "all runs are on one line in (log N, log D), as at a fixed D/N or a single budget; vary both"
    if "unique_tokens" in form.needs and (columns["tokens"] > 1.01 * columns["unique_tokens"]).sum() < 3:
        return f"{form.name} needs at least 3 runs that saw their tokens more than once (tokens above unique_tokens)"
    if "active_params" in form.needs:
        if (columns["active_params"] > columns["params"]).any():
            return (
                "active_params exceeds params in some runs; params counts all experts, active_params those of one token"
            )
        expansions = len(np.unique(np.round(np.log(columns["params"] / columns["active_params"]), 2)))
        if expansions < MINIMUM_DISTINCT:
            return (
                f"only {counted(expansions, 'different ratio')} of total to active "
                f"parameters; it takes {MINIMUM_DISTINCT} or more"
            )
    return None


def resample(
    form: LawForm, columns: Mapping[str, np.ndarray], rng: np.random.Generator, count: int
) -> Float[np.ndarray, "draws rows"]:
    """Return `draw_counts` of the columns that the form wants to see vary."""
    varied = [columns[name] for name in form.needs if name in ("params", "tokens", "flops")]
    return draw_counts(varied, len(form.unknowns), rng, count)
