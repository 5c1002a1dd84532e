"""Draw fitted scaling laws: fits in, a matplotlib Figure out; nothing is shown or saved."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.report.style import (
    BLUE,
    INK,
    MUTED,
    NARROW,
    ORANGE,
    PALETTE,
    WIDTH,
    figure_of,
    figures_of,
    legend_aside,
    log_axis,
    new_figure,
    new_panels,
    note,
    sequence,
    styled,
)
from experiments.scaling.law.parametric import ParametricFit
from experiments.scaling.rows.thin import DOTS, evenly, sample
from experiments.scaling.valleys.isoflop import IsoflopFit, Valley
from experiments.words import counted

LOSS = "validation loss (nats per token)"
PARAMS = "parameters N"
TOKENS = "training tokens D"
FLOPS = "compute C (FLOPs)"
WIDE = 60.0  # largest over smallest compute, from where a panel has no room for 3×10^n between the powers of ten
MANY_VALLEYS = 12  # more are distinguished by a colour scale, not by name
FAR_OUT = 3.0  # interquartile ranges above the upper quartile (Tukey 1977, "Exploratory Data Analysis", section 2D)


class MeasuredMinimum(NamedTuple):
    """The minimum that was measured at a budget held out of every fit."""

    flops: float
    params: float
    tokens: float


def drawn_of(shown: int, runs: int) -> str:
    """Return the end of a figure's title if it shows only part of the runs; else ""."""
    return "" if shown == runs else f", {shown:,} of {runs:,} runs"


