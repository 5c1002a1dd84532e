"""Prepare a data folder from a corpus: deduplicate, split, train a tokenizer, encode, all or nothing."""

import fcntl
import hashlib
import io
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from model.checks import check_at_least_one, check_number
from model.errors import InputError
from model.tokenizer import Tokenizer, load_tokenizer
from model.tokenizer.files import file_hashes, save_tokenizer, tokenizer_files
from train.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    LabelFile,
    Manifest,
    Split,
    load_manifest,
    save_manifest,
    token_dtype,
    verify_checksums,
)
from train.data.shards import ShardWriter
from train.data.sources import NAMED, Document, Source, open_source
from train.data.tokenizer_training import TextSample, check_vocab_size, train_tokenizer
from train.files import file_sha256, is_full
from train.progress import progress_bar

_ENCODE_AT_ONCE = 2**20  # characters
_NAMED_AT_MOST = 5  # classes in an error message


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    vocab_size: int = 1024,
    validation_fraction: float = 0.05,
    tokenizer: str | Path | None = None,
    text_field: str = "text",
    label_field: str | None = None,
    shard_tokens: int = 2**26,
) -> Manifest:
    """Write a data folder: token shards of both splits, the tokenizer and `manifest.json`.

    Of exact duplicates only the first is kept. A document goes to the validation split if its SHA-256, read as a
    fraction, is below `validation_fraction`, so adding or removing documents moves no other document. `tokenizer` is
    anything that `load_tokenizer` opens: a tokenizer's file or folder, a GGUF file, a run; None trains a sentencepiece
    model of `vocab_size` on the training split. Each document is encoded without a begin token and followed by the
    tokenizer's first end token.

    With a `label_field`, the label of a document is that field of its row (a string, a boolean or a whole number), as
    text. Every distinct value is a class; classes are sorted. `labels-SPLIT.npy` has the class index of each document,
    in the order of the shards. Documents without a label are skipped and counted; duplicates whose label differs from
    the first one's are counted. Raises InputError for fewer than two classes, and for classes that occur in the
    validation split only.

    The folder is renamed into place when it is complete. If it exists already, made with the same arguments from the
    same documents (the corpus is read to compare hashes), its manifest is returned; any other content of `out` raises
    InputError. Memory: a hash (and a label) per document, the sample for the tokenizer and about 1 MB of text. After an
    error nothing is left behind. A full disk raises OSError.
    """
    out = Path(out)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if given is None:
        check_vocab_size(vocab_size)
    elif not given.eos_ids:
        raise InputError(
            f"the tokenizer {given.path} has no end token, which must follow each document; take another, or name it "
            "as eos_token in a tokenizer_config.json next to the tokenizer.json"
        )
    check_number("validation_fraction", validation_fraction, above=0, below=1, hint="0.05 is usual")
    check_at_least_one(shard_tokens=shard_tokens)
    arguments = {
        "vocab_size": given.vocab_size if given else vocab_size,
        "validation_fraction": validation_fraction,
        "tokenizer": _hash_of(given) if given else None,
        "text_field": text_field,
        "label_field": label_field,
        "shard_tokens": shard_tokens,
    }
    if str(source) not in NAMED and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(
            f"out={out} is inside the source folder {source} and would become part of it; choose another --out"
        )
    existing = _existing(out, arguments)
    corpus = open_source(source, text_field=text_field, label_field=label_field)
    if existing is not None:
        reading = _CorpusPass(corpus, validation_fraction)
        with progress_bar(f"checking {corpus.name}", corpus.total) as advance:
            for _ in reading.documents(advance):
                pass
        if reading.source_hash != existing.source_hash:
            raise InputError(
                f"{out} was made from other documents ({existing.source}: {_short(existing.source_hash)})"
                f" than {corpus.name} holds now ({_short(reading.source_hash)});"
                " remove the folder or choose another --out"
            )
        verify_checksums(existing, out)
        return existing
    with _all_or_nothing(out) as folder:
        return _write(corpus, folder, given, arguments)


