"""Prepare a data folder of examples: read rows, drop and count what cannot be used, render, encode, all or nothing."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.tokenizer import Tokenizer, load_tokenizer
from model.tokenizer.files import file_hashes, save_tokenizer, tokenizer_files
from model.tokenizer.templates import read_template
from train.data.examples.formats import BROKEN, EXPECTED, Example, UnusableError, canonical, examples_of, kinds_of
from train.data.examples.read import Row, RowSource
from train.data.examples.write import ExampleWriter, Side
from train.data.manifest import SPLITS, Manifest, save_manifest, token_dtype
from train.data.output import (
    all_or_nothing,
    check_arguments,
    check_outside,
    check_unchanged,
    existing_manifest,
    tokenizer_hash,
)
from train.progress import progress_bar

_KEYS_NAMED = 8  # in an error message


def prepare_examples(
    source: str | Path,
    out: str | Path,
    *,
    kind: str,
    tokenizer: str | Path | None,
    chat_template: str | Path | None = None,
    max_tokens: int | None = None,
    validation_fraction: float = 0.05,
    shard_tokens: int = 2**26,
) -> Manifest:
    """Write a data folder of conversations, pairs, ratings or prompts, and the tokenizer beside them.

    source: a .jsonl, .json or .parquet file, or a folder of them; `docs/tune-on-your-chats.md` has the formats. Rows
    are rendered by the tokenizer's chat template; plain text needs none. chat_template: a Jinja file, or a name in
    `model.tokenizer.templates`, in place of the tokenizer's own; it is kept in the folder. max_tokens: documents keep
    this many of their first tokens; None: all. The SHA-256 of the prompt (of a conversation: of its system turn and
    first user turn), read as a fraction, decides the side of the split, so that all answers to one prompt are on the
    same side.

    Rows that cannot be used are dropped and counted in `Manifest.dropped`; `Manifest.altered` counts truncated
    examples and turns that are not trained. Raises InputError for a row that looks like another kind, and if nothing
    is left on one side of the split. The folder is there when it is complete, and the same call returns it as it is.
    Memory: a hash for each row, a few numbers for each document, and all rows of kind=rated.
    """
    if tokenizer is None:
        raise InputError(
            f"kind={kind} needs the tokenizer of the model that is to be tuned, whose chat template writes the"
            " messages; name it with --tokenizer"
        )
    out, given = Path(out), load_tokenizer(tokenizer)
    check_arguments(given, validation_fraction, shard_tokens)
    if chat_template is not None:
        given = given.with_chat_template(read_template(chat_template))
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens={max_tokens} must be at least 2, a token to read and one to predict")
    check_outside(out, Path(source))
    arguments = {
        "kind": kind,
        "max_tokens": max_tokens,
        "validation_fraction": validation_fraction,
        "tokenizer": tokenizer_hash(given),
        "shard_tokens": shard_tokens,
    }
    existing = existing_manifest(out, arguments)
    rows = RowSource(source)
    reading = _Reading(rows, kind)
    if existing is not None:
        with progress_bar(f"checking {rows.name}", rows.total) as advance:
            for _ in reading.examples(advance):
                pass
        check_unchanged(existing, out, rows.name, reading.source_hash)
        return existing
    with all_or_nothing(out) as folder:
        return _write(reading, folder, given, arguments)


class _Reading:
    """One pass over the rows of a source that hashes them, drops duplicates, and counts what gives no example."""

    def __init__(self, rows: RowSource, kind: str):
        self.rows, self.kind = rows, kind
        self.count = self.duplicates = 0
        self.dropped: Counter[str] = Counter()
        self._hash = hashlib.sha256()
        self._seen: set[bytes] = set()
        self._keys: Counter[str] = Counter()

    @property
    def source_hash(self) -> str:
        """SHA-256 over the hashes of all rows in reading order."""
        return self._hash.hexdigest()

    @property
    def keys_found(self) -> str:
        """The keys that most rows have."""
        return ", ".join(name for name, _ in self._keys.most_common(_KEYS_NAMED)) or "none"

    def examples(self, advance: Any) -> Iterator[list[Example]]:
        """Yield the examples of each row that has any and is no duplicate; several are pairs of one ranking."""
        shown = 0.0
        for row in self.rows:
            advance(self.rows.done - shown)
            shown = self.rows.done
            self.count += 1
            self._hash.update(hashlib.sha256(canonical(row.value).encode()).digest())
            try:
                found = self._examples_of(row)
            except UnusableError as unusable:
                self.dropped[unusable.reason] += 1
                continue
            identity = hashlib.sha256("\n".join(example.identity for example in found).encode()).digest()
            if identity in self._seen:
                self.duplicates += 1
                continue
            self._seen.add(identity)
            yield found

    def _examples_of(self, row: Row) -> list[Example]:
        if row.value is None:
            raise UnusableError(BROKEN)
        self._keys.update(list(row.value))
        kinds = kinds_of([name for name, value in row.value.items() if value is not None])
        if self.kind in kinds:
            return examples_of(row.value, self.kind)
        if not kinds or self.kind in kinds_of(list(row.value)):
            raise UnusableError(BROKEN)
        raise InputError(
            f"{row.where} has the keys {', '.join(list(row.value)[:_KEYS_NAMED])}, which look like"
            f" kind={' or '.join(kinds)} and not like kind={self.kind}, whose keys are {EXPECTED[self.kind]}"
        )


def _write(reading: _Reading, folder: Path, tokenizer: Tokenizer, arguments: dict[str, Any]) -> Manifest:
    kind, rows = reading.kind, reading.rows
    path = save_tokenizer(tokenizer, folder)
    stored = file_hashes(tokenizer_files(load_tokenizer(path)))
    dtype, limit = token_dtype(tokenizer.vocab_size), arguments["shard_tokens"]
    with ExitStack() as stack:
        sides = {split: Side(folder, split, dtype, limit, stack) for split in SPLITS}
        writer = ExampleWriter(kind, tokenizer, sides, arguments["max_tokens"], arguments["validation_fraction"])
        with progress_bar(f"encoding {rows.name}", rows.total) as advance:
            writer.write_all(reading.examples(advance))
        writer.write_rated()
        dropped = reading.dropped + writer.dropped
        _check_sides(sides, reading, dropped, writer.first_refusal, arguments["validation_fraction"])
        has_margins = any(side.has_margins for side in sides.values())
        splits = {name: side.finish_tokens() for name, side in sides.items()}
        arrays = {name: side.finish_arrays(kind, has_margins) for name, side in sides.items()}
    assert tokenizer.eos_id is not None
    manifest = Manifest(
        source=rows.name,
        source_hash=reading.source_hash,
        tokenizer_file=path.name,
        tokenizer_hash=stored.pop(path.name),
        tokenizer_companions=stored,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        splits=splits,
        duplicates_dropped=reading.duplicates,
        empty_skipped=0,
        files_skipped=rows.files_skipped,
        bytes_replaced=rows.bytes_replaced,
        arguments=arguments,
        kind=kind,
        array_files=arrays,
        trained_tokens={name: side.trained_tokens for name, side in sides.items()},
        longest=max(side.longest for side in sides.values()),
        dropped=dict(sorted(dropped.items())),
        altered=dict(sorted(writer.altered.items())),
    )
    save_manifest(manifest, folder)
    return manifest


def _check_sides(
    sides: dict[str, Side], reading: _Reading, dropped: Counter[str], first_refusal: str, fraction: float
) -> None:
    """Raise InputError, with what was dropped and why, where nothing is left on one side of the split."""
    name, kind = reading.rows.name, reading.kind
    if all(side.documents for side in sides.values()):
        return
    lost = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    if first_refusal:
        lost += f"; the first refusal: {first_refusal}"
    if reading.count == 0:
        raise InputError(f"{name} has no rows")
    if dropped[BROKEN] == reading.count:
        raise InputError(
            f"{name} has no row of kind={kind}: all {reading.count} are broken; the keys found are"
            f" {reading.keys_found}, those expected are {EXPECTED[kind]}, with values of the documented form"
        )
    if not any(side.documents for side in sides.values()):
        raise InputError(f"no example is left of the {reading.count} rows of {name}; dropped were: {lost}")
    raise InputError(
        f"{name} is too small for the split: validation_fraction={fraction} gives {sides['train'].documents} training"
        f" and {sides['validation'].documents} validation documents, and both need one at least; give more rows or"
        f" another validation_fraction; dropped were: {lost}"
    )
