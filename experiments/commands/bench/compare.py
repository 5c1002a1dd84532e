"""`isoflop bench compare`: what a change did to the benchmark's numbers."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.commands.options import JsonFile
from experiments.words import counted, is_or_are


def compare(
    before: tyro.conf.Positional[Path],
    after: tyro.conf.Positional[Path],
    *,
    across: Annotated[tuple[str, ...], tyro.conf.arg(metavar="AXIS")] = (),
    fail_above: str | None = None,
    any: bool = False,
    json: JsonFile = None,
) -> None:
    """What changed between two documents of `bench decode --json`, and whether it is more than noise.

    For each cell that both have: the ratio of medians, after over before, with a bootstrap interval of 95 %.

    Example: isoflop bench compare before.json after.json --fail-above 5%

    Example: isoflop bench compare float32.json int8.json --across weights

    Args:
        before: The earlier document.
        after: The later one.
        across: Axes in which the two differ on purpose, such as weights or cache.
        fail_above: Exit with code 1 where something is slower, beyond noise, by more than this, such as 5%.
        any: Compare documents of different models or devices too.
        json: Also write every number to this file.
    """
    from experiments.commands.options import console, new_table, write_document
    from experiments.decode.compare import compare as join
    from experiments.decode.compare import regressions
    from experiments.decode.render import COORDINATES, words_of

    limit = None if fail_above is None else _share(fail_above)
    result = join(_read_document(before), _read_document(after), across=across, anything=any)
    write_document(json, result)
    names = ("cell", "metric", "before ms", "after ms", "ratio (95 %)", "verdict")
    same = {n: row[n] for row in result["rows"][:1] for n in COORDINATES if n in row}
    same = {n: value for n, value in same.items() if all(row[n] == value for row in result["rows"])}
    table = new_table(*names, title=f"after over before, below 1 is faster: {words_of(same) or 'all cells'}")
    for row in result["rows"]:
        low, high = row["interval_95"]
        table.add_row(
            words_of({n: value for n, value in row.items() if n not in same}),
            row["metric"].removesuffix("_seconds").replace("_", " "),
            f"{1e3 * row['before']:.3g}",
            f"{1e3 * row['after']:.3g}",
            f"{row['ratio']:.3f} ({low:.3f} … {high:.3f})",
            row["verdict"],
        )
    console().print(table)
    for row in result["alone"]:
        print(f"{words_of(row)}: {row['before']} before, {row['after']} after")
    if limit is not None and (worse := regressions(result["rows"], limit)):
        print(
            f"isoflop: {len(worse)} of {counted(len(result['rows']), 'number')} "
            f"{is_or_are(len(worse))} slower by over {limit:.3g}",
            file=sys.stderr,
        )
        sys.exit(1)


def _read_document(file: Path) -> dict[str, Any]:
    from experiments.inputs import read_json
    from model.errors import InputError

    document = read_json(file)
    if not isinstance(document, dict) or not {"cells", "config_hash", "device"} <= set(document):
        raise InputError(f"{file} is no document of `isoflop bench decode --json`")
    return document


def _share(text: str) -> float:
    from model.errors import InputError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise InputError(f"--fail-above {text} must be a share such as 5% or 0.05")
    return value