class _CorpusPass:
    """One pass over a corpus that drops duplicates, assigns documents to splits, and counts and hashes them.

    classes: label → number, in the order of first occurrence. labels: these numbers for the documents of each split.
    """

    def __init__(self, corpus: Source, validation_fraction: float):
        self._corpus, self._bound = corpus, int(validation_fraction * 2**64)
        self._hash = hashlib.sha256()
        self._seen: dict[bytes, int] = {}
        self.duplicates = self.conflicting_labels = 0
        self.classes: dict[str, int] = {}
        self.labels = {split: array("I") for split in SPLITS}
        self.count = dict.fromkeys(SPLITS, 0)
        self.bytes = dict.fromkeys(SPLITS, 0)

    @property
    def source_hash(self) -> str:
        return self._hash.hexdigest()

    def documents(self, advance: Any) -> Iterator[tuple[str, Document]]:
        """Yield (split, document) for each document that is not a duplicate."""
        shown = 0.0
        for document in self._corpus:
            advance(self._corpus.done - shown)
            shown = self._corpus.done
            text = document.text.encode()
            digest = hashlib.sha256(text).digest()
            self._hash.update(digest)
            label = 0
            if document.label is not None:
                self._hash.update(hashlib.sha256(document.label.encode()).digest())
                label = self.classes.setdefault(document.label, len(self.classes))
            if digest in self._seen:
                self.duplicates += 1
                self.conflicting_labels += label != self._seen[digest]
                continue
            self._seen[digest] = label
            split = "validation" if int.from_bytes(digest[:8]) < self._bound else "train"
            self.count[split] += 1
            self.bytes[split] += len(text)
            if document.label is not None:
                self.labels[split].append(label)
            yield split, document


def _write(corpus: Source, folder: Path, given: Tokenizer | None, arguments: dict[str, Any]) -> Manifest:
    fraction = arguments["validation_fraction"]
    reading, sample = _CorpusPass(corpus, fraction), TextSample()
    with progress_bar(f"reading {corpus.name}", corpus.total) as advance:
        for split, document in reading.documents(advance):
            if split == "train" and given is None:
                sample.add(document.text)
    if not all(reading.count.values()):
        raise InputError(
            f"{corpus.name} is too small for the split: validation_fraction={fraction} gives"
            f" {reading.count['train']} training and {reading.count['validation']} validation documents,"
            " and both need one at least; give more documents or another validation_fraction"
        )
    if arguments["label_field"] is not None:
        _check_classes(reading, corpus.name, fraction)
    if given is None:
        with progress_bar(f"training a tokenizer of {arguments['vocab_size']} pieces", 1.0) as advance:
            path = train_tokenizer(sample, folder, vocab_size=arguments["vocab_size"])
            advance()
    else:
        path = save_tokenizer(given, folder)
    tokenizer = load_tokenizer(path)
    stored = file_hashes(tokenizer_files(tokenizer))

    again = _CorpusPass(corpus, fraction)
    splits = _encode(again, corpus, folder, tokenizer, arguments["shard_tokens"])
    if again.source_hash != reading.source_hash:
        raise InputError(f"{corpus.name} changed while it was read; start again when nothing writes to it")
    classes = tuple(sorted(again.classes))
    manifest = Manifest(
        source=corpus.name,
        source_hash=reading.source_hash,
        tokenizer_file=path.name,
        tokenizer_hash=stored.pop(path.name),
        tokenizer_companions=stored,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_ids[0],
        splits=splits,
        duplicates_dropped=reading.duplicates,
        empty_skipped=corpus.empty_skipped,
        files_skipped=corpus.files_skipped,
        bytes_replaced=corpus.bytes_replaced,
        arguments=arguments,
        unlabelled_skipped=corpus.unlabelled_skipped,
        conflicting_labels=reading.conflicting_labels,
        labels=classes,
        label_files=_write_labels(again, classes, folder) if classes else {},
    )
    save_manifest(manifest, folder)
    return manifest


