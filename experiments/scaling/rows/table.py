"""A table of runs: read from CSV, JSONL or Parquet, cleaned by rule.

One row is one finished run: parameters N (count), training tokens D (count), final validation loss L (nats
per token) and optionally its compute C (FLOPs), unique tokens and active parameters. What cannot enter a fit is
dropped by a stated rule and listed; what suggests that the file is not what its reader thinks (a missing column,
text among numbers) is an error.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.scaling.rows.columns import find_column, number, require, truth
from model.errors import InputError

REPEATED = "repeated"  # a boolean-like column of this name marks runs that saw their data more than once
HELD_OUT = "held_out"  # and one of this name the runs that a law is to be tested on
HELD_OUT_REASON = "held out"
ROLES = ("params", "tokens", "loss", "flops", "unique_tokens", "active_params")


@dataclass(frozen=True)
class Table:
    """Usable runs as float64 columns, and what was left out; rows count from 1, without a header."""

    params: Float[np.ndarray, " rows"]
    tokens: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]
    flops: Float[np.ndarray, " rows"] | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)
    unique_tokens: Float[np.ndarray, " rows"] | None = None
    """Tokens before the first repeat; of runs that saw everything once, `tokens`."""
    active_params: Float[np.ndarray, " rows"] | None = None
    """Parameters that one token uses; `params` then counts all experts."""
    columns: dict[str, str] = field(default_factory=dict)
    """By role, the column of the file that was read."""
    rows: list[int] = field(default_factory=list)
    """The numbers of the rows that are left."""

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
    called in messages, `rows` how the rows are numbered. Raises `InputError` where the columns are not one-dimensional
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
    dropped: list[dict[str, Any]] = []
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
            dropped.append({"row": row, "reason": reason})
    left = {role: column[kept] for role, column in columns.items()}
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
    """Read and clean a table of runs; the format follows the suffix (.csv .tsv .jsonl .ndjson .parquet).

    `params`, `tokens`, `loss`, `flops`, `unique_tokens` and `active_params` name the columns; where one of the first
    four is left at its own name and absent, a column that others call so stands in for it (`columns.ALIASES`), and
    `Table.columns` says which. Counts may be written as 70M or 1.4T. Rows whose `repeated` column is true are
    dropped unless `keep_repeated`: a second pass over data is worth less than fresh tokens, and a law in D
    does not know that. Rows whose `held_out` column is true are dropped unless `keep_held_out`. Raises `InputError`
    for a file that is missing, unreadable, empty or malformed, for a missing column, and for text in a numeric column.
    """
    path = Path(path)
    records = _records(path)
    if not records:
        raise InputError(f"{path} has no rows")
    present = list(dict.fromkeys(key for _, record in records for key in record))
    wanted = dict(zip(ROLES, (params, tokens, loss, flops, unique_tokens, active_params), strict=True))
    names = {role: find_column(path, role, name, present) for role, name in wanted.items() if name is not None}
    require(path, names.values(), present)
    columns: dict[str, Any] = {
        role: [number(path, row, name, record.get(name), count=role != "loss") for row, record in records]
        for role, name in names.items()
    }
    marks = {
        mark: [truth(path, row, mark, record.get(mark)) for row, record in records]
        for mark, keep in ((REPEATED, keep_repeated), (HELD_OUT, keep_held_out))
        if mark in present and not keep
    }
    return clean(**columns, **marks, names=names, rows=[row for row, _ in records])


def read_header(path: str | Path) -> list[str]:
    """The names of a table's columns. Raises as `read_table` does."""
    return list(dict.fromkeys(key for _, record in _records(Path(path)) for key in record))


def _records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Every record with its number, counted from 1."""
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file; name a .csv, .jsonl or .parquet table")
    suffix = path.suffix.lower()
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        if suffix in {".parquet", ".pq"}:
            return _parquet(path)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise InputError(f"{path} is empty")
    if suffix in {".jsonl", ".ndjson"}:
        return _jsonl(path, text)
    if suffix in {".csv", ".tsv", ".txt", ""}:
        return _csv(path, text)
    raise InputError(f"{path}: unknown suffix {suffix!r}; use .csv, .jsonl or .parquet")


def _csv(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    header_line = text.lstrip().splitlines()[0]
    delimiter = max(",;\t", key=header_line.count)  # the comma on a tie, as max keeps the first
    try:
        lines = [
            line for line in csv.reader(text.splitlines(), delimiter=delimiter) if any(cell.strip() for cell in line)
        ]
    except csv.Error as error:
        raise InputError(f"{path} is not valid CSV: {error}") from error
    header = [cell.strip() for cell in lines[0]]
    doubled = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if doubled:
        raise InputError(f"{path} has the column {doubled[0]!r} more than once")
    records = []
    for row, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise InputError(f"{path}, row {row}: {len(line)} cells where the header has {len(header)}")
        records.append((row, dict(zip(header, line, strict=True))))
    return records


def _jsonl(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    records = []
    for row, line in enumerate((line for line in text.splitlines() if line.strip()), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, row {row}: not valid JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, row {row}: a row is one JSON object, got {type(record).__name__}")
        records.append((row, record))
    return records


def _parquet(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"reading {path} needs pyarrow: pip install 'isoflop[parquet]', or convert the table to CSV"
        ) from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a readable Parquet file: {reason}") from error
    return list(enumerate(table.to_pylist(), start=1))
