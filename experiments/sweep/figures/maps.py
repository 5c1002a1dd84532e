"""Draw maps of two quantities: pairs of axes, two objectives, the optimal learning rate over sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation

from experiments.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    figure_of,
    figures_of,
    legend_aside,
    log_axis,
    new_panels,
    sequence,
    styled,
)
from experiments.sweep.analysis.document import SweepAnalysis
from experiments.sweep.analysis.optimum import RateTransfer
from experiments.sweep.analysis.pareto import ParetoFront, ParetoSetting
from experiments.sweep.analysis.scales import MANY, distinct, positions, scale_of
from experiments.sweep.figures.axes import place_axis, tick_labels, value_colours
from experiments.sweep.figures.panels import fullest, is_population

LOSS = "validation loss (nats)"
_LIGHT = 1.275  # sum of red, green and blue from which a colour takes dark text


def pairs_of(analysis: SweepAnalysis) -> list[tuple[str, str]]:
    """Return the pairs of the two or three axes that matter most, or of the first ones where that is not known."""
    names, found = list(analysis.summary.axes), analysis.importance.ped_anova
    if not isinstance(found, str):
        names.sort(key=lambda name: -found[name].share)
    chosen = names[:3]
    return [(x, y) for i, x in enumerate(chosen) for y in chosen[i + 1 :]]


@styled
def pair_maps(analysis: SweepAnalysis) -> list[Figure]:
    """Draw the best mean over all other axes, at each pair of values of the axes that matter most.

    Losses are those of `fullest`. Cells where most pairs of values were tried, otherwise dots, with contours between
    them where both axes are numbers. A ring marks the winner.
    """
    pairs, summary = pairs_of(analysis), analysis.summary
    panels = new_panels(len(pairs), 3.4)
    ranked = summary.ranking
    rows, _ = fullest(summary.settings, analysis.compared_rungs)
    colours, norm = value_colours([row.known_mean for row in rows], ranked)
    for panel, (x, y) in zip(panels, pairs, strict=True):
        best: dict[tuple[Any, Any], float] = {}
        for row in rows:
            pair = row.values[x], row.values[y]
            if None not in pair:
                best[pair] = min(row.known_mean, best.get(pair, row.known_mean), key=ranked.cost)
        across, up = summary.axes[x], summary.axes[y]
        if grid := _is_grid(best, across, up):
            _cells(panel, best, across, up, colours, norm)
        else:
            # A member's final values say little about the values that its run was trained with before.
            _dots(panel, best, across, up, colours, norm, contours=not is_population(summary.settings))
            place_axis(panel.xaxis, across, 5)
            place_axis(panel.yaxis, up, 6)
        panel.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
        if summary.winner is not None:
            _ring(panel, summary.winner.setting, (x, y), across, up, grid)
        bar = figure_of(panel).colorbar(ScalarMappable(norm, colours), ax=panel, location="bottom", aspect=30)
        bar.set_label(f"{ranked.best} mean {ranked.words}", fontsize=8)
        bar.outline.set_visible(False)
    return figures_of(panels)


def _is_grid(best: Mapping[tuple[Any, Any], float], across: Sequence[Any], up: Sequence[Any]) -> bool:
    """Return whether values were listed and most pairs of them tried, not drawn one by one."""
    columns, rows = len(distinct(across)), len(distinct(up))
    return max(columns, rows) <= MANY and 2 * len(best) >= columns * rows


def _cells(panel: Axes, best: dict, across: Sequence[Any], up: Sequence[Any], colours: Any, norm: Any) -> None:
    columns, rows = distinct(across), distinct(up)
    grid = np.array([[best.get((x, y), np.nan) for x in columns] for y in rows])
    panel.imshow(grid, origin="lower", aspect="auto", cmap=colours, norm=norm)
    if len(columns) <= 5 and len(rows) <= 9:
        for (j, i), loss in np.ndenumerate(grid):
            if np.isfinite(loss):
                ink = "white" if sum(colours(norm(loss))[:3]) < _LIGHT else INK
                panel.text(i, j, f"{loss:.3f}", ha="center", va="center", fontsize=7.5, color=ink)
    panel.set_xticks(range(len(columns)), tick_labels(columns))
    panel.set_yticks(range(len(rows)), tick_labels(rows))
    if len(columns) > 5:
        panel.tick_params(axis="x", rotation=45)
    panel.grid(visible=False)


def _dots(
    panel: Axes, best: dict, across: Sequence[Any], up: Sequence[Any], colours: Any, norm: Any, *, contours: bool
) -> None:
    x, y = positions([pair[0] for pair in best], across), positions([pair[1] for pair in best], up)
    loss = np.minimum(list(best.values()), norm.vmax)
    if contours and "rank" not in (scale_of(across), scale_of(up)):
        try:
            scaled = [(v - v.min()) / ((v.max() - v.min()) or 1) for v in (x, y)]
            triangles = Triangulation(*scaled).triangles
            levels = np.linspace(norm.vmin, norm.vmax, 12)
            panel.tricontourf(x, y, triangles, loss, levels=levels, cmap=colours, norm=norm, alpha=0.55)
        except (ValueError, RuntimeError):
            pass  # points on one line span no area: no contours
    panel.scatter(x, y, c=loss, cmap=colours, norm=norm, s=11, edgecolors="white", linewidths=0.4, zorder=3)


def _ring(panel: Axes, setting: Mapping[str, Any], pair: tuple[str, str], across: Any, up: Any, grid: bool) -> None:
    if any(setting[name] is None for name in pair):
        return
    if grid:
        place = distinct(across).index(setting[pair[0]]), distinct(up).index(setting[pair[1]])
        box = {"fill": False, "edgecolor": ORANGE, "linewidth": 2.2}
        panel.add_patch(_rectangle((place[0] - 0.5, place[1] - 0.5), **box))
        return
    x, y = positions([setting[pair[0]]], across), positions([setting[pair[1]]], up)
    panel.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=ORANGE, markeredgewidth=2, zorder=4)


def _rectangle(corner: tuple[float, float], **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, zorder=4, **style)


@styled
def pareto_front(found: ParetoFront) -> list[Figure]:
    """Draw the first objective against each other one: front joined, settings within noise hollow, others grey."""
    names, settings = found.objectives, found.settings
    panels = new_panels(len(names) - 1, 3.6)
    values = np.array([row.values for row in settings])
    errors = np.array([row.errors for row in settings])
    place = np.array([row.place for row in settings])
    looks = (("behind", MUTED, "none", "dominated"), ("near", ORANGE, "white", "dominated, within the noise"))
    for k, panel in enumerate(panels, start=1):
        for kind, colour, face, label in (*looks, ("front", BLUE, BLUE, "on the front")):
            here = place == kind
            if here.any():
                face = face if face != "none" else colour
                x, y = values[here, k], values[here, 0]
                bars: dict[str, Any] = {"xerr": errors[here, k], "yerr": errors[here, 0], "elinewidth": 0.8}
                look: dict[str, Any] = {
                    "color": colour,
                    "markerfacecolor": face,
                    "alpha": 0.55 if kind == "behind" else 1,
                }
                panel.errorbar(x, y, fmt="o", label=label, **look, **bars)
        if len(names) == 2:
            ends = values[place == "front"]
            ends = ends[np.argsort(ends[:, 1])]
            panel.plot(ends[:, 1], ends[:, 0], color=BLUE, linewidth=1.0, alpha=0.6)
            _name_ends(panel, settings)
        low, high = values[:, k].min(), values[:, k].max()
        if low > 0 and high / low > 4:
            log_axis(panel.xaxis, low, high)
        better = "higher" if found.directions[k] == "maximize" else "lower"
        panel.set_xlabel(f"{names[k].replace('_', ' ')}\n({better} is better)")
        panel.set_ylabel(LOSS if names[0] == "loss" else names[0].replace("_", " "))
        legend_aside(panel)
    return figures_of(panels)


def _name_ends(panel: Axes, settings: Sequence[ParetoSetting]) -> None:
    """Write the values of the settings on the front next to their points, if there are few."""
    ends = sorted((row for row in settings if row.place == "front"), key=lambda row: row.values[1])
    if len(ends) > 8:
        return
    differ = [name for name in ends[0].setting if len({str(row.setting[name]) for row in ends}) > 1][:2]
    for row in ends:
        said = ", ".join(f"{name} {tick_labels([row.setting[name]])[0]}" for name in differ)
        panel.annotate(said, (row.values[1], row.values[0]), xytext=(5, -9), textcoords="offset points", fontsize=7.5)


@styled
def rate_transfer(found: RateTransfer) -> list[Figure]:
    """Draw loss over the learning rate at each size with its parabola, then the optima over size, with intervals.

    The second is left out if fewer than two sizes have an optimum.
    """
    sizes, axis = found.sizes, found.axis.replace("_", " ")
    left, right = new_panels(2, 3.4)
    optima = [row.optimum for row in sizes if row.optimum is not None]
    bounded = any(optimum.interval_95 is not None for optimum in optima)
    rates = [point.learning_rate for row in sizes for point in row.line]
    for row, colour in zip(sizes, sequence(len(sizes)), strict=True):
        x, y = [point.learning_rate for point in row.line], [point.mean for point in row.line]
        left.plot(x, y, "o", color=colour, markersize=4, label=f"{row.size:g}")
        best = row.optimum
        if best is None:
            left.plot(x, y, ":", color=colour, linewidth=0.9)
            continue
        c0, c1, c2, centre = best.coefficients
        grid = np.linspace(math.log(min(best.rates)), math.log(max(best.rates)), 100) - centre
        left.plot(np.exp(grid + centre), c0 + c1 * grid + c2 * grid**2, color=colour, linewidth=1.4)
        for panel, height in ((left, best.loss), (right, row.size)):
            at = (best.learning_rate, height) if panel is left else (height, best.learning_rate)
            panel.plot(*at, "D", color=colour, markeredgecolor=INK, markersize=6, zorder=4)
        if best.interval_95 is not None:
            left.plot(best.interval_95, [best.loss] * 2, color=colour, linewidth=3.5, alpha=0.45)
            right.plot([row.size] * 2, best.interval_95, color=colour, linewidth=2.2, alpha=0.8)
    log_axis(left.xaxis, min(rates), max(rates))
    log_axis(right.yaxis, min(rates), max(rates))
    listed = [row.size for row in sizes]
    log_axis(right.xaxis, min(listed), max(listed), margin=0.12)
    right.set_xticks(listed, tick_labels(listed))
    left.set(xlabel="learning rate", ylabel=LOSS, title="Loss at each size")
    right.set(xlabel=axis, ylabel="learning rate", title="Optimum" + (" and 95 % interval" if bounded else ""))
    legend_aside(left, title=axis)
    return figures_of([left, right] if len(optima) > 1 else [left])
