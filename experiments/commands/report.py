"""Implement `isoflop report`: the curves of runs on one page."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.commands.options import JsonFile


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    json: JsonFile = None,
) -> None:
    """Draw the curves of runs, finished or not, as one HTML page: loss, learning rate, gradient norm and speed.

    Example: isoflop report runs/first

    Example: isoflop report runs/adamw runs/muon --out compared.html

    Args:
        runs: The run directories.
        out: The page; by default report.html in the first run's folder.
        json: Also write the result of each run to this file.
    """
    from experiments.commands.options import console, output, write_document
    from experiments.runs.report import write_run_page
    from model.errors import InputError

    if not runs:
        raise InputError("name at least one run, such as: isoflop report runs/first")
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("a run is named twice; name each once")
    page = out or runs[0] / "report.html"
    with output(page):
        rows = write_run_page(page, runs)
    write_document(json, {"runs": rows})
    for row in rows:
        if row["trouble"]:
            print(f"warning: {row['trouble']}", file=sys.stderr)
    console().print(f"{page}", highlight=False, soft_wrap=True)
