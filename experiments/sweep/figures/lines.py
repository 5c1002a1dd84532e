"""Draw many lines: learning curves of a sweep, settings across all axes, replayed searches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from experiments.report.style import (
    GRID,
    INK,
    MUTED,
    NARROW,
    ORANGE,
    PALETTE,
    WIDTH,
    log_axis,
    new_figure,
    note,
    styled,
)
from experiments.runs.curves import TRAINING_LOSS, LossCurve, interrupted
from experiments.sweep.analysis.document import SweepAnalysis
from experiments.sweep.analysis.ranking import BY_LOSS, Ranking
from experiments.sweep.analysis.scales import positions
from experiments.sweep.figures.axes import readable_top, ticks, value_colours
from experiments.sweep.figures.panels import fullest
from experiments.sweep.search.replay import SamplerComparison

MOST_LINES = 250  # of parallel coordinates


@styled
def learning_curves(
    curves: Sequence[tuple[Mapping[str, Any], LossCurve]],
    by_flops: bool,
    width: float = WIDTH,
    ranked: Ranking = BY_LOSS,
) -> Figure:
    """Draw the smoothed training loss of runs, coloured by their last validation loss, or by what ranks instead.

    by_flops: over FLOPs, else over tokens. A cross ends a run that diverged, a bar one that was pruned.
    """
    figure = new_figure(width, 4.0 if width > NARROW else 3.4)
    axes = figure.subplots()
    by = "last_loss" if ranked.by_loss else ranked.objective
    known = [row[by] for row, _ in curves if row[by] is not None]
    colours, norm = value_colours(known or [0.0], ranked)
    ends, lows = [], []
    for row, curve in reversed(curves):  # the best on top
        x = curve.flops if by_flops else curve.tokens
        value = row[by]
        lost = row["state"] == "diverged" or curve.diverged
        colour = ORANGE if lost else MUTED if value is None else colours(norm(value))
        axes.plot(*interrupted(x, curve.loss, curve.hole), color=colour, linewidth=0.9, alpha=0.75)
        marker = "x" if lost else "|" if row["state"] == "pruned" else ""
        axes.plot(x[-1], curve.loss[-1], marker, color=colour, markersize=7, markeredgewidth=1.4, zorder=4)
        ends.append((x[max(0, np.searchsorted(x, x[-1] / 300))], x[-1]))
        lows.append((curve.loss.min(), curve.loss[0], curve.steps[0]))
    log_axis(axes.xaxis, min(low for low, _ in ends), max(high for _, high in ends), powers=by_flops, margin=0.03)
    bottom, begun = min(low for low, *_ in lows), min(step for *_, step in lows)
    # If runs continue others, those that began at the start determine the end of the axis.
    first = float(np.median([start for _, start, step in lows if step == begun]))
    axes.set_ylim(bottom - 0.04 * (first - bottom) - 1e-3, first + 0.1 * (first - bottom) + 1e-3)
    axes.set(xlabel="compute spent so far, 6·N·tokens (FLOPs)" if by_flops else "tokens seen", ylabel=TRAINING_LOSS)
    if len(known) > 1:
        label = "last validation loss" if ranked.by_loss else ranked.words
        _colour_bar(figure, axes, colours, norm, label, below=width <= NARROW)
    return figure


@styled
def parallel_coordinates(analysis: SweepAnalysis, width: float = WIDTH) -> Figure:
    """Draw a line per setting through its values and its mean, coloured by it; the best are drawn last.

    Losses are those of `fullest`. Lines are set a little apart where values coincide. In a narrow figure the
    coordinates are stacked vertically.
    """
    varied, upright = analysis.summary.axes, width > NARROW
    ranked = analysis.summary.ranking
    rows = fullest(analysis.summary.settings, analysis.compared_rungs)[0]
    rows = sorted(rows, key=lambda row: ranked.cost(row.known_mean))
    rows = [rows[i] for i in np.unique(np.round(np.linspace(0, len(rows) - 1, MOST_LINES)).astype(int))]
    losses = [row.known_mean for row in rows]
    top, low = readable_top(losses) if ranked.by_loss else max(losses), min(losses)
    figure = new_figure(width, 3.9 if upright else 0.6 + 0.75 * (len(varied) + 1))
    axes = figure.subplots()
    axes.set_axis_off()
    shift = np.linspace(-0.022, 0.022, len(rows)) if len(rows) > 1 else np.zeros(1)
    columns = []
    for i, (name, among) in enumerate(varied.items()):
        unit = _unit(positions([row.values[name] for row in rows], among), among)
        missing = np.isnan(unit)
        columns.append(np.where(missing, -0.09, unit) + shift)
        places, labels = ticks(among, 7)
        _coordinate(axes, i, name.replace("_", " "), _unit(np.array(places), among), labels, upright)
        if missing.any():
            at = (i - 0.03, -0.09) if upright else (-0.09, -i - 0.12)
            side: dict[str, Any] = {"ha": "right", "va": "center"} if upright else {"ha": "center", "va": "top"}
            axes.text(*at, "none", fontsize=7.5, color=MUTED, **side)
    span = (top - low) or 1.0
    columns.append(np.minimum((np.array(losses) - low) / span, 1.0))
    shown = np.linspace(low, top, 5) if top > low else np.array([low])
    labels = [f"{value:.3f}" for value in shown]
    _coordinate(axes, len(varied), ranked.words, (shown - low) / span, labels, upright, side=1)
    lines = np.stack([np.stack([np.full(len(rows), i), column], 1) for i, column in enumerate(columns)], 1)
    if not upright:
        lines = lines[..., ::-1] * np.array([1, -1])
    colours, norm = value_colours(losses, ranked)
    alpha = float(np.clip(30 / len(rows), 0.25, 0.8))
    rest: dict[str, Any] = {"linewidths": 0.9, "alpha": alpha, "array": np.array(losses[1:][::-1])}
    axes.add_collection(LineCollection(list(lines[1:][::-1]), cmap=colours, norm=norm, **rest))
    axes.plot(lines[0, :, 0], lines[0, :, 1], color=INK, linewidth=2.0, zorder=5)
    if upright:
        axes.set(xlim=(-0.45, len(varied) + 0.3), ylim=(-0.14, 1.16))
    else:
        axes.set(xlim=(-0.16, 1.12), ylim=(-len(varied) - 0.35, 0.5))
    return figure


def _unit(places: np.ndarray, among: Sequence[Any]) -> np.ndarray:
    """Return the positions on 0…1 of their axis."""
    everything = positions([value for value in among if value is not None], among)
    span = everything.max() - everything.min()
    return (places - everything.min()) / span if span > 0 else np.where(np.isnan(places), np.nan, 0.5)


def _coordinate(
    axes: Axes,
    x: float,
    name: str,
    places: Sequence[float] | np.ndarray,
    labels: Sequence[str],
    upright: bool,
    side: int = -1,
) -> None:
    """Draw one axis with its labels.

    side: of the labels of an upright coordinate, -1 left, 1 right; those of a horizontal coordinate are below it.
    """
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    if not upright:
        axes.plot([0, 1], [-x, -x], color=MUTED, linewidth=0.9, zorder=4)
        axes.text(0, 0.1 - x, name, ha="left", va="bottom", fontsize=8.5, fontweight="bold", bbox=halo, zorder=6)
        for place, label in zip(places, labels, strict=True):
            axes.plot([place, place], [-x - 0.03, -x + 0.03], color=MUTED, linewidth=0.9, zorder=4)
            axes.text(place, -x - 0.07, label, ha="center", va="top", fontsize=7.5, zorder=6, bbox=halo)
        return
    axes.plot([x, x], [0, 1], color=MUTED, linewidth=0.9, zorder=4)
    axes.text(x, 1.1, name, ha="center", va="bottom", fontsize=9, fontweight="bold")
    for place, label in zip(places, labels, strict=True):
        axes.plot([x - 0.012, x + 0.012], [place, place], color=MUTED, linewidth=0.9, zorder=4)
        axes.text(
            x + 0.03 * side,
            place,
            label,
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7.5,
            zorder=6,
            bbox=halo,
        )


def _colour_bar(figure: Figure, axes: Any, colours: Any, norm: Any, label: str, below: bool) -> None:
    place: dict[str, Any] = {"location": "bottom"} if below else {"pad": 0.02, "shrink": 0.8}
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=28, **place)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8, color=GRID)
    bar.outline.set_visible(False)


@styled
def reached(compared: SamplerComparison) -> Figure:
    """Draw the outcome of `compare_samplers`; solid: best region tried; dashed: best region selected."""
    figure = new_figure(5.5, 3.4)
    axes = figure.subplots()
    trials = np.arange(compared.budget + 1)
    for (sampler, found), colour in zip(compared.samplers.items(), PALETTE * 2, strict=False):
        for name, reaching, line in (("first", found.first, "-"), ("settled", found.settled, "--")):
            numbers = np.array([np.inf if number is None else number for number in reaching])
            share = (numbers[None, :] <= trials[:, None]).mean(axis=1)
            axes.step(trials, share, line, where="post", color=colour, label=sampler if name == "first" else None)
    axes.plot([], [], "-", color=MUTED, label="tried")
    axes.plot([], [], "--", color=MUTED, label="named best, to the end")
    axes.set(xlabel="trials", ylabel="share of the searches", xlim=(0, compared.budget), ylim=(0, 1.02))
    axes.set_title("Best region")
    note(axes, f"{len(compared.best_region)} of {compared.points} points, {compared.replays} searches each")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
