"""Draw a comparison of models: paired differences with their intervals, and reliability curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.evaluate.compare import Difference, Score
from experiments.report.style import (
    GRID,
    MUTED,
    NARROW,
    PALETTE,
    WIDTH,
    figures_of,
    legend_aside,
    new_figure,
    new_panels,
    sequence,
    styled,
)


@dataclass(frozen=True)
class ForestRow:
    """One task or domain: the differences of each model from the reference; scale: 100 for points of a share."""

    label: str
    differences: Sequence[Difference]
    scale: float
    higher_is_better: bool


def colours_of(names: Sequence[str]) -> dict[str, Any]:
    """Return a colour for each name: distinguishable ones, or where there are many a sequence."""
    chosen = PALETTE if len(names) <= len(PALETTE) else sequence(len(names))
    return dict(zip(names, chosen, strict=False))


@styled
def forest(rows: Sequence[ForestRow], colours: Mapping[str, Any], label: str, width: float = WIDTH) -> Figure:
    """Draw differences with 95 % intervals, the first row on top; grey: what is smaller than the questions can show.

    colours: of all models, of which those that are drawn are found in the rows. Right of zero is always better.
    """
    drawn = {each.second for row in rows for each in row.differences}
    names = [name for name in colours if name in drawn]
    place, step = {name: index for index, name in enumerate(names)}, 0.72 / max(len(names), 1)
    figure = new_figure(width, 0.9 + (0.16 + 0.2 * len(names)) * len(rows) + (0.25 if width <= NARROW else 0))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        sign = row.scale * (1 if row.higher_is_better else -1)
        floor = max((each.detectable for each in row.differences if each.detectable is not None), default=None)
        if floor is not None:
            axes.barh(y, 2 * floor * row.scale, left=-floor * row.scale, height=0.86, color=GRID, zorder=0)
        for each in row.differences:
            at = y + (place[each.second] - (len(names) - 1) / 2) * step
            colour, told = colours[each.second], each.verdict in ("better", "worse")
            if each.paired.low is not None and each.paired.high is not None:
                axes.plot([sign * each.paired.low, sign * each.paired.high], [at, at], color=colour, linewidth=1.6)
            face = colour if told else "white"
            axes.plot(sign * each.paired.mean, at, "o", color=colour, markerfacecolor=face, markersize=5.5)
    for name in names:
        axes.plot([], [], "o-", color=colours[name], label=name)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set(xlabel=label, ylim=(len(rows) - 0.45, -0.55))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if len(names) > 1:
        legend_aside(axes, entries=1 if width <= NARROW else None)
    return figure


@styled
def reliability(tasks: Sequence[tuple[str, Sequence[Score]]], colours: Mapping[str, Any]) -> list[Figure]:
    """Draw one panel per task: the accuracy of predictions over their confidence, with Wilson intervals.

    tasks: (name, scores) of tasks with calibration. The page has the legend.
    """
    panels = new_panels(len(tasks), 3.5)
    for axes, (task, scores) in zip(panels, tasks, strict=True):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--")
        for score in scores:
            if score.calibration is None:
                continue
            bins = score.calibration.bins
            x, y, low, high = np.array([(row.confidence, row.accuracy, row.low, row.high) for row in bins]).T
            bars = np.maximum([y - low, high - y], 0)
            axes.errorbar(x, y, yerr=bars, color=colours[score.name], fmt="o-", markersize=3.5, elinewidth=0.9)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"confidence, {task}", ylabel="share that is right")
        axes.set_aspect("equal")
    return figures_of(panels)
