"""Print the analysis of scaling laws for the commands."""

from typing import TYPE_CHECKING

from experiments.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.scaling.analysis import Analysis
    from experiments.scaling.forms.choose import FormChoice


def show(console: "Console", analysis: "Analysis") -> None:
    """Print a summary: every estimator, the optima, the rows left out, and the warnings."""
    from collections import Counter

    from experiments.commands.options import new_table
    from experiments.scaling.analysis import NAMES
    from experiments.scaling.rows.table import HELD_OUT_REASON

    fits = analysis.fits
    names = ("N* ∝ C^a, D* ∝ C^b", "a", "95 % interval", "b", "95 % interval")
    table = new_table(*names, title=counted(len(fits.table), "run"))
    rows = [(NAMES[row.estimator], row) for row in analysis.exponents]
    rows += [(f"{NAMES[row.estimator]}, with every run", row) for row in analysis.unscreened_exponents]
    for title, row in rows:
        cells = []
        for name, value in (("a", row.a), ("b", row.b)):
            pair = row.intervals and row.intervals[name]
            cells += [f"{value:.4g}", f"{pair[0]:.4g} … {pair[1]:.4g}" if pair else "–"]
        table.add_row(title, *cells)
    console.print(table)
    unscreened = None if analysis.unscreened is None else analysis.unscreened.parametric
    for title, fit in (("", fits.parametric), ("With every run: ", unscreened)):
        if fit is not None:
            console.print(
                f"{title}L = {fit.E:.4g} + {fit.A:.4g}·N^-{fit.alpha:.4g} + {fit.B:.4g}·D^-{fit.beta:.4g}; objective "
                f"{fit.objective:.6g} (sum of Huber at delta={fit.delta:g}), reached by {fit.starts_at_best} of "
                f"{fit.starts} starts.",
                highlight=False,
                soft_wrap=True,
            )
    if fits.isoflop is not None:
        optima = new_table("C (FLOPs)", "N*", "D*", "loss", title="Valley minima")
        for best in fits.isoflop.optima:
            optima.add_row(*(f"{value:.4g}" for value in (best.flops, best.params, best.tokens, best.loss)))
        console.print(optima)
        _list(
            console,
            "rejected budget",
            [(f"{budget.flops:.4g} FLOPs", budget.reason) for budget in fits.isoflop.rejected],
        )
    if analysis.choice is not None:
        _forms(console, analysis.choice)
    kept_back = sum(row.reason == HELD_OUT_REASON for row in fits.table.dropped)
    if kept_back:
        console.print(f"{counted(kept_back, 'held-out row')} did not enter.", highlight=False)
    others = [row for row in fits.table.dropped if row.reason != HELD_OUT_REASON]
    _list(console, "dropped row", [(f"row {row.row}", row.reason) for row in others])
    outliers = Counter(row.estimator for row in analysis.left_out if row.estimator != "all")
    for name, count in outliers.items():
        console.print(f"{NAMES[name]}: without {counted(count, 'gross outlier')}.", highlight=False)
    for name, reason in analysis.refused.items():
        console.print(f"[bold]{NAMES.get(name, name)} refused:[/bold] {reason}", highlight=False, soft_wrap=True)
    for text in analysis.thinned:
        console.print(f"[bold]fewer rows:[/bold] {text}", highlight=False, soft_wrap=True)
    for remark in analysis.warnings:
        console.print(f"[yellow]warning, {remark.about}:[/yellow] {remark.text}", highlight=False, soft_wrap=True)


def _forms(console: "Console", choice: "FormChoice") -> None:
    from experiments.commands.options import new_table

    table = new_table("form", "largest budgets", "95 %", title="Error on held-out runs, by form of law")
    for score in choice.scores:
        if score.refused is None:
            low, high = score.rms_interval[choice.decided_by]
            cells = (f"{100 * score.rms[choice.decided_by]:.2f} %", f"{100 * low:.2f} … {100 * high:.2f}")
            table.add_row(score.form, *cells, style="bold" if score.form == choice.winner else None)
    console.print(table)
    chosen = choice.fits[choice.winner]
    values = ", ".join(f"{name} {value:.4g}" for name, value in chosen.values.items())
    console.print(f"{choice.reason}: {chosen.form.formula} with {values}", highlight=False, soft_wrap=True)
    for score in choice.scores:
        if score.refused is not None:
            console.print(f"{score.form} is not among them: {score.refused}", highlight=False, soft_wrap=True)


def _list(console: "Console", what: str, items: list[tuple[str, str]], limit: int = 10) -> None:
    if not items:
        return
    console.print(f"{counted(len(items), what)}:", highlight=False)
    for where, reason in items[:limit]:
        console.print(f"  {where}: {reason}", highlight=False, markup=False)
    if len(items) > limit:
        console.print(f"  … and {len(items) - limit} more (all in --json)", highlight=False, markup=False)
