"""Read what carries its own checksum, so that one changed bit anywhere is noticed.

A folder keeps the SHA-256 of every one of its files in `checksums.json`; a JSON document of ours holds that of its
other fields. Who writes them is `train.checksums` and `train.files`.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from model.errors import InputError

CHECKSUMS = "checksums.json"
_THREADS = 4  # hashing lets go of the interpreter; more would take the cores of the training beside it


def verify(folder: Path, parts: tuple[str, ...] = ()) -> str | None:
    """None if every file is as it was written, else what is wrong.

    parts: only the files whose path inside the folder starts with one of these; no other file is opened.
    """
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8")
        expected = json.loads(text)
    except FileNotFoundError:
        return "it was never finished (no checksums)"
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    if text != json_text(expected) or not isinstance(expected, dict):
        return f"{CHECKSUMS} is damaged"
    expected = {name: digest for name, digest in expected.items() if _is_in(name, parts)}
    try:
        actual = checksums(folder, parts)
    except OSError as error:
        return f"its file {error.filename} cannot be read ({error.strerror})"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"its file {name} is missing"
        if name not in expected:
            return f"its file {name} does not belong to it"
        if actual[name] != expected[name]:
            return f"its file {name} is damaged (checksum differs)"
    return None


def checksums(folder: Path, parts: tuple[str, ...] = ()) -> dict[str, str]:
    """By the path inside the folder, of the files that `verify` takes; `checksums.json` itself is left out."""
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / CHECKSUMS
    }
    files = {name: path for name, path in files.items() if _is_in(name, parts)}
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(files, threads.map(file_sha256, files.values()), strict=True))


def read_intact(folder: Path, name: str) -> Any | None:
    """One JSON file of the folder, checked alone; None if it is missing or damaged."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        content = (folder / name).read_bytes()
        return json.loads(content) if hashlib.sha256(content).hexdigest() == expected[name] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_sealed(path: Path, besides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what `write_sealed` wrote, without its checksum; a document from before there were any is taken as it is.

    Raises FileNotFoundError where there is none, and InputError where it cannot be read or is not what was written.
    """
    try:
        document = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; put back a copy of it, or choose another folder") from None
    written = document.pop("checksum", None) if isinstance(document, dict) else ""
    if written is not None and written != seal(document, besides):
        raise InputError(
            f"{path} is not what was written; put back a copy of it, or choose another folder"
            ' (if it was edited on purpose, take its "checksum" out)'
        )
    return document


def seal(document: Any, besides: tuple[str, ...]) -> str:
    """Return the checksum of a document's fields, but for those named in `besides`.

    It is the same before the document is written and after it is read: floats and their text are one to one.
    """
    fields = json.loads(json_text(document))
    kept = {name: value for name, value in fields.items() if name not in besides} if isinstance(fields, dict) else None
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def json_text(value: Any) -> str:
    """Return the indented JSON that every file of ours holds; NaN and infinities become null."""
    return json.dumps(_finite(value), indent=1, default=_plain) + "\n"


def check_output_folder(
    folder: Path,
    kind: str,
    lacking: str,
    advice: str = "choose another folder",
    *,
    replaceable: bool = False,
    ignore_hidden: bool = False,
) -> None:
    """Raise InputError unless a folder can be written: it is new, empty, or its content is replaceable.

    kind: what is written, such as "a run". lacking: the missing record of an earlier one, such as "has no run.json".
    ignore_hidden: a folder with no files but hidden ones counts as empty.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; {kind} needs a folder of its own")
    files = [file for file in folder.iterdir() if not (ignore_hidden and file.name.startswith("."))]
    if files and not replaceable:
        raise InputError(f"{folder} is not empty and {lacking}; {advice}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    return not parts or name.startswith(parts)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return _finite(value.item())
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