def _flops(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"${mantissa}\\!\\times\\!10^{{{int(exponent)}}}$"


def _draw_valleys(axes: Any, valleys: Sequence[Valley]) -> None:
    valleys = [valley for valley in valleys if valley.coefficients is not None]
    flops = [valley.flops for valley in valleys]
    many = len(valleys) > MANY_VALLEYS
    colours = sequence(len(valleys))
    if many:
        scale = ScalarMappable(LogNorm(min(flops), max(flops)), ListedColormap(sequence(256)))
        colours = list(scale.to_rgba(np.array(flops)))
        narrow = figure_of(axes).get_figwidth() <= NARROW
        axes.figure.colorbar(scale, ax=axes, label=FLOPS, location="bottom" if narrow else "right")
    for valley, colour in zip(valleys, colours, strict=True):
        accepted = valley.reason is None
        shown = evenly(len(valley.loss), max(DOTS // len(valleys), 1))
        dots = valley.params[shown], valley.loss[shown]
        axes.plot(*dots, "o", color=colour, markersize=4, alpha=1 if accepted else 0.5)
        grid = np.geomspace(valley.params.min() / 1.1, valley.params.max() * 1.1, 200)
        label = _flops(valley.flops) + ("" if accepted else " (rejected)")
        style = {"linestyle": "-"} if accepted else {"linestyle": "--", "alpha": 0.5}
        axes.plot(grid, valley.curve(grid), color=colour, linewidth=1.3, label=label, **style)
        if accepted:
            best = valley.optimum
            axes.plot(best.params, best.loss, "D", color=colour, markeredgecolor=INK, markersize=6, zorder=4)
    if valleys:
        sizes = np.concatenate([valley.params for valley in valleys])
        log_axis(axes.xaxis, sizes.min(), sizes.max())
        _cut_off_high_losses(axes, np.concatenate([valley.loss for valley in valleys]))
    axes.set(xlabel=PARAMS, ylabel=LOSS, title="IsoFLOP valleys")
    if not many:
        legend_aside(axes, title=FLOPS)


def _cut_off_high_losses(axes: Any, losses: np.ndarray) -> None:
    """End the axis below very high losses, so that the others stay readable, and note how many are cut off."""
    lower, upper = np.percentile(losses, [25, 75])
    far = losses > upper + FAR_OUT * (upper - lower)
    if far.any() and not far.all():
        bottom, top = losses[~far].min(), losses[~far].max()
        axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
        note(axes, f"{counted(int(far.sum()), 'run')} above, up to {losses.max():.3g}")


def _draw_optimal(
    axes: Any,
    name: str,
    isoflop: IsoflopFit | None,
    parametric: ParametricFit | None,
    others: Mapping[str, Any] = MappingProxyType({}),
    measured: Sequence[MeasuredMinimum] = (),
) -> None:
    """Draw N*(C) or D*(C): the valleys' minima, both fitted lines and their 95 % bands, the others' lines."""
    if isoflop is not None:
        budgets = np.array([optimum.flops for optimum in isoflop.optima])
        points = np.array([getattr(optimum, name) for optimum in isoflop.optima])
    else:
        assert parametric is not None
        budgets = 6 * parametric.table.params * parametric.table.tokens
        points = np.array([])
    budgets = np.array(budgets)
    tested = np.array([best.flops for best in measured])
    grid = np.geomspace(budgets.min() / 2, 2 * max(budgets.max(), *tested, 0), 100)
    exponent = "a" if name == "params" else "b"
    seen, bands = [points], ""
    for (label, fit), colour in zip(others.items(), PALETTE[2:], strict=False):
        line = getattr(fit, f"{name}_coefficient") * grid ** getattr(fit, exponent)
        axes.plot(grid, line, ":", color=colour, label=f"{label}: $C^{{\\,{getattr(fit, exponent):.3f}}}$")
        seen.append(line)
    for fit, colour, label, style in (
        (parametric, ORANGE, "parametric", "--"),
        (isoflop, BLUE, "IsoFLOP", "-"),
    ):
        if fit is None:
            continue
        line = getattr(fit.optimal(grid), name)
        power = f"{label}: $C^{{\\,{getattr(fit, exponent):.3f}}}$"
        axes.plot(grid, line, style, color=colour, label=power)
        seen.append(line)
        try:
            low, high = fit.optimal_interval(grid)[name]
        except ValueError:  # the noise is unknown: a line without a band
            continue
        bands = ", 95 % bands"
        axes.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    if len(points):
        axes.plot(budgets, points, "D", color=BLUE, markeredgecolor=INK, zorder=4, label="valley minima")
    if len(tested):
        found = np.array([getattr(best, name) for best in measured])
        axes.plot(tested, found, "*", color=INK, markersize=10, zorder=5, label="held-out minimum")
        seen.append(found)
    log_axis(axes.xaxis, grid.min(), grid.max(), powers=True, margin=0.02)
    values = np.concatenate(seen)
    log_axis(axes.yaxis, values.min(), values.max())
    symbol = "N*" if name == "params" else "D*"
    axes.set(xlabel=FLOPS, ylabel=PARAMS if name == "params" else TOKENS, title=f"{symbol}(C){bands}")
    axes.legend(loc="upper left")


@styled
def valleys(isoflop: IsoflopFit, width: float = WIDTH) -> Figure:
    """Draw loss over N for each budget, with its curve and minimum; rejected budgets dashed and pale."""
    figure = new_figure(width, 4.2)
    _draw_valleys(figure.subplots(), isoflop.valleys)
    return figure


@styled
def compute_optimal(
    isoflop: IsoflopFit | None,
    parametric: ParametricFit | None = None,
    others: Mapping[str, Any] = MappingProxyType({}),
    measured: Sequence[MeasuredMinimum] = (),
) -> list[Figure]:
    """Draw N*(C) and D*(C); at least one of the first two fits is needed.

    others: at most three more power laws, by name, as lines without bands.
    """
    panels = new_panels(2, 3.4)
    for panel, name in zip(panels, ("params", "tokens"), strict=True):
        _draw_optimal(panel, name, isoflop, parametric, others, measured)
    return figures_of(panels)


@styled
def overview(isoflop: IsoflopFit | None, parametric: ParametricFit | None) -> Figure:
    """Draw valleys, N*(C) and D*(C) in one figure, as `isoflop scaling fit --plot` writes; one fit is enough."""
    figure = new_figure(WIDTH, 7.4 if isoflop is not None else 3.8)
    if isoflop is not None:
        grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
        _draw_valleys(figure.add_subplot(grid[0, :]), isoflop.valleys)
        left, right = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    else:
        left, right = figure.subplots(1, 2)
    _draw_optimal(left, "params", isoflop, parametric)
    _draw_optimal(right, "tokens", isoflop, parametric)
    return figure


@styled
def measured_predicted(fit: ParametricFit, held_out: Sequence[dict[str, Any]] = (), level: int | float = 95) -> Figure:
    """Draw measured over predicted loss: dots are the fitted runs, stars `held_out` ones {params, tokens, loss}."""
    figure = new_figure(4.2, 3.9)
    axes = figure.subplots()
    table = fit.table
    predicted = fit.predict(table.params, table.tokens)
    everything = [predicted, table.loss]
    shown = sample(len(table), DOTS, 0)
    axes.plot(predicted[shown], table.loss[shown], "o", color=BLUE, alpha=0.75, markersize=4)
    for run in held_out:
        centre = float(fit.predict(run["params"], run["tokens"]))
        low, high = fit.predict_interval(run["params"], run["tokens"], level)
        axes.errorbar(
            centre,
            run["loss"],
            xerr=[[max(centre - low, 0)], [max(high - centre, 0)]],
            fmt="*",
            color=ORANGE,
            markersize=10,
            markeredgecolor=INK,
            capsize=4,
            zorder=4,
        )
        everything.append(np.array([low, high, run["loss"]]))
    values = np.concatenate(everything)
    span = np.array([values.min(), values.max()]) + np.array([-0.04, 0.04]) * np.ptp(values)
    axes.plot(span, span, color=MUTED, linewidth=0.9, zorder=1)
    axes.set(xlim=span, ylim=span, xlabel="predicted loss (nats per token)", ylabel="measured " + LOSS)
    axes.set_title("Measured and predicted" + drawn_of(len(shown), len(table)))
    axes.set_aspect("equal")
    return figure


@styled
def residuals(fit: ParametricFit) -> list[Figure]:
    """Draw the relative residuals over N, D and C: a law of the right form leaves no trend."""
    axes = new_panels(3, 2.9)
    shown = sample(len(fit.table), DOTS, 0)
    percent = -100 * fit.residuals[shown]  # measured above the law is positive
    params, tokens = fit.table.params[shown], fit.table.tokens[shown]
    pairs = ((PARAMS, params, tokens, "D"), (TOKENS, tokens, params, "N"), (FLOPS, 6 * params * tokens, params, "N"))
    for axis, (label, values, other, letter) in zip(axes, pairs, strict=True):
        axis.axhline(0, color=MUTED, linewidth=0.9)
        colour = np.log(other)
        axis.scatter(values, percent, c=colour, cmap="viridis", s=18, vmax=colour.max() + 0.18 * np.ptp(colour))
        log_axis(axis.xaxis, values.min(), values.max(), powers=label == FLOPS)
        if label == FLOPS:
            wide = values.max() > WIDE * values.min()
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=4))
        axis.set(xlabel=label, ylabel=r"$\ln L - \ln \hat{L}$ (%)")
        note(axis, f"darker: smaller {letter}" + drawn_of(len(shown), len(fit.table)))
    return figures_of(axes)
