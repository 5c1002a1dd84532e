"""`isoflop scaling …`: scaling laws from a table of runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.commands.options import JsonFile
from experiments.commands.scaling.options import BY_NAME, Columns

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.scaling.analysis import Analysis
    from experiments.scaling.fit import Fits

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
    json: JsonFile = None,
    report: File = None,
    tables: Folder = None,
    plot: File = None,
) -> None:
    """Fit scaling laws to anyone's table of runs, with confidence intervals.

    Every estimator that the table can carry, side by side: the parametric law L = E + A·N^-alpha + B·D^-beta, IsoFLOP
    valleys by parabola, skewed parabola and spline, and with --curves the envelope of training curves; which form of
    law the held-out error prefers; and, where the table has other counts of N and C, the exponents under each. One that
    the table cannot carry is refused with the reason.

    Example: isoflop scaling fit runs.csv --params N --tokens D --loss val_loss --report page.html --json fit.json

    Args:
        table: Runs, one a row: .csv, .tsv, .jsonl or .parquet; or a study's folder.
        curves: Training curves of the same runs, a table of run, params, tokens, loss, for approach 1.
        forms: Forms of law to choose between by held-out error (default: chinchilla, shared-exponent, no-floor,
            kaplan).
        delta: Where Huber's loss turns from quadratic to linear, in natural-log loss.
        bootstraps: Resamples behind the intervals.
        seed: Of the resamples.
        json: Write every number to this file.
        report: Write a page with figures to this file (.html), which needs no network.
        tables: Write fitted runs, optima, draws, forms and conventions as CSV into this folder.
        plot: Draw the valleys, N*(C) and D*(C) to this file (.svg, .png or .pdf).
    """
    from rich.console import Console

    from experiments.commands.options import console, output, write_document
    from experiments.commands.scaling.report import counts_beside
    from experiments.scaling.analysis import analyse
    from experiments.scaling.forms.choose import SIMPLE_FORMS
    from experiments.scaling.rows.curves import curves_of_table
    from model.errors import InputError
    from train.progress import progress_bar

    if plot is not None and plot.suffix.lower() not in {".svg", ".png", ".pdf"}:
        raise InputError(f"--plot {plot}: the suffix should be .svg, .png or .pdf")
    runs = columns.read(table)
    file = table / "runs.csv" if table.is_dir() else table
    with progress_bar("bootstrap", bootstraps) as advance:
        analysis = analyse(
            runs,
            counts=counts_beside(file, runs),
            curves=[] if curves is None else curves_of_table(curves),
            forms=forms or SIMPLE_FORMS,
            delta=delta,
            bootstraps=bootstraps,
            seed=seed,
            advance=advance,
        )
    write_document(json, analysis.document())
    show(console(), analysis)
    if tables is not None:
        from experiments.scaling.rows.tables import write_tables

        with output(tables):
            write_tables(tables, analysis)
    if report is not None:
        from experiments.report.scaling_page import write_scaling_page

        with output(report):
            write_scaling_page(report, analysis, table.name, None if tables is None else str(tables))
    if plot is not None:
        if analysis.fits.isoflop is None and analysis.fits.parametric is None:
            Console(stderr=True).print(f"nothing to draw: {plot} is not written")
        else:
            _write_plot(plot, analysis.fits)


def show(console: "Console", analysis: "Analysis") -> None:
    """A compact account: every estimator, the optima, whatever did not enter, and what to beware of."""
    from collections import Counter

    from rich.table import Table

    from experiments.report.scaling_page import NAMES
    from experiments.scaling.rows.table import HELD_OUT_REASON

    fits = analysis.fits
    table = Table(title=f"{len(fits.table)} runs", title_justify="left", title_style="bold")
    table.add_column("N* ∝ C^a, D* ∝ C^b")
    for name in ("a", "95 % interval", "b", "95 % interval"):
        table.add_column(name, justify="right")
    for row in analysis.exponents:
        cells = []
        for name in ("a", "b"):
            pair = row["intervals"] and row["intervals"][name]
            cells += [f"{row[name]:.4g}", f"{pair[0]:.4g} … {pair[1]:.4g}" if pair else "–"]
        table.add_row(NAMES[row["estimator"]], *cells)
    console.print(table)
    if fits.parametric is not None:
        fit = fits.parametric
        console.print(
            f"L = {fit.E:.4g} + {fit.A:.4g}·N^-{fit.alpha:.4g} + {fit.B:.4g}·D^-{fit.beta:.4g}; objective "
            f"{fit.objective:.6g} (sum of Huber at delta={fit.delta:g}), reached by {fit.starts_at_best} of "
            f"{fit.starts} starts.",
            highlight=False,
            soft_wrap=True,
        )
    if fits.isoflop is not None:
        optima = Table(title="Valley minima", title_justify="left", title_style="bold")
        for name in ("C (FLOPs)", "N*", "D*", "loss"):
            optima.add_column(name, justify="right")
        for best in fits.isoflop.optima:
            optima.add_row(*(f"{best[key]:.4g}" for key in ("flops", "params", "tokens", "loss")))
        console.print(optima)
        _list(
            console,
            "rejected budget",
            [(f"{r['flops']:.4g} FLOPs", r["reason"]) for r in fits.isoflop.rejected],
        )
    kept_back = sum(d["reason"] == HELD_OUT_REASON for d in fits.table.dropped)
    if kept_back:
        console.print(f"{kept_back} held-out rows did not enter.", highlight=False)
    others = [d for d in fits.table.dropped if d["reason"] != HELD_OUT_REASON]
    _list(console, "dropped row", [(f"row {d['row']}", d["reason"]) for d in others])
    outliers = Counter(row["estimator"] for row in analysis.left_out if row["estimator"] != "all")
    for name, count in outliers.items():
        runs = "run that is a gross outlier" if count == 1 else "runs that are gross outliers"
        console.print(f"{NAMES[name]}: without {count} {runs}.", highlight=False)
    for name, reason in analysis.refused.items():
        console.print(f"[bold]{NAMES.get(name, name)} refused:[/bold] {reason}", highlight=False, soft_wrap=True)
    for row in analysis.warnings:
        console.print(f"[yellow]warning, {row['about']}:[/yellow] {row['text']}", highlight=False, soft_wrap=True)


def _list(console: "Console", what: str, items: list[tuple[str, str]], limit: int = 10) -> None:
    if not items:
        return
    console.print(f"{len(items)} {what}{'s' if len(items) > 1 else ''}:", highlight=False)
    for where, reason in items[:limit]:
        console.print(f"  {where}: {reason}", highlight=False, markup=False)
    if len(items) > limit:
        console.print(f"  … and {len(items) - limit} more (all in --json)", highlight=False, markup=False)


def _write_plot(path: Path, fits: "Fits") -> None:
    import io

    from experiments.commands.options import output
    from experiments.report.style import svg
    from experiments.scaling.plots import overview
    from train.files import write_atomically

    figure = overview(fits.isoflop, fits.parametric)
    if path.suffix.lower() == ".svg":
        content: str | bytes = svg(figure, "IsoFLOP valleys and compute-optimal sizes")
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=200)
        content = buffer.getvalue()
    with output(path):
        write_atomically(path, content)
