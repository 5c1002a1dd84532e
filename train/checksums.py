"""Checksums, so that one changed bit anywhere is noticed.

The SHA-256 of every file of a folder is kept beside them in `checksums.json`; a JSON document of our own holds that of
its other fields.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from model.errors import InputError
from train.files import file_sha256, json_text, write_atomically

CHECKSUMS = "checksums.json"
_THREADS = 4  # hashing lets go of the interpreter; more would take the cores of the training beside it


def verify(folder: Path) -> str | None:
    """None if every file is as it was written, else what is wrong."""
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8")
        expected = json.loads(text)
    except FileNotFoundError:
        return "it was never finished (no checksums)"
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    if text != json_text(expected) or not isinstance(expected, dict):
        return f"{CHECKSUMS} is damaged"
    try:
        actual = checksums(folder)
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


def read_intact(folder: Path, name: str) -> Any | None:
    """One JSON file of the folder, checked alone; None if it is missing or damaged."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        content = (folder / name).read_bytes()
        return json.loads(content) if hashlib.sha256(content).hexdigest() == expected[name] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_sealed(path: Path, document: dict[str, Any], besides: tuple[str, ...] = ()) -> None:
    """Write a JSON document with a checksum of its fields, but for those named in `besides`, whole or not at all."""
    write_atomically(path, json_text(document | {"checksum": _checksum(document, besides)}))


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
    if written is not None and written != _checksum(document, besides):
        raise InputError(
            f"{path} is not what was written; put back a copy of it, or choose another folder"
            ' (if it was edited on purpose, take its "checksum" out)'
        )
    return document


def _checksum(document: Any, besides: tuple[str, ...]) -> str:
    """The same before the document is written and after it is read: floats and their text are one to one."""
    fields = json.loads(json_text(document))
    kept = {name: value for name, value in fields.items() if name not in besides} if isinstance(fields, dict) else None
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """By the path inside the folder; `checksums.json` itself is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    with ThreadPoolExecutor(_THREADS) as threads:
        return {
            str(path.relative_to(folder)): digest
            for path, digest in zip(files, threads.map(file_sha256, files), strict=True)
        }
