"""The SHA-256 of every file of a folder, kept beside them in `checksums.json`: one changed bit anywhere is noticed."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    except FileNotFoundError as error:
        return f"its file {error.filename} is missing"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"its file {name} is missing"
        if name not in expected:
            return f"its file {name} does not belong to it"
        if actual[name] != expected[name]:
            return f"its file {name} is damaged (checksum differs)"
    return None


def checksums(folder: Path) -> dict[str, str]:
    """By the path inside the folder; `checksums.json` itself is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    with ThreadPoolExecutor(_THREADS) as threads:
        return {
            str(path.relative_to(folder)): digest
            for path, digest in zip(files, threads.map(file_sha256, files), strict=True)
        }
