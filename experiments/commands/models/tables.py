"""Build the tables of `isoflop model`: parameters, FLOPs and memory."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from experiments.commands.options import new_table
from experiments.words import bytes_in_words, count_in_words

if TYPE_CHECKING:
    from rich.table import Table

    from model import ModelConfig


def preset_table(rows: list[dict[str, Any]]) -> "Table":
    """Return a line per architecture, in 80 columns; our own come before the released models."""
    headers = ("name", "layers", "d_model", "heads", "KV\nheads", "con-\ntext", "vocab-\nulary", "para-\nmeters")
    table = new_table(*headers, "active", "cache /\ntoken", padding=0)
    last_own = max(index for index, row in enumerate(rows) if not row["source"])
    for index, row in enumerate(rows):
        encoder_layers, cache = row["encoder_layers"], row["cache_bytes_per_token"]
        table.add_row(
            row["name"],
            f"{encoder_layers}+{row['layers']}" if encoder_layers else str(row["layers"]),
            str(row["d_model"]),
            str(row["heads"]),
            str(row["kv_heads"]),
            _context(row["context"]),
            f"{row['vocabulary']:,}",
            count_in_words(row["parameters"]),
            count_in_words(row["active"]) if row["active"] != row["parameters"] else "",
            bytes_in_words(cache) if cache else "none",
            end_section=index == last_own,
        )
    return table


PRESET_NOTE = (
    "Parameters count a tied table once; active: what one token passes through, where that is less. Cache in bfloat16, "
    "while windows still fill. `isoflop model show NAME` explains one."
)


def describe(config: "ModelConfig") -> str:
    """Return the shape in one line."""
    layers = f"{config.num_layers} layers"
    if config.stack == "encoder-decoder":
        layers = f"{config.num_encoder_layers} + {layers}"
    heads = f"{config.num_heads} heads of {config.head_dim}"
    if config.num_kv_heads != config.num_heads:
        heads += f" ({config.num_kv_heads} KV)"
    experts = config.experts
    width = f"d_ff {config.d_ff:,}"
    if experts is not None:
        width = f"{experts.top_k} of {experts.count} experts of {experts.d_ff:,}"
    parts = (config.stack, layers, f"d_model {config.d_model:,}", heads, width, f"context {config.max_seq_len:,}")
    return ", ".join(parts)


def fields(config: "ModelConfig") -> str:
    """Return the fields that differ from their defaults, in the form that --set takes."""
    given = {name: value for name, value in _unlike_default(config).items() if name not in ("derived", *config.derived)}
    return "  ".join(f"{name}={_written(value)}" for name, value in given.items())


def _written(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        value = _unlike_default(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _unlike_default(part: Any) -> dict[str, Any]:
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {field.name: values[field.name] for field in dataclasses.fields(part) if values[field.name] != field.default}


_ORDER = ("embedding", "encoder", "relative_bias", "layers")  # then the groups after the layers


def parameter_table(document: dict[str, Any]) -> "Table":
    """Return the parameters by group, their sum, and the published count."""
    counts = document["parameters"]
    total = counts["total"]
    table = new_table("parameters", "", "share")
    rank = {part: position for position, part in enumerate(_ORDER)}
    groups = sorted(counts["by_group"].items(), key=lambda item: rank.get(item[0].split("/")[0], len(rank)))
    for name, count in groups:
        table.add_row(name, f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", count_in_words(total), style="bold")
    table.add_row("without embedding tables", f"{counts['non_embedding']:,}", f"{counts['non_embedding'] / total:.1%}")
    if counts["active"] != total:
        table.add_row("active per token", f"{counts['active']:,}", f"{counts['active'] / total:.1%}")
    published = (document["published"] or {}).get("parameters")
    if published is not None:
        difference = total / published - 1
        table.add_row("published", f"{published:,}", f"{difference:+.3%}" if difference else "the same")
    return table


def flops_table(document: dict[str, Any]) -> "Table":
    """Return the FLOPs by product, their sum, and 6N for comparison."""
    table = new_table(f"FLOPs per token at {document['seq_len']:,} tokens", "forward", "training", "share")
    products = document["forward_flops_exact_by_product"]
    exact = sum(products.values())
    for name, training in document["training_flops_exact_by_product"].items():
        flops = products.get(name, 0.0)
        table.add_row(name, f"{flops:,.0f}", f"{training:,.0f}", f"{flops / exact:.1%}")
    table.add_section()
    for convention, label in (("exact", "exact: all products"), ("6N", "6N: active parameters alone")):
        forward, training = (
            document["flops_per_token"][f"{mode} FLOPs per token ({convention})"] for mode in ("forward", "training")
        )
        table.add_row(label, f"{forward:,.0f}", f"{training:,.0f}", f"{forward / exact:.1%}", style="bold")
    return table


def flops_notes(config: "ModelConfig") -> list[str]:
    """Return notes on how the FLOPs of this architecture are counted."""
    notes = []
    if config.sliding_window is not None:
        notes.append("Over whole rows a window is a mask: attention is computed, and counted, for all pairs.")
    if config.stack == "encoder-decoder":
        notes.append("Per target token with one source token: both sides are rows of that length.")
    return notes


def memory_table(document: dict[str, Any]) -> "Table":
    """Return the memory of training and of serving."""
    table = new_table("memory", "bytes", "")
    rows = f"{document['batch']:,} × {document['seq_len']:,} tokens"
    for title, held in (
        ("training in float32, without activations", document["training_bytes"]),
        (f"serving {rows} in {document['dtype']}", document["serving_bytes"]),
    ):
        total = sum(held.values())
        table.add_row(title, f"{total:,}", bytes_in_words(total), style="bold")
        for name, size in held.items():
            table.add_row(f"  {name}", f"{size:,}", bytes_in_words(size))
    return table


def _context(length: int) -> str:
    """Write a length: 8k for 8,192; a length that is not a multiple of 1,024 in full."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)
