"""Implement `isoflop bench compare`: the effect of a change on the benchmark's numbers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.commands.bench.decode import QUIET
from experiments.commands.options import JsonFile
from experiments.words import counted, is_or_are

if TYPE_CHECKING:
    from experiments.bench.compare import ComparedMetric


def compare(
    before: tyro.conf.Positional[Path],
    after: tyro.conf.Positional[Path],
    *,
    across: Annotated[tuple[str, ...], tyro.conf.arg(metavar="AXIS")] = (),
    fail_above: str | None = None,
    any: bool = False,
    json: JsonFile = None,
) -> None:
    """Compare two documents of `bench decode --json` or `bench train --json`, and tell changes from noise.

    For each cell that both have: the ratio of medians, after over before, with a bootstrap interval of 95 %. Both
    documents contain the machine's ceilings while they were measured: if these differ by more than a tenth, nothing is
    called faster or slower, and with --fail-above the exit code is 2.

    Example: isoflop bench compare before.json after.json --fail-above 5%

    Example: isoflop bench compare float32.json int8.json --across weights

    Args:
        before: The earlier document.
        after: The later one.
        across: Axes in which the two differ on purpose, such as weights or cache.
        fail_above: Exit with code 1 if something is slower, beyond noise, by more than this, such as 5%.
        any: Compare documents of different models or devices too.
        json: Also write every number to this file.
    """
    from experiments.bench.compare import compare as join
    from experiments.bench.compare import regressions
    from experiments.bench.machine import has_changed, in_words
    from experiments.bench.render import COORDINATES, TRAINING_COORDINATES, words_of
    from experiments.commands.options import console, new_table, write_document
    from model.errors import InputError

    limit = None if fail_above is None else _share(fail_above)
    documents = [_read_document(file) for file in (before, after)]
    if len({document["kind"] for document in documents}) > 1:
        raise InputError(f"{before} is of bench {documents[0]['kind']}, {after} of bench {documents[1]['kind']}")
    result = join(*documents, across=across, anything=any)
    write_document(json, result.to_dict())
    moved = has_changed(result.machine)
    names = [
        "cell",
        "metric",
        "before ms",
        "after ms",
        "ratio (95 %)",
        *(["over ceilings"] if moved else []),
        "verdict",
    ]
    coordinates = (*COORDINATES, *TRAINING_COORDINATES)
    first = result.rows[0].coordinates
    same = {n: first[n] for n in coordinates if n in first}
    same = {n: value for n, value in same.items() if all(row.coordinates[n] == value for row in result.rows)}
    table = new_table(*names, title=f"after over before, below 1 is faster: {words_of(same) or 'all cells'}")
    for row in result.rows:
        found, (low, high) = row.found, row.found.interval_95
        table.add_row(
            words_of({n: value for n, value in row.coordinates.items() if n not in same}),
            row.metric.removesuffix("_seconds").replace("_", " "),
            f"{1e3 * found.before:.3g}",
            f"{1e3 * found.after:.3g}",
            f"{found.ratio:.3f} ({low:.3f} … {high:.3f})",
            *([_over_ceilings(row)] if moved else []),
            found.verdict,
        )
    console().print(table)
    for file, document in zip((before, after), documents, strict=True):
        if document.get("load_average", 0.0) > QUIET:
            print(f"{file}: other programs were running (load average {document['load_average']:.1f})")
    changed = f"the machine changed between the documents: {in_words(result.machine)}, in 1e9 a second"
    if moved:
        print(f"{changed[0].upper()}{changed[1:]}. What differs may not be the code's; measure both again together.")
    for cell in result.alone:
        print(f"{words_of(cell.coordinates)}: {cell.before} before, {cell.after} after")
    if limit is not None and moved and not any:
        raise InputError(f"{changed}; --fail-above needs both measured on the same one, --any compares anyway")
    if limit is not None and (worse := regressions(result.rows, limit)):
        print(
            f"isoflop: {len(worse)} of {counted(len(result.rows), 'number')} "
            f"{is_or_are(len(worse))} slower by over {limit:.3g}",
            file=sys.stderr,
        )
        sys.exit(1)


def _over_ceilings(row: "ComparedMetric") -> str:
    return "" if row.ratio_per_ceiling is None else f"{row.ratio_per_ceiling:.3f}"


def _read_document(file: Path) -> dict[str, Any]:
    from experiments.inputs import read_json
    from model.errors import InputError

    document = read_json(file)
    has = set(document) if isinstance(document, dict) else set()
    if {"rows", "batch_size", "config_hash", "device"} <= has:
        shape = {name: document[name] for name in ("batch_size", "seq_len")}
        return document | {"kind": "train", "cells": [shape | row for row in document["rows"]]}
    if "contenders" in has or {"rows", "batch_size"} <= has:
        raise InputError(
            f"{file} has no samples to compare: it is of `bench train --against`, whose ratios are of turns in one "
            "run, or of an older release; measure again with `isoflop bench train PRESET --json FILE`"
        )
    if not {"cells", "config_hash", "device"} <= has:
        raise InputError(f"{file} is not a document of `isoflop bench decode --json` or `isoflop bench train --json`")
    if document.get("load"):
        raise InputError(f"{file} is of `bench decode --load`; give documents of cells, measured without --load")
    return document | {"kind": "decode"}


def _share(text: str) -> float:
    from model.errors import InputError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise InputError(f"--fail-above {text} must be a share such as 5% or 0.05")
    return value
