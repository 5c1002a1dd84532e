"""Implement `isoflop scaling fit`: scaling laws from a table of runs."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.commands.options import JsonFile, PlotFile
from experiments.commands.scaling.options import BY_NAME, Columns

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")]


def fit(
    table: tyro.conf.Positional[Path],
    *,
    columns: Columns = BY_NAME,
    curves: File = None,
    forms: Names = (),
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    screen: bool = False,
    json: JsonFile = None,
    report: File = None,
    tables: Folder = None,
    plot: PlotFile = None,
) -> None:
    """Fit scaling laws to any table of runs, with confidence intervals.

    Every estimator that the table supports is fitted: the parametric law L = E + A·N^-alpha + B·D^-beta, IsoFLOP
    valleys by spline, skewed parabola and parabola, and with --curves the envelope of training curves; which form of
    law the held-out error prefers; and, if the table has other counts of N and C, the exponents under each. An
    estimator that the table does not support is refused with the reason.

    Example: isoflop scaling fit runs.csv --columns.loss val_loss --report page.html --json fit.json

    Args:
        table: Runs, one a row: .csv, .tsv, .jsonl or .parquet; or a study's folder.
        columns: Which column of the table is which.
        curves: Training curves of the same runs, a table of run, params, tokens, loss, for approach 1.
        forms: Forms of law to choose between by held-out error; by default chinchilla, shared-exponent, no-floor
            and kaplan; with --columns.unique-tokens also repeated-data and repeated-data-params, with
            --columns.active-params experts.
        delta: Where Huber's loss turns from quadratic to linear, in natural-log loss.
        bootstraps: Resamples behind the intervals.
        seed: Of the resamples.
        screen: Leave out gross outliers, runs that the noise of the table does not explain, and show the answers with
            and without them. By default every usable run is fitted.
        json: Write every number to this file.
        report: Write a page with figures to this file (.html), which works offline.
        tables: Write fitted runs, optima, draws, forms and conventions as CSV into this folder.
        plot: Draw the valleys, N*(C) and D*(C) to this file (.svg, .png or .pdf).
    """
    from experiments.commands.options import check_plot, console, output, write_document, write_plot
    from experiments.commands.scaling.account import show
    from experiments.scaling.analysis import STAGES, analyse
    from experiments.scaling.rows.conventions import counts_beside
    from experiments.scaling.rows.curves import curves_of_table
    from train.progress import progress_bar

    check_plot(plot)
    runs = columns.read(table)
    file = table / "runs.csv" if table.is_dir() else table
    with progress_bar("fit", STAGES) as advance:
        analysis = analyse(
            runs,
            counts=counts_beside(file, runs),
            curves=[] if curves is None else curves_of_table(curves),
            forms=forms or None,
            delta=delta,
            bootstraps=bootstraps,
            seed=seed,
            screen=screen,
            advance=advance,
        )
    write_document(json, analysis.document())
    show(console(), analysis)
    if tables is not None:
        from experiments.scaling.rows.tables import write_tables

        with output(tables):
            write_tables(tables, analysis)
        print(tables)
    if report is not None:
        from experiments.scaling.report import write_scaling_page

        with output(report):
            write_scaling_page(report, analysis, table.resolve().name, None if tables is None else str(tables))
        print(report)
    if plot is not None:
        if analysis.fits.isoflop is None and analysis.fits.parametric is None:
            print(f"nothing to draw: {plot} is not written", file=sys.stderr)
        else:
            from experiments.scaling.figures.laws import overview

            figure = overview(analysis.fits.isoflop, analysis.fits.parametric)
            write_plot(plot, figure, "IsoFLOP valleys and compute-optimal sizes")
            print(plot)
