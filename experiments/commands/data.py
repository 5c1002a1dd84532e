"""Implement `isoflop data`: prepare a data folder from a corpus, and inspect one."""

from pathlib import Path
from typing import Literal

import tyro

from experiments.commands.options import JsonFile

Kind = Literal["text", "chat", "preference", "rated", "prompts"]


def prepare(
    source: tyro.conf.Positional[str] = "sotu",
    *,
    out: Path,
    kind: Kind = "text",
    max_tokens: int | None = None,
    vocab_size: int = 1024,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    label_field: str | None = None,
    tokenizer: Path | None = None,
    chat_template: str | None = None,
    json: JsonFile = None,
) -> None:
    """Prepare a data folder from a corpus: drop duplicates, split, train a tokenizer, write token shards.

    Example: isoflop data prepare sotu --out data/sotu

    Example: isoflop data prepare sotu --out data/smollm2 --tokenizer SmolLM2-135M-Instruct.Q4_1.gguf

    Example: isoflop data prepare chats.jsonl --kind chat --out data/chats --tokenizer SmolLM2-135M-Instruct.Q4_1.gguf

    The folder appears when it is complete; the same call again with an unchanged corpus does nothing.

    Args:
        source: sotu, stdlib, a folder of text files, a text, .jsonl or .parquet file, or
            hf:OWNER/NAME[/CONFIG][:SPLIT]; of the other kinds a .jsonl, .json or .parquet file, or a folder of them.
        out: The folder to make.
        kind: What the rows are: text to pre-train on, or conversations, preferences, rated answers or prompts to
            fine-tune on, whose tokenizer must be given.
        max_tokens: Keep so many of the first tokens of each document of these kinds.
        vocab_size: Pieces of the byte-pair tokenizer that is trained on the training split.
        validation_fraction: Share of documents held out; a hash of the document's content, for examples of the prompt,
            decides its split.
        text_field: The field or column that holds the text in .jsonl, .parquet and hf: sources.
        label_field: The field or column that holds each document's label, to train a classifier: a string, a boolean
            or a whole number; every distinct value is a class. Rows without one are skipped and counted.
        tokenizer: Use this tokenizer instead of training one: a sentencepiece .model, a tokenizer.json, a GGUF file, or
            a folder of one, such as a data folder, a run or a model.
        chat_template: chatml, or a Jinja file: what writes messages in place of the tokenizer's own template, here and
            in `isoflop generate --chat` with a model that is tuned on the folder. Markers such as <|im_start|> that are
            no tokens of the vocabulary are encoded as text, each as several tokens.
        json: Also write the result as JSON to this file.
    """
    from experiments.commands.examples import describe_prepared
    from experiments.commands.options import say_unused, write_document
    from train.data import prepare as prepare_folder

    if kind != "text":
        say_unused(f"with --kind {kind}", prepare, vocab_size=vocab_size, text_field=text_field)
    manifest = prepare_folder(
        source,
        out,
        kind=kind,
        max_tokens=max_tokens,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        text_field=text_field,
        label_field=label_field,
        tokenizer=tokenizer,
        chat_template=chat_template,
    )
    content = manifest.to_json()
    print(f"{out}: {manifest.source}, vocabulary {manifest.vocab_size}, manifest {manifest.hash[:12]}")
    if kind != "text":
        describe_prepared(manifest)
        write_document(json, {"folder": str(out), "manifest": content})
        return
    for name, split in manifest.splits.items():
        print(
            f"  {name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens,"
            f" {split.bytes_per_token:.3f} bytes per token"
        )
    print(
        f"  dropped: {manifest.duplicates_dropped:,} duplicates, {manifest.empty_skipped:,} empty documents,"
        f" {manifest.files_skipped:,} binary files;"
        f" {manifest.bytes_replaced:,} bytes that are not valid UTF-8 were replaced"
    )
    if manifest.labels:
        print(
            f"  labels: {len(manifest.labels):,} classes; {manifest.unlabelled_skipped:,} documents without a label"
            f" were skipped; {manifest.conflicting_labels:,} of the duplicates had another label than the first"
        )
    write_document(json, {"folder": str(out), "manifest": content})


