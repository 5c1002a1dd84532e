"""A table of runs: read from CSV, JSONL or Parquet, cleaned by rule.

One row is one finished run: parameters N (count), training tokens D (count), final validation loss L (nats
per token) and optionally its compute C (FLOPs). What cannot enter a fit is dropped by a stated rule and
listed; what suggests that the file is not what its reader thinks (a missing column, text among numbers) is
an error.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from model.errors import InputError

REPEATED = "repeated"  # a boolean-like column of this name marks runs that saw their data more than once


@dataclass(frozen=True)
class Table:
    """Usable runs as float64 columns, and what was left out; rows count from 1, without a header."""

    params: Float[np.ndarray, " rows"]
    tokens: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]
    flops: Float[np.ndarray, " rows"] | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)


def clean(
    params: Any,
    tokens: Any,
    loss: Any,
    flops: Any = None,
    *,
    names: Sequence[str] = ("params", "tokens", "loss", "flops"),
    repeated: Sequence[bool] | None = None,
    rows: Sequence[int] | None = None,
) -> Table:
    """Drop, in this order: repeated data, non-finite numbers, non-positive numbers, exact duplicates.

    A duplicate agrees with an earlier row in every column used, to the last bit. Raises `InputError` where
    the columns are not one-dimensional numbers of one length.
    """
    columns = {}
    for name, values in zip(names, (params, tokens, loss, flops), strict=True):
        if values is None:
            continue
        try:
            columns[name] = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must be numbers: {error}") from error
        if columns[name].ndim != 1:
            raise InputError(f"{name} must be one-dimensional, got shape {columns[name].shape}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"columns differ in length: {', '.join(f'{k} has {v}' for k, v in lengths.items())}")

    count = len(next(iter(columns.values())))
    kept: list[int] = []
    dropped: list[dict[str, Any]] = []
    seen: dict[tuple[float, ...], int] = {}
    for i in range(count):
        number = rows[i] if rows is not None else i + 1
        values = {name: float(column[i]) for name, column in columns.items()}
        reason = None
        if repeated is not None and repeated[i]:
            reason = "repeated data (epochs > 1)"
        elif bad := [name for name, value in values.items() if not math.isfinite(value)]:
            reason = f"{bad[0]} is not finite ({values[bad[0]]})"
        elif bad := [name for name, value in values.items() if value <= 0]:
            reason = f"{bad[0]} is not positive ({values[bad[0]]:g})"
        elif (first := seen.setdefault(tuple(values.values()), number)) != number:
            reason = f"exact duplicate of row {first}"
        if reason is None:
            kept.append(i)
        else:
            dropped.append({"row": number, "reason": reason})
    arrays = [column[kept] for column in columns.values()]
    return Table(arrays[0], arrays[1], arrays[2], arrays[3] if flops is not None else None, dropped)


def read_table(
    path: str | Path,
    *,
    params: str = "params",
    tokens: str = "tokens",
    loss: str = "loss",
    flops: str | None = None,
    keep_repeated: bool = False,
) -> Table:
    """Read and clean a table of runs; the format follows the suffix (.csv .tsv .jsonl .ndjson .parquet).

    `params`, `tokens`, `loss` and `flops` name the columns. Rows whose `repeated` column is true are
    dropped unless `keep_repeated`: a second pass over data is worth less than fresh tokens, and a law in D
    does not know that. Raises `InputError` for a file that is missing, unreadable, empty or malformed, for
    a missing column, and for text in a numeric column.
    """
    path = Path(path)
    records = _records(path)
    if not records:
        raise InputError(f"{path} has no rows")
    names = [params, tokens, loss] + ([flops] if flops is not None else [])
    present = list(dict.fromkeys(key for _, record in records for key in record))
    _require(path, names, present)
    columns = [[_number(path, row, name, record.get(name)) for row, record in records] for name in names]
    repeated = None
    if REPEATED in present and not keep_repeated:
        repeated = [_truth(path, row, record.get(REPEATED)) for row, record in records]
    return clean(
        columns[0],
        columns[1],
        columns[2],
        columns[3] if flops is not None else None,
        names=(params, tokens, loss, flops or "flops"),
        repeated=repeated,
        rows=[row for row, _ in records],
    )


def _require(path: Path, names: list[str], present: list[str]) -> None:
    import difflib

    missing = [name for name in names if name not in present]
    if not missing:
        return
    hints = []
    lowered = {column.lower(): column for column in present}
    for name in missing:
        close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
        hints += [f"{lowered[match]!r} for {name!r}" for match in close]
    hint = f"; close names: {', '.join(hints)}" if hints else ""
    raise InputError(
        f"{path} has no column {' or '.join(repr(name) for name in missing)}; "
        f"its columns are {', '.join(repr(column) for column in present)}{hint}"
    )


def _number(path: Path, row: int, name: str, value: Any) -> float:
    """NaN for what is empty (dropped later by rule); an error for what was never a number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    if not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise InputError(f"{path}, row {row}: column {name!r} should be a number but holds {value!r}")


def _truth(path: Path, row: int, value: Any) -> bool:
    if value is None:
        return False
    text = str(value).strip().lower()
    if text in {"true", "1", "1.0", "yes", "y"}:
        return True
    if text in {"false", "0", "0.0", "no", "n", "", "nan", "none"}:
        return False
    raise InputError(f"{path}, row {row}: column {REPEATED!r} should be true or false but holds {value!r}")


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
