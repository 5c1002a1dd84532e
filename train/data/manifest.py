"""`manifest.json` of a prepared data folder: its content, files and hash."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import InputError
from train.files import file_sha256

SCHEMA_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Training or validation documents. `bytes` counts UTF-8 text; `tokens` includes end tokens."""

    documents: int
    bytes: int
    tokens: int
    shards: tuple[Shard, ...]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, end tokens included."""
        return self.bytes / self.tokens


@dataclass(frozen=True)
class LabelFile:
    """One file of class indices, one per document in the order of the shards. counts: documents per class."""

    name: str
    sha256: str
    counts: dict[str, int]


@dataclass(frozen=True)
class ArrayFile:
    """One file of numbers that belong to a split of examples: what is trained, where documents end, weights, labels."""

    name: str
    dtype: str
    length: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Record of a prepared data folder.

    source_hash: SHA-256 over the hashes of all documents, and of their labels, in reading order. labels: class names,
    empty for unlabelled data; label_files: by split. conflicting_labels: dropped duplicates whose label differs from
    that of the document that was kept. tokenizer_companions: SHA-256, by file name, of the files next to
    `tokenizer_file` that also define the tokenizer.

    Of a folder to fine-tune on, kind is "chat", "preference", "rated" or "prompts"; array_files: by split, what lies
    beside its tokens; trained_tokens: by split; longest: tokens of the longest document. dropped: rows that gave no
    example, by reason; altered: rows and turns that are not there in full, and pairs whose prompts differ.
    """

    source: str
    source_hash: str
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    splits: dict[str, Split]
    duplicates_dropped: int
    empty_skipped: int
    files_skipped: int
    bytes_replaced: int
    arguments: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    unlabelled_skipped: int = 0
    conflicting_labels: int = 0
    labels: tuple[str, ...] = ()
    label_files: dict[str, LabelFile] = field(default_factory=dict)
    tokenizer_file: str = "tokenizer.model"
    tokenizer_companions: dict[str, str] = field(default_factory=dict)
    kind: str = "text"
    array_files: dict[str, tuple[ArrayFile, ...]] = field(default_factory=dict)
    trained_tokens: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    altered: dict[str, int] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what a model is trained on: tokens, labels and tokenizer, but no paths."""
        content: dict[str, Any] = {
            "schema_version": self.schema_version,
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "splits": {name: asdict(split) for name, split in self.splits.items()},
        }
        if self.labels:
            content["labels"] = self.labels
            content["label_files"] = {name: asdict(file) for name, file in self.label_files.items()}
        if self.tokenizer_file != "tokenizer.model":
            content["tokenizer_file"] = self.tokenizer_file
        if self.tokenizer_companions:
            content["tokenizer_companions"] = self.tokenizer_companions
        if self.kind != "text":
            content["kind"] = self.kind
            content["array_files"] = {
                name: [asdict(file) for file in files] for name, files in self.array_files.items()
            }
            content["trained_tokens"] = self.trained_tokens
            content["longest"] = self.longest
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_files(self) -> dict[str, str]:
        """SHA-256 of the tokenizer's files by name, `tokenizer_file` first."""
        return {self.tokenizer_file: self.tokenizer_hash, **self.tokenizer_companions}

    @property
    def dtype(self) -> np.dtype:
        """Integer type of the shards."""
        return token_dtype(self.vocab_size)

    @property
    def label_dtype(self) -> np.dtype:
        """Integer type of the class indices."""
        return token_dtype(len(self.labels))

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`, derived numbers included."""
        content: dict[str, Any] = {"schema_version": self.schema_version, "hash": self.hash} | asdict(self)
        for name, split in self.splits.items():
            content["splits"][name]["bytes_per_token"] = split.bytes_per_token
        return content


def token_dtype(vocab_size: int) -> np.dtype:
    """Return uint16 if it holds every id below vocab_size, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into the folder."""
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def load_manifest(folder: str | Path) -> Manifest:
    """Read `manifest.json` and check its schema and hash, the tokenizer's hash, and the sizes of all arrays.

    Raises InputError if the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise InputError(f"no data folder at {folder}; make one with `isoflop data prepare SOURCE --out {folder}`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {MANIFEST_NAME}, so it is not a prepared data folder; make one by `isoflop data prepare`"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged (no valid JSON: {error}); prepare the data again") from error
    manifest = _parse(content, path)
    _check_files(manifest, folder)
    return manifest


def verify_checksums(manifest: Manifest, folder: Path) -> None:
    """Check the SHA-256 of all shards, labels and arrays. Raises InputError at the first one that differs."""
    files: list[Shard | LabelFile | ArrayFile] = [shard for split in manifest.splits.values() for shard in split.shards]
    arrays = [file for files in manifest.array_files.values() for file in files]
    for file in [*files, *manifest.label_files.values(), *arrays]:
        if file_sha256(folder / file.name) != file.sha256:
            raise InputError(
                f"{folder / file.name} is damaged: its SHA-256 is not the manifest's; prepare the data again"
            )


def _parse(content: Any, path: Path) -> Manifest:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {version!r}, this isoflop reads version {SCHEMA_VERSION};"
            " prepare the data again"
        )
    try:
        values = {}
        for known in fields(Manifest):
            required = known.default is MISSING and known.default_factory is MISSING
            if required or known.name in content:
                values[known.name] = content[known.name]
        values["splits"] = {
            name: Split(
                documents=split["documents"],
                bytes=split["bytes"],
                tokens=split["tokens"],
                shards=tuple(Shard(**shard) for shard in split["shards"]),
            )
            for name, split in content["splits"].items()
        }
        values["labels"] = tuple(content.get("labels", ()))
        values["label_files"] = {name: LabelFile(**file) for name, file in content.get("label_files", {}).items()}
        values["array_files"] = {
            name: tuple(ArrayFile(**file) for file in files) for name, files in content.get("array_files", {}).items()
        }
        manifest = Manifest(**values)
        intact = manifest.hash == content["hash"] and set(manifest.splits) == set(SPLITS)
        intact = intact and set(manifest.label_files) == set(SPLITS if manifest.labels else ())
        intact = intact and set(manifest.array_files) == set(() if manifest.kind == "text" else SPLITS)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged (missing or wrong: {error}); prepare the data again") from error
    if not intact:
        raise InputError(f"{path} is damaged (its content does not give its own hash); prepare the data again")
    return manifest


def _check_files(manifest: Manifest, folder: Path) -> None:
    for name, sha256 in manifest.tokenizer_files.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file} is missing; prepare the data again")
        if file_sha256(file) != sha256:
            relation = "is not" if name == manifest.tokenizer_file else "is not from"
            raise InputError(f"{file} {relation} the tokenizer of the shards in this folder; prepare the data again")
    for name, split in manifest.splits.items():
        for shard in split.shards:
            _check_array(folder / shard.name, manifest.dtype, shard.tokens)
        if manifest.labels:
            _check_array(folder / manifest.label_files[name].name, manifest.label_dtype, split.documents)
        for array in manifest.array_files.get(name, ()):
            _check_array(folder / array.name, np.dtype(array.dtype), array.length)


def _check_array(path: Path, dtype: np.dtype, length: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing; prepare the data again")
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is damaged or cut short ({error}); prepare the data again") from error
    if array.shape != (length,) or array.dtype != dtype:
        raise InputError(
            f"{path} holds {array.dtype} {array.shape} where the manifest says {dtype} ({length},);"
            " prepare the data again"
        )
