"""Render the benchmark's rows as a table, JSON, JSON lines, CSV or Markdown."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from experiments.words import counted

Format = Literal["table", "json", "jsonl", "csv", "md"]
Column = Callable[[dict[str, Any]], str]
Columns = dict[str, Column]

TRAINING_COORDINATES = ("lanes", "batch_size", "seq_len")
COORDINATES = ("kv_heads", "weights", "cache", "batch", "prompt", "context", "steps")


def render(document: dict[str, Any], form: Format) -> str:
    """Return the document as text; csv, jsonl and md have only the cells or loads, csv and md no samples."""
    rows = document["cells"] or document.get("load", [])
    if form == "json":
        return json.dumps(document, indent=1)
    if form == "jsonl":
        return "\n".join(json.dumps(row) for row in rows)
    if form == "csv":
        return _csv(rows)
    if form == "md":
        tables = cell_tables(rows) if document["cells"] else [("", *load_table(rows))]
        return "\n\n".join(_bars(header, lines) for _, header, lines in tables)
    return ""


def cell_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return two tables (title, columns, cells as text) that fit a terminal: the device loop, and the host loop.

    Each with the coordinates that differ or matter, then medians, or the error.
    """
    loop = _LOOP | (_ROOFLINE if any("share_of_bound" in row for row in rows) else {})
    return [
        ("a step in the loop on the device; medians, slowest … fastest repeat", *_table_of(rows, loop)),
        ("synced: a token with the host waiting for each, its tail, the host's share", *_table_of(rows, _WAITS)),
    ]


def _table_of(rows: Sequence[dict[str, Any]], columns: Columns) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in COORDINATES if name in ("batch", "context") or len({row[name] for row in rows}) > 1]
    lines = []
    for row in rows:
        cells = [row["error"].split(":")[0]] + [""] * (len(columns) - 1) if "error" in row else None
        lines.append([str(row[name]) for name in shown] + (cells or [text(row) for text in columns.values()]))
    return [*shown, *columns], lines


def _ms(name: str) -> Column:
    return lambda row: f"{1e3 * row[name]:.3g}"


def _rate(name: str) -> Column:
    return lambda row: f"{row[name]:,.1f}" if row[name] < 1000 else f"{row[name]:,.0f}"


_SPEED, _TOKEN = "decode_tokens_per_second", "time_per_output_token_seconds"
_LOOP: Columns = {
    "ms/step": _ms("seconds_per_step"),
    "tok/s": _rate(f"{_SPEED}_aggregate"),
    "slowest … fastest": lambda row: f"{_rate(f'{_SPEED}_slowest')(row)} … {_rate(f'{_SPEED}_fastest')(row)}",
    "each tok/s": _rate(f"{_SPEED}_per_sequence"),
}
_ROOFLINE: Columns = {
    "MB/step": lambda row: f"{row['bytes_read_per_step_filled'] / 1e6:,.1f}",
    "of bound (95%)": lambda row: _of_bound(row),
}


def _of_bound(row: dict[str, Any]) -> str:
    low, high = (f"{100 * bound:.0f}" for bound in row["share_of_bound_interval_95"])
    return f"{row['share_of_bound']:.0%} ({low} … {high}) {row['bound']}"


