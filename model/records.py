"""Read folders and JSON documents that carry checksums, so that a single changed bit is detected.

A folder holds the SHA-256 of each of its files in `checksums.json`; a sealed JSON document holds that of its other
fields. `train.checksums` and `train.files` write them.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from model.errors import InputError

CHECKSUMS = "checksums.json"
_THREADS = 4  # hashing releases the GIL; more threads would take cores from training


def verify(folder: Path, parts: tuple[str, ...] = ()) -> str | None:
    """Return None if every file is as it was written, otherwise what is wrong.

    parts: check only the files whose path within the folder starts with one of these, and open no others.
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
    """Return {path within the folder: SHA-256} of the files that `verify` checks, without `checksums.json` itself."""
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / CHECKSUMS
    }
    files = {name: path for name, path in files.items() if _is_in(name, parts)}
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(files, threads.map(file_sha256, files.values()), strict=True))


def read_intact(folder: Path, name: str) -> Any | None:
    """Return the content of one JSON file of the folder, or None if it is missing or damaged."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        content = (folder / name).read_bytes()
        return json.loads(content) if hashlib.sha256(content).hexdigest() == expected[name] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_sealed(path: Path, besides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the document that `write_sealed` wrote, without its checksum.

    A document without a checksum, from an earlier version, is not checked. besides: fields that the checksum does not
    include. Raises FileNotFoundError if there is no file, and InputError if it cannot be read or was changed.
    """
    try:
        document = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; put back a copy of it, or choose another folder") from None
    checksum = document.pop("checksum", None) if isinstance(document, dict) else ""
    if checksum is not None and checksum != seal(document, besides):
        raise InputError(
            f"{path} is not what was written; put back a copy of it, or choose another folder"
            ' (if it was edited on purpose, take its "checksum" out)'
        )
    return document


def seal(document: Any, besides: tuple[str, ...]) -> str:
    """Return the checksum of a document's fields, without those named in `besides`.

    It is the same before writing and after reading the document, because JSON preserves floats exactly.
    """
    fields = json.loads(json_text(document))
    kept = {name: value for name, value in fields.items() if name not in besides} if isinstance(fields, dict) else None
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def json_text(value: Any) -> str:
    """Return indented JSON, in which NaN and infinities become null."""
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
    """Return the SHA-256 of a file."""
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
