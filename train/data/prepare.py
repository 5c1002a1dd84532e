"""Prepare a data folder from a corpus: deduplicate, split, train a tokenizer, encode, all or nothing."""

import hashlib
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import InputError
from model.tokenizer import Tokenizer, load_tokenizer
from model.tokenizer.files import file_hashes, save_tokenizer, tokenizer_files
from train.data.examples.prepare import prepare_examples
from train.data.kinds import check_known
from train.data.manifest import SPLITS, LabelFile, Manifest, Split, save_manifest, token_dtype
from train.data.output import (
    all_or_nothing,
    check_arguments,
    check_outside,
    check_unchanged,
    existing_manifest,
    tokenizer_hash,
)
from train.data.shards import ShardWriter
from train.data.sources import NAMED, Document, Source, open_source
from train.data.tokenizer_training import TextSample, check_vocab_size, train_tokenizer
from train.files import file_sha256
from train.progress import progress_bar

_ENCODE_AT_ONCE = 2**20  # characters
_NAMED_AT_MOST = 5  # classes in an error message


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    kind: str = "text",
    max_tokens: int | None = None,
    vocab_size: int = 1024,
    validation_fraction: float = 0.05,
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
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

    Another kind than text is what `train.data.examples.prepare.prepare_examples` writes, from rows of conversations,
    pairs, ratings or prompts; max_tokens and chat_template are for these kinds, vocab_size and the fields for text.

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
    if kind != "text":
        check_known(kind)
        if label_field is not None:
            raise InputError(f"label_field={label_field!r} is for kind=text; rows of kind={kind} have their own keys")
        return prepare_examples(
            source,
            out,
            kind=kind,
            tokenizer=tokenizer,
            chat_template=chat_template,
            max_tokens=max_tokens,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
        )
    if chat_template is not None:
        raise InputError(f"chat_template={str(chat_template)!r} is for examples; text has no messages")
    if max_tokens is not None:
        raise InputError(f"max_tokens={max_tokens} is for examples; of text, every token is kept")
    out = Path(out)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if given is None:
        check_vocab_size(vocab_size)
    check_arguments(given, validation_fraction, shard_tokens)
    arguments = {
        "vocab_size": given.vocab_size if given else vocab_size,
        "validation_fraction": validation_fraction,
        "tokenizer": tokenizer_hash(given) if given else None,
        "text_field": text_field,
        "label_field": label_field,
        "shard_tokens": shard_tokens,
    }
    if str(source) not in NAMED:
        check_outside(out, Path(source))
    existing = existing_manifest(out, arguments)
    corpus = open_source(source, text_field=text_field, label_field=label_field)
    if existing is not None:
        reading = _CorpusPass(corpus, validation_fraction)
        with progress_bar(f"checking {corpus.name}", corpus.total) as advance:
            for _ in reading.documents(advance):
                pass
        check_unchanged(existing, out, corpus.name, reading.source_hash)
        return existing
    with all_or_nothing(out) as folder:
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
