"""Rows of examples out of .jsonl, .json and .parquet files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import InputError
from train.data.examples.formats import canonical
from train.data.sources import file_size, files_below, unreadable

_SUFFIXES = (".jsonl", ".json", ".parquet")
_PARQUET_ROWS = 256  # read at once


class Row(NamedTuple):
    """One row: where a person finds it, and its object; None where the line is no JSON object."""

    where: str
    value: dict[str, Any] | None


class RowSource:
    """The rows of a file, or of all files of a folder in sorted order; the counts are of the latest reading.

    A .jsonl file has an object in each line, a .json file one list of objects, a .parquet file a row for each. Other
    files of a folder are counted in `files_skipped`. `total` and `done` measure progress in bytes. `bytes_replaced`
    counts bytes that are no valid UTF-8, and lone surrogates, which were replaced by U+FFFD.
    """

    def __init__(self, source: str | Path):
        path = Path(source)
        self.name = str(source)
        try:
            found = files_below(path) if path.is_dir() else [path]
            if not found or not all(map(Path.is_file, found)):
                raise InputError(
                    f"no file or folder {self.name}; examples are read from a .jsonl, .json or .parquet file, or a"
                    " folder of them"
                )
            self._files = [file for file in found if file.suffix in _SUFFIXES]
            self.total = sum(map(file_size, self._files), 0.0)
        except OSError as error:
            raise unreadable(path, error) from error
        if not self._files:
            raise InputError(f"{self.name} is no .jsonl, .json or .parquet file of examples, and has none in it")
        self.files_skipped = len(found) - len(self._files)
        self.done = 0.0
        self.bytes_replaced = 0

    def __iter__(self) -> Iterator[Row]:
        self.done, self.bytes_replaced = 0.0, 0
        for path in self._files:
            read = {".jsonl": self._lines, ".json": self._list, ".parquet": self._table}[path.suffix]
            try:
                yield from read(path)
            except OSError as error:
                raise unreadable(path, error) from error

    def _lines(self, path: Path) -> Iterator[Row]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                self.done += len(line)
                text = self._decode(line)
                if text.strip():
                    yield Row(f"{path}, line {number}", self._object(_parsed(text)))

    def _list(self, path: Path) -> Iterator[Row]:
        rows = _parsed(self._decode(path.read_bytes()))
        if not isinstance(rows, list):
            raise InputError(f"{path} is no JSON list of objects; write one object in each line of a .jsonl file")
        for number, row in enumerate(rows, 1):
            self.done += file_size(path) / len(rows)
            yield Row(f"{path}, row {number}", self._object(row))

    def _table(self, path: Path) -> Iterator[Row]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise InputError(f"{path} needs pyarrow; install it with `pip install isoflop[parquet]`") from error
        number = 0
        try:
            with parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        self.done += file_size(path) / table.metadata.num_rows
                        yield Row(f"{path}, row {number}", self._object(row))
        except ArrowException as error:
            raise InputError(f"{path} is not a Parquet file that can be read: {error}") from error

    def _object(self, value: Any) -> dict[str, Any] | None:
        """Return an object without lone surrogates, which JSON can spell; None for another value."""
        if not isinstance(value, dict):
            return None
        text = canonical(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            return _parsed(self._decode(text.encode("utf-8", "surrogatepass")))
        return value

    def _decode(self, raw: bytes) -> str:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            self.bytes_replaced += len(raw) - len(raw.decode(errors="ignore").encode())
            text = raw.decode(errors="replace")
        return text.removeprefix("\ufeff")


def _parsed(text: str) -> Any:
    """Return the value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
