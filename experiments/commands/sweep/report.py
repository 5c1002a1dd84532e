"""Implement `isoflop sweep report`: the results of a sweep, as one page and as tables."""

from pathlib import Path
from typing import Annotated

import tyro

from experiments.commands.options import JsonFile


def report(
    folder: tyro.conf.Positional[Path],
    *,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    json: JsonFile = None,
) -> None:
    """Write the results of a sweep, finished or not, as one HTML page that works offline.

    Every trial is also written as a row of results.csv and results.parquet in the sweep's folder. With --out only the
    page is written.

    Example: isoflop sweep report sweeps/lr --json sweeps/lr/report.json

    Args:
        folder: The folder of the sweep.
        out: The page; by default report.html in the sweep's folder.
        json: Also write every number to this file.
    """
    from experiments.commands.options import console, output, write_document
    from experiments.sweep.analysis.document import analyse
    from experiments.sweep.analysis.results import read_results, write_tables
    from experiments.sweep.report import write_sweep_page
    from model.errors import InputError

    results = read_results(folder)
    if not results.rows:
        raise InputError(f"{folder} has no trial yet; start it with `isoflop sweep resume {folder}`")
    analysis = analyse(results)
    write_document(json, analysis.to_dict())
    page, tables = out or folder / "report.html", None
    with output(page):
        if out is None:
            tables = write_tables(results)
        write_sweep_page(page, results, analysis, tables)
    said = console()
    said.print(analysis.sentence, highlight=False)
    for warning in analysis.summary.warnings:
        said.print(f"warning: {warning}", style="yellow", highlight=False)
    said.print(f"{page}", highlight=False)
