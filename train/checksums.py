"""The SHA-256 of every file of a folder, kept beside them in `checksums.json`: one changed bit anywhere is noticed."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train.files import file_sha256, json_text

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


def checksums(folder: Path) -> dict[str, str]:
    """By the path inside the folder; `checksums.json` itself is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    with ThreadPoolExecutor(_THREADS) as threads:
        return {
            str(path.relative_to(folder)): digest
            for path, digest in zip(files, threads.map(file_sha256, files), strict=True)
        }
