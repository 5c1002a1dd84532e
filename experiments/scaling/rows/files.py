"""Read table files: CSV in its usual variants, JSON, Parquet, gzipped or not."""

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

from experiments.words import counted
from model.errors import InputError

Record = tuple[int, dict[str, Any]]
"""(row number from 1, cells by column)."""
CSV_SUFFIXES = {".csv", ".tsv", ".txt", ""}
LINES_SUFFIXES = {".jsonl", ".ndjson"}
PARQUET_SUFFIXES = {".parquet", ".pq"}
_BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def read_records(path: Path) -> list[Record]:
    """Return every record of a table; the format follows the suffix, before .gz where the file is compressed.

    CSV may be separated by commas, semicolons or tabs, in UTF-8 or, as Excel saves "Unicode text", in UTF-16. Raises
    `InputError` for a file that cannot be read.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file; name a .csv, .jsonl or .parquet table")
    suffix = path.suffix.lower()
    try:
        content = path.read_bytes()
        if suffix == ".gz":
            content, suffix = gzip.decompress(content), Path(path.stem).suffix.lower()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise InputError(f"{path} is empty")
    if suffix in PARQUET_SUFFIXES:
        return _parquet(path, content)
    if suffix in {".xlsx", ".xls", ".ods"}:
        raise InputError(f"{path}: unknown suffix {suffix!r}; save the sheet as .csv")
    if suffix not in {*CSV_SUFFIXES, *LINES_SUFFIXES, ".json"}:
        raise InputError(
            f"{path}: unknown suffix {suffix!r}; use .csv, .tsv, .json, .jsonl or .parquet, each also as .gz"
        )
    text = _text(path, content)
    if not text.strip():
        raise InputError(f"{path} is empty")
    if suffix == ".json":
        return _json(path, text)
    return _jsonl(path, text) if suffix in LINES_SUFFIXES else _csv(path, text)


def column_names(records: list[Record]) -> list[str]:
    """Return every column that some record has, in order."""
    return list(dict.fromkeys(key for _, record in records for key in record))


def _text(path: Path, content: bytes) -> str:
    marks = (encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if content.startswith(mark))
    encoding = next(marks, "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        named = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise InputError(f"{path} is not {named} text (byte {error.start}); save it as CSV in UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path} is not UTF-8 text but holds zero bytes; save it as CSV in UTF-8")
    return text


def _csv(path: Path, text: str) -> list[Record]:
    text = text.lstrip()
    stated = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    if stated:
        text = text[stated.end() :]
    unquoted = re.sub(r'"[^"]*"', "", text)
    header_line = unquoted.lstrip().splitlines()[0] if unquoted.strip() else ""
    delimiter = (
        stated[1] if stated else max(",;\t", key=header_line.count)
    )  # the comma on a tie, as max keeps the first
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [line for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise InputError(f"{path} is not valid CSV: {error}") from error
    if not lines:
        raise InputError(f"{path} has no rows")
    header = [cell.strip() for cell in lines[0]]
    header[0] = header[0].removeprefix("#").strip()  # as NumPy writes it
    doubled = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if doubled:
        raise InputError(f"{path} has the column {doubled[0]!r} more than once")
    records = []
    for row, line in enumerate(lines[1:], start=1):
        while len(line) > len(header) and not line[-1].strip():  # a separator at the end of every line
            line.pop()
        if len(line) != len(header):
            hint = "; quote cells that hold the separator" if len(line) > len(header) else ""
            raise InputError(
                f"{path}, row {row}: {counted(len(line), 'cell')} where the header has {len(header)}{hint}"
            )
        records.append((row, {name: cell for name, cell in zip(header, line, strict=True) if name}))
    return records


def _jsonl(path: Path, text: str) -> list[Record]:
    records = []
    for row, line in enumerate((line for line in text.split("\n") if line.strip()), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, row {row}: not valid JSON ({error.msg})") from error
        records.append(_object(path, row, record))
    return records


def _json(path: Path, text: str) -> list[Record]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error.msg} in line {error.lineno})") from error
    if not isinstance(document, list):
        raise InputError(f"{path} should be a list of objects, one a run, but is one {type(document).__name__}")
    return [_object(path, row, record) for row, record in enumerate(document, start=1)]


def _object(path: Path, row: int, record: Any) -> Record:
    if not isinstance(record, dict):
        raise InputError(f"{path}, row {row}: a row is one JSON object, got {type(record).__name__}")
    return row, _flat(record)


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested objects, as Weights & Biases has in config and summary, with their names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _parquet(path: Path, content: bytes) -> list[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"reading {path} needs pyarrow: pip install 'isoflop[parquet]', or convert the table to CSV"
        ) from error
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a readable Parquet file: {reason}") from error
    return [(row, _flat(record)) for row, record in enumerate(table.to_pylist(), start=1)]
