"""The folder that data are prepared in: empty, or finished with the same arguments; complete, or not there."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from model.errors import InputError, check_at_least_one, check_number
from model.tokenizer import Tokenizer
from model.tokenizer.files import file_hashes, tokenizer_files
from train.data.manifest import MANIFEST_NAME, Manifest, load_manifest, verify_checksums
from train.files import is_full


def check_arguments(tokenizer: Tokenizer | None, validation_fraction: float, shard_tokens: int) -> None:
    """Raise InputError for a tokenizer without an end token, or numbers that are out of range."""
    if tokenizer is not None and not tokenizer.eos_ids:
        raise InputError(
            f"the tokenizer {tokenizer.path} has no end token, which must follow each document; take another, or name "
            "it as eos_token in a tokenizer_config.json next to the tokenizer.json"
        )
    check_number("validation_fraction", validation_fraction, above=0, below=1, hint="0.05 is usual")
    check_at_least_one(shard_tokens=shard_tokens)


def check_outside(out: Path, source: Path) -> None:
    """Raise InputError if the folder to be made lies inside the folder that is read."""
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise InputError(
            f"out={out} is inside the source folder {source} and would become part of it; choose another --out"
        )


def existing_manifest(out: Path, arguments: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a finished folder made with the same arguments, None if `out` is new or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise InputError(f"out={out} is a file; give a new folder")
    if not (out / MANIFEST_NAME).exists():
        raise InputError(f"out={out} has other files and no {MANIFEST_NAME}; give a new or an empty folder")
    manifest = load_manifest(out)
    kind = arguments.get("kind", "text")
    if manifest.kind != kind:
        raise InputError(
            f"{out} was made with other arguments (kind={manifest.kind} there, {kind} requested); remove the folder or"
            " choose another --out"
        )
    different = [
        f"{name}={manifest.arguments.get(name)!r} there, {value!r} requested"
        for name, value in arguments.items()
        if manifest.arguments.get(name) != value
    ]
    if different:
        raise InputError(
            f"{out} was made with other arguments ({'; '.join(different)}); remove the folder or choose another --out"
        )
    return manifest


def check_unchanged(manifest: Manifest, out: Path, source: str, source_hash: str) -> None:
    """Raise InputError if a finished folder was made from other content than the source has now, or is damaged."""
    if source_hash != manifest.source_hash:
        raise InputError(
            f"{out} was made from other documents ({manifest.source}: {manifest.source_hash[:12]})"
            f" than {source} holds now ({source_hash[:12]}); remove the folder or choose another --out"
        )
    verify_checksums(manifest, out)


@contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """Provide a hidden folder beside `out`, which is renamed to `out` at the end and removed after an error.

    The folder is locked by its process, so the leftovers of a killed process differ from the work of a running one.
    """
    out = out.absolute()
    folder = out.with_name(f".{out.name}.preparing")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(error):
            raise
        raise InputError(f"cannot make the folder {out}: {error.strerror}; choose another") from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is preparing {out} now; wait for it, then try again") from error
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
            os.replace(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: another process uses it
                for parent in new_parents:
                    parent.rmdir()
            raise
    finally:
        os.close(lock)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return the hash of a tokenizer's file, or the hash of all hashes if it has several files."""
    hashes = file_hashes(tokenizer_files(tokenizer))
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
