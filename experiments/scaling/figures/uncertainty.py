"""Draw the uncertainty of scaling laws: loss contours, clouds of bootstrap draws, held-out runs."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from experiments.report.style import (
    BLUE,
    INK,
    MUTED,
    NARROW,
    ORANGE,
    PALETTE,
    WIDTH,
    figures_of,
    log_axis,
    new_figure,
    new_panels,
    sequence,
    styled,
)
from experiments.scaling.figures.laws import FLOPS, PARAMS, TOKENS, drawn_of
from experiments.scaling.law.parametric import ParametricFit
from experiments.scaling.rows.thin import DOTS, sample
from experiments.scaling.valleys.isoflop import IsoflopFit

MANY_SIZES = 60  # in a figure


@styled
def contours(fit: ParametricFit, isoflop: IsoflopFit | None = None, width: float = WIDTH) -> Figure:
    """Draw the law's loss over N and D, runs as dots of the same scale, and the compute-optimal path."""
    figure = new_figure(width, 5.0 if width > NARROW else 4.6)
    axes = figure.subplots()
    table = fit.table
    sizes = np.geomspace(table.params.min() / 1.5, table.params.max() * 1.5, 160)
    tokens = np.geomspace(table.tokens.min() / 1.5, table.tokens.max() * 1.5, 160)
    loss = fit.predict(sizes[None], tokens[:, None])
    low, high = float(min(loss.min(), table.loss.min())), float(np.quantile(loss, 0.98))
    levels = np.linspace(low, high, 15)
    shared: dict[str, Any] = {"cmap": "viridis_r", "vmin": low, "vmax": high}
    axes.contourf(sizes, tokens, loss, levels=levels, alpha=0.35, extend="both", **shared)
    lines = axes.contour(sizes, tokens, loss, levels=levels[1::2], linewidths=0.7, **shared)
    axes.clabel(lines, fontsize=7.5, fmt="%.2f", colors=INK)
    shown = sample(len(table), DOTS, 0)
    dots = axes.scatter(
        table.params[shown],
        table.tokens[shown],
        c=table.loss[shown],
        s=26,
        edgecolors=INK,
        linewidths=0.6,
        zorder=3,
        **shared,
    )
    flops = 6 * table.params * table.tokens
    budgets = np.geomspace(0.3 * flops.min(), 3 * flops.max(), 100)
    best = fit.optimal(budgets)
    axes.plot(best.params, best.tokens, color=ORANGE, label="compute-optimal, parametric")
    if isoflop is not None:
        found = [[getattr(optimum, name) for optimum in isoflop.optima] for name in ("params", "tokens")]
        axes.plot(*found, "D", color=BLUE, markeredgecolor=INK, zorder=4, label="valley minima")
    log_axis(axes.xaxis, sizes[0], sizes[-1], margin=0)
    log_axis(axes.yaxis, tokens[0], tokens[-1], margin=0)
    axes.grid(False)
    figure.colorbar(
        dots, ax=axes, label="loss (nats per token)", location="right" if width > NARROW else "bottom", aspect=28
    )
    axes.set(xlabel=PARAMS, ylabel=TOKENS, title="Loss over N and D" + drawn_of(len(shown), len(table)))
    if width > NARROW:
        axes.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none")
    else:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=1)
    return figure


@styled
def clouds(parametric: ParametricFit | None, valleys: dict[str, IsoflopFit]) -> list[Figure]:
    """Draw the bootstrap's draws: alpha against beta of the law, and the distribution of a of every estimator."""
    panels = new_panels(2 if parametric is not None else 1, 3.4)
    shares: dict[str, np.ndarray] = {}
    if parametric is not None:
        alpha, beta = parametric.draws[:, 3], parametric.draws[:, 4]
        inside = _within(alpha) & _within(beta)
        panels[0].plot(alpha[inside], beta[inside], ".", color=BLUE, markersize=3, alpha=0.4)
        panels[0].plot(parametric.alpha, parametric.beta, "D", color=ORANGE, markeredgecolor=INK, label="the fit")
        panels[0].set(xlabel="alpha, of N", ylabel="beta, of D", title="Resampled exponents of the law")
        panels[0].legend()
        shares["parametric"] = beta / (alpha + beta)
    shares |= {name: fit.draws[:, 1] for name, fit in valleys.items()}
    axes = panels[-1]
    for place, draws in enumerate(shares.values()):
        draws = draws[np.isfinite(draws)]
        if not len(draws):
            continue
        draws = draws[_within(draws)]
        parts = axes.violinplot([draws], positions=[place], orientation="horizontal", widths=0.8, showextrema=False)
        for body in cast(list[Any], parts["bodies"]):
            body.set(facecolor=PALETTE[place % len(PALETTE)], alpha=0.5)
        low, middle, high = np.percentile(draws, [2.5, 50, 97.5])
        axes.plot([low, high], [place, place], color=INK, linewidth=1)
        axes.plot(middle, place, "o", color=INK, markersize=4)
    axes.set_yticks(range(len(shares)), shares)
    axes.invert_yaxis()
    axes.set(xlabel="a, of N* ∝ C^a", title="Resampled a, 95 % intervals")
    for panel in panels:
        panel.locator_params(axis="x", nbins=4)
    return figures_of(panels)