def _check_classes(reading: _CorpusPass, name: str, fraction: float) -> None:
    """Raise InputError for fewer than two classes, and for classes without a training document."""
    if len(reading.classes) < 2:
        raise InputError(
            f"{name} has one class only, {next(iter(reading.classes))!r}; give documents of two classes at least,"
            " or another label_field"
        )
    held_out_only = set(reading.labels["validation"]) - set(reading.labels["train"])
    unseen = sorted(label for label, number in reading.classes.items() if number in held_out_only)
    if unseen:
        more = f" and {len(unseen) - _NAMED_AT_MOST} more" if len(unseen) > _NAMED_AT_MOST else ""
        raise InputError(
            f"{name}: with validation_fraction={fraction} no training document has the label"
            f" {', '.join(map(repr, unseen[:_NAMED_AT_MOST]))}{more}; give more documents of each class, leave out the"
            " rare classes, or choose another validation_fraction"
        )


def _write_labels(reading: _CorpusPass, classes: tuple[str, ...], folder: Path) -> dict[str, LabelFile]:
    """Write `labels-SPLIT.npy` of both splits, in the order of the shards' documents."""
    index_of_number = np.empty(len(classes), token_dtype(len(classes)))  # order of occurrence → sorted order
    for index, label in enumerate(classes):
        index_of_number[reading.classes[label]] = index
    files = {}
    for split in SPLITS:
        labels = index_of_number[np.array(reading.labels[split], np.int64)]
        counts = np.bincount(labels, minlength=len(classes)).tolist()
        path, content = folder / f"labels-{split}.npy", io.BytesIO()
        np.save(content, labels)
        path.write_bytes(content.getvalue())
        files[split] = LabelFile(path.name, file_sha256(path), dict(zip(classes, counts, strict=True)))
    return files


def _encode(
    reading: _CorpusPass, corpus: Source, folder: Path, tokenizer: Tokenizer, shard_tokens: int
) -> dict[str, Split]:
    dtype, end = token_dtype(tokenizer.vocab_size), tokenizer.eos_ids[0]
    tokens = dict.fromkeys(SPLITS, 0)
    waiting: list[tuple[str, str]] = []

    def flush() -> None:
        encoded = tokenizer.encode_batch([text for _, text in waiting])
        for (split, _), ids in zip(waiting, encoded, strict=True):
            ids.append(end)
            writers[split].write(np.array(ids, dtype))
            tokens[split] += len(ids)
        waiting.clear()

    with (
        ShardWriter(folder, "train", dtype, shard_tokens) as train,
        ShardWriter(folder, "validation", dtype, shard_tokens) as validation,
        progress_bar(f"encoding {corpus.name}", corpus.total) as advance,
    ):
        writers = {"train": train, "validation": validation}
        characters = 0
        for split, document in reading.documents(advance):
            waiting.append((split, document.text))
            characters += len(document.text)
            if characters >= _ENCODE_AT_ONCE:
                flush()
                characters = 0
        flush()
        return {
            name: Split(reading.count[name], reading.bytes[name], tokens[name], writers[name].finish())
            for name in SPLITS
        }


def _existing(out: Path, arguments: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a finished folder made with the same arguments, None if `out` is new or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise InputError(f"out={out} is a file; give a new folder")
    if not (out / MANIFEST_NAME).exists():
        raise InputError(f"out={out} has other files and no {MANIFEST_NAME}; give a new or an empty folder")
    manifest = load_manifest(out)
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


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """Provide a hidden folder next to `out`, which is renamed to `out` at the end and removed after an error.

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


def _hash_of(tokenizer: Tokenizer) -> str:
    """Return the hash of a tokenizer's file, or the hash of all hashes if it has several files."""
    hashes = file_hashes(tokenizer_files(tokenizer))
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _short(digest: str) -> str:
    return digest[:12]
