"""`isoflop scaling …`: scaling laws from a table of runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.commands.options import JsonFile

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.scaling.fit import Fits


def fit(
    table: tyro.conf.Positional[Path],
    *,
    params: str = "params",
    tokens: str = "tokens",
    loss: str = "loss",
    flops: str | None = None,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    keep_repeated: bool = False,
    json: JsonFile = None,
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Fit scaling laws to anyone's table of runs, with confidence intervals.

    Two estimators side by side: the parametric law L = E + A·N^-alpha + B·D^-beta, and IsoFLOP valleys with
    power laws N* ∝ C^a, D* ∝ C^b through their minima. One that the table cannot carry is refused with the
    reason.

    Example: isoflop scaling fit runs.csv --params N --tokens D --loss val_loss --json fit.json --plot
    fit.svg

    Args:
        table: runs, one a row: .csv, .tsv, .jsonl or .parquet.
        params: column of model sizes N, in parameters.
        tokens: column of training tokens D.
        loss: column of final validation losses, in nats per token.
        flops: column of training FLOPs that groups runs into budgets (default: 6·N·D, grouped within 5 %).
        delta: where Huber's loss turns from quadratic to linear, in natural-log loss.
        bootstraps: bootstrap draws behind the intervals.
        seed: of the bootstrap.
        keep_repeated: keep rows whose column `repeated` is true (data seen more than once).
        json: write every number to this file.
        plot: draw the valleys, N*(C) and D*(C) to this file (.svg, .png or .pdf).
    """
    from rich.console import Console

    from experiments.commands.options import console, write_document
    from experiments.scaling.fit import fit_both
    from experiments.scaling.table import read_table
    from model.errors import InputError
    from train.progress import progress_bar

    if plot is not None and plot.suffix.lower() not in {".svg", ".png", ".pdf"}:
        raise InputError(f"--plot {plot}: the suffix should be .svg, .png or .pdf")
    runs = read_table(table, params=params, tokens=tokens, loss=loss, flops=flops, keep_repeated=keep_repeated)
    with progress_bar("bootstrap", bootstraps) as advance:
        fits = fit_both(runs, delta=delta, bootstraps=bootstraps, seed=seed, advance=advance)
    document = fits.document()
    write_document(json, document)
    _show(console(), fits)
    if plot is not None:
        if fits.isoflop is None and fits.parametric is None:
            Console(stderr=True).print(f"nothing to draw: {plot} is not written")
        else:
            _write_plot(plot, fits)


def _show(console: "Console", fits: "Fits") -> None:
    """A compact account: both estimators, the optima, and whatever did not enter."""
    from rich.table import Table

    table = Table(title=f"{len(fits.table)} runs", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("parametric", "95 % interval", "IsoFLOP", "95 % interval"):
        table.add_column(name, justify="right")
    parametric = fits.parametric.intervals if fits.parametric is not None else {}
    iso_known = fits.isoflop is not None and "isoflop.intervals" not in fits.refused
    isoflop = fits.isoflop.intervals if fits.isoflop is not None and iso_known else {}
    for name in ("E", "A", "B", "alpha", "beta", "a", "b"):
        cells = []
        for result, intervals in ((fits.parametric, parametric), (fits.isoflop, isoflop)):
            value = getattr(result, name, None)
            cells.append("" if value is None else f"{value:.4g}")
            cells.append(f"{intervals[name][95][0]:.4g} … {intervals[name][95][1]:.4g}" if name in intervals else "")
        table.add_row(name, *cells)
    console.print(table)
    if fits.parametric is not None:
        fit = fits.parametric
        console.print(
            f"Parametric: objective {fit.objective:.6g} (sum of Huber at delta={fit.delta:g}); "
            f"{fit.starts_at_best} of {fit.starts} starts reached it.",
            highlight=False,
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
    _list(console, "dropped row", [(f"row {d['row']}", d["reason"]) for d in fits.table.dropped])
    for name, reason in fits.refused.items():
        console.print(f"[bold]{name} refused:[/bold] {reason}", highlight=False)


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