_WAITS: Columns = {
    "first ms": _ms("time_to_first_token_seconds"),
    "prefill tok/s": lambda row: f"{row['prefill_tokens_per_second']:,.0f}",
    "synced ms": _ms(_TOKEN),
    "p99 ms": lambda row: "–" if row["steps"] * row["repeats"] < 100 else _ms(f"{_TOKEN}_p99")(row),
    "host ms": _ms("host_seconds_per_step"),
    "compile s": lambda row: f"{sum(row[name] for name in row if name.startswith('compile_seconds_')):.1f}",
    "recompiles": lambda row: str(row["recompiles"]),
}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "samples"))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _bars(header: list[str], lines: list[list[str]]) -> str:
    def bar(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    return "\n".join(bar(line) for line in (header, ["---:"] * len(header), *lines))


def ceilings_in_words(ceilings: dict[str, Any]) -> str:
    """Describe the ceilings: reads 31.2 GB/s (XLA sum; measured 28.9 … 31.2), multiplies 190 GFLOP/s (float32; …)."""

    def measured(name: str, unit: float, digits: int) -> str:
        return " … ".join(
            f"{bound(ceilings.get(f'{name}_measured') or [ceilings[name]]) / unit:,.{digits}f}" for bound in (min, max)
        )

    read, product = "read_bytes_per_second", "matmul_flops_per_second"
    return (
        f"reads {ceilings[read] / 1e9:.1f} GB/s ({ceilings['read_form']}; measured {measured(read, 1e9, 1)}), "
        f"multiplies {ceilings[product] / 1e9:,.0f} GFLOP/s "
        f"({ceilings['matmul_dtype']}; measured {measured(product, 1e9, 0)})"
    )


def words_of(row: dict[str, Any]) -> str:
    """Return a cell's coordinates in words."""
    names = ("contender", "rate_requests_per_second", "streams", *COORDINATES, *TRAINING_COORDINATES)
    return ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in names if row.get(name) is not None)


def against_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return (column names, cells as text) of rows of `decode.against_peers`."""
    header = [
        "batch",
        "prompt",
        "program",
        "first token ms",
        "ms/token",
        "slowest … fastest",
        "tok/s all",
        "isoflop: decode ×",
        "first token ×",
        "same tokens",
    ]
    lines = []
    for row in rows:
        line = [str(row["batch"]), str(row["prompt"]), row["contender"]]
        if "error" in row:
            lines.append([*line, "failed", *[""] * (len(header) - 4)])
            continue

        def ms(name: str, row: dict[str, Any] = row) -> str:
            return f"{1e3 * row[name]:.3g}"

        def times(name: str, row: dict[str, Any] = row) -> str:
            return f"{row[name]:.2f} ({row[f'{name}_lowest']:.2f} … {row[f'{name}_highest']:.2f})"

        each = "seconds_per_step"
        line += [
            ms("time_to_first_token_seconds"),
            ms(each),
            f"{ms(f'{each}_slowest')} … {ms(f'{each}_fastest')}",
            f"{row['decode_tokens_per_second_aggregate']:,.1f}",
        ]
        own = row["contender"] == "isoflop"
        line += ["", ""] if own else [times("isoflop_over_this_decode"), times("isoflop_over_this_first_token")]
        lines.append([*line, "" if own else f"{row['tokens_equal']} of {row['tokens']}"])
    return header, lines


def load_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return (column names, cells as text) of rows of `serve.measures.summarize`."""
    header = ["load", "served/s", "tok/s", "good/s", "first token s"]
    header += ["between chunks s", "tokens/chunk", "per token s", "whole s"]
    spans = ("time_to_first_token_seconds", "inter_chunk_latency_seconds")
    after = ("time_per_output_token_seconds", "end_to_end_seconds")

    def with_tail(row: dict[str, Any], names: Sequence[str]) -> list[str]:
        return [_with_tail(row[name], row[f"{name}_p99"]) for name in names]

    lines = []
    for row in rows:
        line = [offered_in_words(row)]
        if "error" in row:
            lines.append([*line, "failed", *[""] * (len(header) - 2)])
            continue
        line += [f"{row[name]:.3g}" for name in ("requests_per_second", "tokens_per_second")]
        line.append(f"{row['goodput_requests_per_second']:.3g}")
        size = "" if row["tokens_per_chunk"] is None else f"{row['tokens_per_chunk']:.3g}"
        lines.append([*line, *with_tail(row, spans), size, *with_tail(row, after)])
    return header, lines


def offered_in_words(row: dict[str, Any]) -> str:
    """Return how the requests of a load came: 8 streams, 2.5/s, or all at once."""
    if row.get("streams") is not None:
        return counted(row["streams"], "stream")
    rate = row["rate_requests_per_second"]
    return str(row["arrivals"]) if rate is None else f"{rate:.3g}/s"


def _with_tail(median: float | None, tail: float | None) -> str:
    return "" if median is None or tail is None else f"{median:.3g} ({tail:.3g})"