def inspect(
    folder: tyro.conf.Positional[Path],
    *,
    split: str = "train",
    rows: int | None = None,
    packing: int | None = None,
    json: JsonFile = None,
) -> None:
    """Summarize a data folder, verify its checksums, and decode a few excerpts.

    Example: isoflop data inspect data/sotu --rows 5

    Args:
        folder: A folder made by `isoflop data prepare`.
        split: Whose tokens to decode: train or validation.
        rows: Excerpts of 64 tokens to decode, evenly spaced over the split (default 3); of a folder to fine-tune on,
            examples (default 1), with their trained part in colour or between brackets.
        packing: Also report how well whole documents fill rows of this many tokens (training's packing=best-fit).
        json: Also write the result as JSON to this file.
    """
    import dataclasses

    import numpy as np
    from rich.text import Text

    from experiments.commands.examples import inspect_examples
    from experiments.commands.options import console, new_table, write_document
    from experiments.words import say
    from model.errors import check_at_least_one, check_whole
    from model.tokenizer import load_tokenizer
    from train.data.manifest import verify_checksums
    from train.data.rows import PackedDocuments
    from train.data.shards import TokenShards

    if rows is not None:
        check_whole("rows", rows)
    if packing is not None:
        check_at_least_one(packing=packing)
    shards = TokenShards(folder, split)
    verify_checksums(shards.manifest, folder)
    if shards.manifest.kind != "text":
        write_document(json, inspect_examples(shards, 1 if rows is None else rows, packing))
        return
    rows = 3 if rows is None else rows
    tokenizer = load_tokenizer(folder)
    length = min(64, len(shards))
    most = len(shards) - length + 1
    if rows > most:
        say(f"--rows {rows:,} is more than the {most:,} stretches of {length} tokens in the split; each is shown once")
        rows = most
    starts = np.linspace(0, len(shards) - length, rows).astype(np.int64)
    decoded = [
        {"start": int(start), "ids": ids.tolist(), "text": tokenizer.decode(ids)}
        for start, ids in zip(starts, shards.windows(starts, length), strict=True)
    ]

    content = shards.manifest.to_json()
    out = console()
    out.print(f"{folder} (checksums verified)", highlight=False, markup=False, soft_wrap=True, style="bold")
    names = ["source", "hash", "vocab_size", "eos_id", "duplicates_dropped", "empty_skipped", "bytes_replaced"]
    names += ["unlabelled_skipped", "conflicting_labels"] if shards.manifest.labels else []
    for name in names:
        out.print(f"{name}: {content[name]}", highlight=False, markup=False, soft_wrap=True)
    columns = ("split", "documents", "bytes", "tokens", "bytes per token", "shards")
    splits = new_table(*columns)
    for name, part in shards.manifest.splits.items():
        numbers = (part.documents, part.bytes, part.tokens)
        splits.add_row(name, *(f"{n:,}" for n in numbers), f"{part.bytes_per_token:.3f}", str(len(part.shards)))
    out.print(splits)
    if shards.manifest.labels:
        files = shards.manifest.label_files
        classes = new_table("class", *files)
        for label in shards.manifest.labels:
            classes.add_row(Text(repr(label)), *(f"{file.counts[label]:,}" for file in files.values()))
        out.print(classes)
    document = {"folder": str(folder), "split": split, "manifest": content, "rows": decoded}
    if packing is not None:
        packed = {name: PackedDocuments(TokenShards(folder, name), packing).statistics for name in content["splits"]}
        for name, statistics in packed.items():
            out.print(f"packing of {name}: {statistics.describe()}", markup=False, highlight=False, soft_wrap=True)
        document["packing"] = {name: dataclasses.asdict(statistics) for name, statistics in packed.items()}
    for row in decoded:
        out.print(f"{split}, token {row['start']:,}: {row['text']!r}", markup=False, highlight=False)
    write_document(json, document)
