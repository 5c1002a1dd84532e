"""Implement `isoflop scaling report`: the scaling laws of a finished study, as a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.commands.options import JsonFile

if TYPE_CHECKING:
    from experiments.scaling.rows.curves import TrainingCurve

Study = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]


def report(
    folder: Study,
    *,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    screen: bool = False,
    json: JsonFile = None,
) -> None:
    """Fit the runs of a study again and write its page, its numbers and its tables into its folder.

    Example: isoflop scaling report studies/sotu

    Args:
        folder: A study's folder, or one with a runs.csv of the same columns.
        out: Write the page there, and nothing into the study's folder.
        delta: Where Huber's loss turns from quadratic to linear, in natural-log loss.
        bootstraps: Resamples behind the intervals.
        seed: Of the resamples.
        screen: Leave out gross outliers, and show the answers with and without them.
        json: Also write the document to this file.
    """
    from experiments.commands.options import write_document

    write_document(json, write_report(folder, out, delta=delta, bootstraps=bootstraps, seed=seed, screen=screen))


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    screen: bool = False,
) -> dict[str, Any]:
    """Write report.html, scaling.json and tables/ of a study's folder, print a summary and return the document.

    out: write only the page, to this file. Raises InputError if there are no runs, or no estimator answers.
    """
    from experiments.commands.options import console, output
    from experiments.commands.scaling.account import show
    from experiments.commands.scaling.options import TableOptions
    from experiments.scaling.analysis import STAGES, analyse
    from experiments.scaling.report import write_scaling_page
    from experiments.scaling.rows.conventions import counts_beside
    from experiments.scaling.rows.tables import write_tables
    from experiments.scaling.study.run import table_troubles
    from train.checksums import read_sealed
    from train.files import write_json
    from train.progress import progress_bar
    from train.run.metrics import troubles

    path = folder / "runs.csv"
    table = TableOptions().read(path if path.is_file() else folder)
    held_out = folder / "held_out.json"
    with progress_bar("fit", STAGES) as advance:
        analysis = analyse(
            table,
            counts=counts_beside(folder / "runs.csv", table),
            curves=_curves(folder),
            held_out=read_sealed(held_out) if held_out.exists() else None,
            notes=[*table_troubles(folder), *troubles(sorted(folder.glob("*/runs/*")))],
            delta=delta,
            bootstraps=bootstraps,
            seed=seed,
            screen=screen,
            advance=advance,
        )
    document, page = analysis.document(), out or folder / "report.html"
    with output(page):
        if out is None:
            write_json(folder / "scaling.json", document)
            write_tables(folder / "tables", analysis)
        tables = "scaling.json and tables/ in the folder of this page" if out is None else None
        write_scaling_page(page, analysis, folder.resolve().name, tables)
    show(console(), analysis)
    console().print(f"{page}", highlight=False, soft_wrap=True)
    return document


def _curves(folder: Path) -> "list[TrainingCurve]":
    from experiments.scaling.rows.curves import curves_of_table
    from experiments.scaling.study.run import read_study

    path, design = folder / "curves.csv", read_study(folder)
    schedule = "unknown" if design is None else design.run_schedule
    return curves_of_table(path, schedule=schedule) if path.exists() else []