@styled
def held_out(runs: Sequence[dict[str, Any]]) -> list[Figure]:
    """Draw predicted losses with intervals and measured ones over N, for runs {params, loss, interval, measured}."""
    left, right = new_panels(2, 3.4)
    known = [run for run in runs if run["loss"] is not None and run["measured"] is not None]
    params = np.array([run["params"] for run in known])
    predicted, measured = (np.array([run[name] for run in known]) for name in ("loss", "measured"))
    low, high = np.array([run["interval"] for run in known]).T
    order = np.argsort(params)
    if len(np.unique(params)) > 1:
        left.fill_between(params[order], low[order], high[order], color=ORANGE, alpha=0.15, linewidth=0)
        left.plot(params[order], predicted[order], "--", color=ORANGE, label="predicted, with its 95 % interval")
    else:  # a line and a band need a second size
        ends = np.maximum([predicted - low, high - predicted], 0)
        look: dict[str, Any] = {"fmt": "D", "color": ORANGE, "capsize": 4, "alpha": 0.7}
        left.errorbar(params, predicted, yerr=ends, label="predicted, with its 95 % interval", **look)
    left.plot(params, measured, "o", color=BLUE, markeredgecolor=INK, label="measured afterwards")
    log_axis(left.xaxis, params.min(), params.max())
    left.set(xlabel=PARAMS, ylabel="validation loss (nats per token)", title="Held-out runs")
    left.legend()
    error = 100 * (measured / predicted - 1)
    bars = 100 * np.stack([1 - low / predicted, high / predicted - 1])
    right.axhline(0, color=MUTED, linewidth=0.9)
    right.errorbar(
        params, np.zeros(len(known)), yerr=np.maximum(bars, 0), fmt="none", ecolor=ORANGE, capsize=4, alpha=0.7
    )
    right.plot(params, error, "o", color=BLUE, markeredgecolor=INK)
    log_axis(right.xaxis, params.min(), params.max())
    right.set(xlabel=PARAMS, ylabel="measured over predicted, less 1 (%)", title="Error of the prediction")
    return figures_of([left, right])


@styled
def losses(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, width: float = WIDTH) -> Figure:
    """Draw the runs themselves, for a table in which no valley was found: loss over compute, coloured by size.

    With MANY_SIZES or more only dots are drawn, no lines.
    """
    figure = new_figure(width, 3.8)
    axes = figure.subplots()
    shown = sample(len(loss), DOTS, 0)
    params, flops, drawn = params[shown], 6 * params[shown] * tokens[shown], loss[shown]
    sizes = np.unique(params)
    if len(sizes) < MANY_SIZES:
        for size, colour in zip(sizes, sequence(len(sizes)), strict=True):
            here = np.flatnonzero(params == size)
            here = here[np.argsort(flops[here])]
            axes.plot(flops[here], drawn[here], "o-", color=colour, markersize=4, linewidth=0.8)
        title = "Runs; a line joins those of one size"
    else:
        dots = axes.scatter(flops, drawn, c=params, norm=LogNorm(), cmap=ListedColormap(sequence(256)), s=12)
        figure.colorbar(dots, ax=axes, label=PARAMS)
        title = "Runs"
    log_axis(axes.xaxis, flops.min(), flops.max(), powers=True)
    axes.set(xlabel=FLOPS, ylabel="loss (nats per token)", title=title + drawn_of(len(shown), len(loss)))
    return figure


def _within(draws: np.ndarray) -> np.ndarray:
    """Return the draws without the few far ones that would squeeze all others into a corner."""
    low, high = np.nanpercentile(draws, [0.5, 99.5])
    return (draws >= low) & (draws <= high)
