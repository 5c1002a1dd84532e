"""Print a folder of examples for `isoflop data`: counts, and examples with their trained part marked."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from model.tokenizer import Tokenizer
    from train.data.manifest import Manifest
    from train.data.shards import TokenShards

_BEGIN, _END = "⟦", "⟧"  # around what is trained, where there are no colours
_PARTS = {"preference": ("chosen", "rejected"), "rated": ("answer", "mismatch")}  # documents of an example


def splits_table(manifest: "Manifest") -> "Table":
    """Return documents, bytes, tokens and trained tokens of both splits."""
    from experiments.commands.options import new_table

    table = new_table("split", "documents", "bytes", "tokens", "trained tokens")
    for name, part in manifest.splits.items():
        numbers = (part.documents, part.bytes, part.tokens, manifest.trained_tokens[name])
        table.add_row(name, *(f"{number:,}" for number in numbers))
    return table


def counts_table(manifest: "Manifest") -> "Table":
    """Return how many rows gave no example, and what is not there in full, each with its reason."""
    from experiments.commands.options import new_table

    table = new_table("dropped or altered", "count")
    lost = {"duplicates": manifest.duplicates_dropped} | manifest.dropped
    for reason, count in lost.items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    more = {"bytes that are no UTF-8, replaced": manifest.bytes_replaced, "other files": manifest.files_skipped}
    for reason, count in manifest.altered.items():
        table.add_row(f"kept: {reason}", f"{count:,}")
    for reason, count in more.items():
        if count:
            table.add_row(reason, f"{count:,}")
    return table


def describe_prepared(manifest: "Manifest") -> None:
    """Print what `isoflop data prepare` made."""
    from experiments.commands.options import console

    out = console()
    out.print(splits_table(manifest))
    out.print(counts_table(manifest))
    print(f"longest document: {manifest.longest:,} tokens")


def inspect_examples(shards: "TokenShards", examples: int, packing: int | None) -> dict[str, Any]:
    """Print what `isoflop data inspect` shows of such a folder, and return it for JSON."""
    import dataclasses

    from experiments.commands.options import console
    from model.tokenizer import load_tokenizer
    from train.data import PackedConversations
    from train.data.shards import TokenShards

    manifest, folder, tokenizer = shards.manifest, shards.folder, load_tokenizer(shards.folder)
    packed = {}
    if packing is not None:
        opened = {name: TokenShards(folder, name) for name in manifest.splits}
        packed = {name: PackedConversations(part, packing).statistics for name, part in opened.items()}
    content, out = manifest.to_json(), console()
    out.print(f"{folder} (checksums verified)", highlight=False, markup=False, soft_wrap=True, style="bold")
    for name in ("source", "kind", "hash", "vocab_size", "eos_id", "longest"):
        out.print(f"{name}: {content[name]}", highlight=False, markup=False, soft_wrap=True)
    out.print(splits_table(manifest))
    out.print(counts_table(manifest))
    for name, statistics in packed.items():
        out.print(f"packing of {name}: {statistics.describe()}", markup=False, highlight=False, soft_wrap=True)
    shown = _documents(shards, tokenizer, examples)
    for document in shown:
        _print_document(out, tokenizer, shards.split, document)
    result = {"folder": str(folder), "split": shards.split, "manifest": content, "rows": shown}
    if packed:
        result["packing"] = {name: dataclasses.asdict(statistics) for name, statistics in packed.items()}
    return result


def _documents(shards: "TokenShards", tokenizer: "Tokenizer", examples: int) -> list[dict[str, Any]]:
    """Return documents of examples evenly spread over a split: ids, which are trained, and the text with marks."""
    import numpy as np

    from train.data.documents import document_ends
    from train.data.shards import TrainedMask

    names = _PARTS.get(shards.manifest.kind, ("",))
    ends, trained, shown = document_ends(shards), TrainedMask(shards), []
    for example in np.unique(np.linspace(0, len(ends) // len(names) - 1, examples).astype(np.int64)).tolist():
        for number, name in enumerate(names, len(names) * example):
            begin = int(ends[number - 1]) + 1 if number else 0
            span = np.array([begin]), np.array([int(ends[number]) + 1 - begin])
            ids, mask = shards.spans(*span).tolist(), trained.spans(*span).tolist()
            stretches = _stretches(tokenizer, ids, mask)
            text = "".join(f"{_BEGIN}{part}{_END}" if is_trained else part for part, is_trained in stretches)
            shown.append({"example": example, "part": name, "ids": ids, "trained": mask, "text": text})
    return shown


def _stretches(tokenizer: "Tokenizer", ids: Sequence[int], trained: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Yield (text, is it trained) of the stretches of a document, special tokens by their names."""
    special = tokenizer.special_tokens
    for is_trained, run in itertools.groupby(zip(ids, trained, strict=True), key=lambda pair: bool(pair[1])):
        text = ""
        for is_special, group in itertools.groupby((i for i, _ in run), key=lambda i: i in special):
            tokens = list(group)
            text += "".join(special[i] for i in tokens) if is_special else tokenizer.decode(tokens)
        yield text, is_trained


def _print_document(out: "Console", tokenizer: "Tokenizer", split: str, document: dict[str, Any]) -> None:
    """Print a document with what is trained in colour on a terminal, between brackets elsewhere."""
    from rich.text import Text

    part = f", {document['part']}" if document["part"] else ""
    out.print(f"{split}, example {document['example']:,}{part}:", style="bold", markup=False, highlight=False)
    if not out.is_terminal:
        out.print(Text(document["text"]), soft_wrap=True)
        return
    text = Text()
    for stretch, is_trained in _stretches(tokenizer, document["ids"], document["trained"]):
        text.append(stretch, style="bold green" if is_trained else "")
    out.print(text, soft_wrap=True)
