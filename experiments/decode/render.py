"""The benchmark's rows as a table, JSON, JSON lines, CSV or Markdown."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

Format = Literal["table", "json", "jsonl", "csv", "md"]

COORDINATES = ("kv_heads", "weights", "cache", "batch", "prompt", "context", "steps")


def render(document: dict[str, Any], form: Format) -> str:
    """The document as text; csv, jsonl and md hold its cells, or its loads, alone, csv and md without raw samples."""
    rows = document["cells"] or document.get("load", [])
    if form == "json":
        return json.dumps(document, indent=1)
    if form == "jsonl":
        return "\n".join(json.dumps(row) for row in rows)
    if form == "csv":
        return _csv(rows)
    if form == "md":
        header, lines = table_of(rows) if document["cells"] else load_table(rows)
        return "\n".join(_bar(line) for line in (header, ["---:"] * len(header), *lines))
    return ""


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(column names, cells as text): the coordinates that differ or matter, then medians, or the error.

    "ms/step" and the rates are of the loop on the device; "synced ms" is a token's with the host waiting for each,
    "p99" its tail and "host" its share until the calls return.
    """
    shown = [name for name in COORDINATES if name in ("batch", "context") or len({row[name] for row in rows}) > 1]
    has_shares = any("share_of_bound" in row for row in rows)
    header = [
        *shown,
        "first ms",
        "prefill/s",
        "ms/step",
        "synced ms",
        "p99",
        "host",
        "tokens/s",
        "each/s",
        *(["GB/s", "of read", "of peak", "bound"] if has_shares else []),
        "compile",
        "recomp.",
    ]
    return header, [[str(row[name]) for name in shown] + _measured(row, len(header) - len(shown)) for row in rows]


def _measured(row: dict[str, Any], columns: int) -> list[str]:
    if "error" in row:
        return [row["error"].split(":")[0], *[""] * (columns - 1)]
    ms = lambda name: f"{1e3 * row[name]:.3g}"
    each = "time_per_output_token_seconds"
    values = [
        ms("time_to_first_token_seconds"),
        f"{row['prefill_tokens_per_second']:,.0f}",
        ms("seconds_per_step"),
        ms(each),
        ms(f"{each}_p99"),
        ms("host_seconds_per_step"),
        f"{row['decode_tokens_per_second_aggregate']:,.1f}",
        f"{row['decode_tokens_per_second_per_sequence']:,.1f}",
    ]
    if "share_of_bound" in row:
        values += [
            f"{row['read_bytes_per_second'] / 1e9:.1f}",
            f"{row['share_of_read_bandwidth']:.0%}",
            f"{row['share_of_matmul_peak']:.0%}",
            row["bound"],
        ]
    compiling = sum(value for name, value in row.items() if name.startswith("compile_seconds_"))
    return [*values, f"{compiling:.1f}", str(row["recompiles"])]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "samples"))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def words_of(row: dict[str, Any]) -> str:
    """A cell's coordinates in words."""
    names = ("contender", "rate_requests_per_second", *COORDINATES)
    return ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in names if row.get(name) is not None)


def against_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """As `table_of`, for rows of `peers.decode_bench`."""
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
        ms = lambda name, row=row: f"{1e3 * row[name]:.3g}"
        times = lambda name, row=row: f"{row[name]:.2f} ({row[f'{name}_lowest']:.2f} … {row[f'{name}_highest']:.2f})"
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
    """As `table_of`, for rows of `load.bench_load`."""
    header = ["requests/s offered", "served", "tok/s", "good/s", "first token s", "between tokens s", "whole s"]
    latencies = ("time_to_first_token_seconds", "inter_token_latency_seconds", "end_to_end_seconds")
    lines = []
    for row in rows:
        line = [f"{row['rate_requests_per_second']:g}"]
        if "error" in row:
            lines.append([*line, "failed", *[""] * (len(header) - 2)])
            continue
        line += [f"{row[name]:.3g}" for name in ("requests_per_second", "tokens_per_second")]
        line.append(f"{row['goodput_requests_per_second']:.3g}")
        lines.append([*line, *(_with_tail(row[name], row[f"{name}_p99"]) for name in latencies)])
    return header, lines


def _with_tail(median: float | None, tail: float | None) -> str:
    return "" if median is None or tail is None else f"{median:.3g} ({tail:.3g})"
