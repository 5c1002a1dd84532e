"""Read a table of runs from CSV, JSONL or Parquet, and clean it by rules.

One row is one finished run: parameters N (count), training tokens D (count), final validation loss L (nats per token)
and optionally its compute C (FLOPs), unique tokens and active parameters. Rows that cannot be fitted are dropped by a
stated rule and listed; signs of a wrong file (a missing column, text among numbers) are errors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.rows.columns import find_column, require, truth
from experiments.scaling.rows.files import Record, column_names, read_records
from experiments.scaling.rows.numerals import MISSING, read_numbers
from experiments.words import counted
from model.errors import InputError

REPEATED = "repeated"  # a boolean-like column of this name marks runs that saw their data more than once
HELD_OUT = "held_out"  # and one of this name the runs that a law is to be tested on
HELD_OUT_REASON = "held out"
STEP = "_step"
RUN_COLUMNS = ("Name", "name", "run", "run_id", "run_name", "ID", "id")
ROLES = ("params", "tokens", "loss", "flops", "unique_tokens", "active_params")


@dataclass(frozen=True)
class DroppedRow:
    """A row of a table that does not enter a fit."""

    row: int | None
    """Its number, from 1; None if the reason counts several rows."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """Usable runs as float64 columns, and what was left out; rows count from 1, without a header."""

    params: Float[np.ndarray, " rows"]
    tokens: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]
    flops: Float[np.ndarray, " rows"] | None = None
    dropped: list[DroppedRow] = field(default_factory=list)
    unique_tokens: Float[np.ndarray, " rows"] | None = None
    """Tokens before the first repeat; of runs that saw everything once, `tokens`."""
    active_params: Float[np.ndarray, " rows"] | None = None
    """Parameters that one token uses; `params` then counts all experts."""
    columns: dict[str, str] = field(default_factory=dict)
    """By role, the column of the file that was read."""
    rows: list[int] = field(default_factory=list)
    """The numbers of the rows that are left."""
    notes: list[str] = field(default_factory=list)
    """Assumptions made in reading the file, in words."""

    def __len__(self) -> int:
        return len(self.loss)


def clean(
    params: Any,
    tokens: Any,
    loss: Any,
    flops: Any = None,
    *,
    unique_tokens: Any = None,
    active_params: Any = None,
    names: Mapping[str, str] | None = None,
    repeated: Sequence[bool] | None = None,
    held_out: Sequence[bool] | None = None,
    rows: Sequence[int] | None = None,
) -> Table:
    """Drop, in this order: repeated data, held-out runs, non-finite and non-positive numbers, exact duplicates.

    A duplicate agrees with an earlier row in every column used, to the last bit. `names` says what the columns are
    called in messages, `rows` how the rows are numbered. Raises `InputError` if the columns are not one-dimensional
    numbers of one length.
    """
    given = dict(zip(ROLES, (params, tokens, loss, flops, unique_tokens, active_params), strict=True))
    called = dict(zip(ROLES, ROLES, strict=True)) | dict(names or {})
    columns = {}
    for role, values in given.items():
        if values is None:
            continue
        try:
            columns[role] = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{called[role]} must be numbers: {error}") from error
        if columns[role].ndim != 1:
            raise InputError(f"{called[role]} must be one-dimensional, got shape {columns[role].shape}")
    lengths = {called[role]: len(values) for role, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"columns differ in length: {', '.join(f'{k} has {v}' for k, v in lengths.items())}")

    count = len(next(iter(columns.values())))
    kept: list[int] = []
    dropped: list[DroppedRow] = []
    seen: dict[tuple[float, ...], int] = {}
    for i in range(count):
        row = rows[i] if rows is not None else i + 1
        values = {called[role]: float(column[i]) for role, column in columns.items()}
        reason = None
        if repeated is not None and repeated[i]:
            reason = "repeated data (epochs > 1)"
        elif held_out is not None and held_out[i]:
            reason = HELD_OUT_REASON
        elif bad := [name for name, value in values.items() if not math.isfinite(value)]:
            reason = f"{bad[0]} is not finite ({values[bad[0]]})"
        elif bad := [name for name, value in values.items() if value <= 0]:
            reason = f"{bad[0]} is not positive ({values[bad[0]]:g})"
        elif (first := seen.setdefault(tuple(values.values()), row)) != row:
            reason = f"exact duplicate of row {first}"
        if reason is None:
            kept.append(i)
        else:
            dropped.append(DroppedRow(row, reason))
    left: dict[str, Any] = {role: column[kept] for role, column in columns.items()}
    numbers = [rows[i] if rows is not None else i + 1 for i in kept]
    return Table(**left, dropped=dropped, columns=dict(names or {}), rows=numbers)


def read_table(
    path: str | Path,
    *,
    params: str = "params",
    tokens: str = "tokens",
    loss: str = "loss",
    flops: str | None = None,
    unique_tokens: str | None = None,
    active_params: str | None = None,
    keep_repeated: bool = False,
    keep_held_out: bool = False,
) -> Table:
    """Read and clean a table of runs; the format follows the suffix (.csv .tsv .json .jsonl .ndjson .parquet, or .gz).

    `params`, `tokens`, `loss`, `flops`, `unique_tokens` and `active_params` name the columns; where one of the first
    four is left at its own name and absent, a column with one of its other usual names is taken instead
    (`columns.ALIASES`), and `Table.columns` says which. Numbers are read as `numerals.read_numbers` says. Of an export
    of Weights & Biases with several steps of a run, the last that has a loss is taken. Rows whose `repeated` column is
    true are dropped unless `keep_repeated`: a second pass over data is worth less than fresh tokens, and a law in D
    does not model that. Rows whose `held_out` column is true are dropped unless `keep_held_out`. Raises `InputError`
    for a file that is missing, unreadable, empty or malformed, for a missing column, and for text in a numeric column.
    """
    path = Path(path)
    records = read_records(path)
    if not records:
        raise InputError(f"{path} has no rows")
    present = column_names(records)
    wanted = dict(zip(ROLES, (params, tokens, loss, flops, unique_tokens, active_params), strict=True))
    names = {role: find_column(path, role, name, present) for role, name in wanted.items() if name is not None}
    require(path, names.values(), present)
    records, earlier = _last_steps(path, records, present, names["loss"])
    numbers, notes = read_numbers(path, records, {name: role != "loss" for role, name in names.items()})
    columns: dict[str, Any] = {role: numbers[name] for role, name in names.items()}
    marks = {
        mark: [truth(path, row, mark, record.get(mark)) for row, record in records]
        for mark, keep in ((REPEATED, keep_repeated), (HELD_OUT, keep_held_out))
        if mark in present and not keep
    }
    table = clean(**columns, **marks, names=names, rows=[row for row, _ in records])
    if earlier:
        notes.append(
            f"of {counted(len(records) + len(earlier), 'row')} the last step of {counted(len(records), 'run')} is taken"
        )
    return replace(table, dropped=earlier + table.dropped, notes=notes)


def _last_steps(
    path: Path, records: list[Record], present: list[str], loss: str
) -> tuple[list[Record], list[DroppedRow]]:
    """Return the last row with a loss of every run in a history of Weights & Biases, and the rows dropped for it.

    A history has a column `_step` and a run's name in several rows; any other table is returned unchanged.
    """
    run = next((name for name in RUN_COLUMNS if name in present), None)
    if STEP not in present or run is None or len({record.get(run) for _, record in records}) == len(records):
        return records, []
    steps, _ = read_numbers(path, records, {STEP: True})
    last: dict[Any, int] = {}
    for i, (_, record) in enumerate(records):
        known = record.get(loss) is not None and str(record.get(loss)).strip().lower() not in {*MISSING, "inf"}
        before = last.get(record.get(run))
        if before is None or (known and not steps[STEP][i] < steps[STEP][before]):
            last[record.get(run)] = i
    kept = set(last.values())
    earlier = [
        DroppedRow(row, f"an earlier step of run {record.get(run)!r}")
        for i, (row, record) in enumerate(records)
        if i not in kept
    ]
    return [records[i] for i in sorted(kept)], earlier


def read_header(path: str | Path) -> list[str]:
    """Return the names of a table's columns. Raises as `read_table` does."""
    return column_names(read_records(Path(path)))
