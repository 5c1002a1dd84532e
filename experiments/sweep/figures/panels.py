"""Draw loss against each axis of a sweep, one panel per axis."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    figures_of,
    legend_aside,
    new_panels,
    styled,
)
from experiments.sweep.analysis.outcome import Summary, Winner
from experiments.sweep.analysis.rungs import SweepRung
from experiments.sweep.analysis.scales import positions, scale_of
from experiments.sweep.analysis.settings import MeasuredSetting, Setting
from experiments.sweep.figures.axes import place_axis, readable_top

LOSS = "validation loss"


@styled
def axis_panels(summary: Summary, rungs: Sequence[SweepRung] = ()) -> list[Figure]:
    """Draw loss, or what ranks instead, against each axis: trials faint, settings with the winner's other values blue.

    rungs: of a sweep that stops trials; empty where the loss does not rank. The band is ± the seed noise of one run.
    Hollow marks are losses at the rungs, darker at later ones, so that each is seen against the others after the same
    tokens; lines join those that share the winner's other values. Diverged trials are crosses at the top; a triangle
    there marks a loss beyond the frame.
    """
    axes, label = summary.axes, LOSS if summary.ranking.by_loss else summary.ranking.words
    stops = rungs[:-1]
    low, top = _frame(summary, stops)
    pad = 0.06 * (top - low) or 0.05
    panels = new_panels(len(axes), 3.4 if stops else 2.9)
    for panel, (name, among) in zip(panels, axes.items(), strict=True):
        _draw_rungs(panel, name, summary, stops, top)
        _axis_panel(panel, name, summary, top)
        place_axis(panel.xaxis, among, 5)
        panel.set(xlabel=name.replace("_", " "), ylabel=label, ylim=(low - pad, top + 2 * pad))
        if stops:
            legend_aside(panel)
    return figures_of(panels)


def _frame(summary: Summary, stops: Sequence[SweepRung]) -> tuple[float, float]:
    """Return the lowest and highest value inside the frame of `axis_panels`; of stopped trials all except the worst.

    Only losses may lie above it.
    """
    losses = _shown_losses(summary, stops)
    winner, noise = summary.winner, summary.seed_noise
    band = [] if winner is None or noise is None else [winner.mean - noise, winner.mean + noise]
    if not summary.ranking.by_loss:
        return min(losses + band), max(losses + band)
    stopped = [row.stopped.mean for row in summary.settings if row.stopped]
    top = max(readable_top(some) for some in (losses, stopped) if some)
    return min(losses + band[:1]), top


def _shown_losses(summary: Summary, stops: Sequence[SweepRung]) -> list[float]:
    by = summary.ranking.objective
    ended = [row[by] for row in summary.trials if row[by] is not None]
    return ended + [row.known_mean for rung in stops for row in rung.settings]


def goes_beyond(summary: Summary, rungs: Sequence[SweepRung] = ()) -> bool:
    """Return whether `axis_panels` has losses above its frame, which it marks by triangles."""
    stops = rungs[:-1]
    losses = _shown_losses(summary, stops)
    return bool(losses) and max(losses) > _frame(summary, stops)[1]


def is_population(settings: Sequence[Setting]) -> bool:
    """Return whether settings changed along runs, as in a population."""
    return any(row.member is not None for row in settings)


def _draw_rungs(panel: Axes, name: str, summary: Summary, stops: Sequence[SweepRung], top: float) -> None:
    among, winner = summary.axes[name], None if is_population(summary.settings) else summary.winner
    named = {round(place) for place in np.linspace(0, len(stops) - 1, 4)}
    for i, (rung, shade) in enumerate(zip(stops, np.linspace(0.4, 0.9, len(stops)), strict=True)):
        colour = mpl.colormaps["Purples"](shade)
        rows = [row for row in rung.settings if row.values[name] is not None]
        held = [row for row in rows if winner is not None and _on_the_line(row, name, winner)]
        rest = [row for row in rows if row not in held]
        joined = "o" if scale_of(among) == "rank" else "o-"
        for members, marker, alpha in ((rest, "o", 0.45), (held, joined, 1.0)):
            x, y = _places(members, name, among), np.array([row.known_mean for row in members])
            order = np.argsort(x)
            look: dict[str, Any] = {"color": colour, "markerfacecolor": "white", "markersize": 4, "alpha": alpha}
            panel.plot(x[order], y[order], marker, linewidth=0.9, **look)
            panel.plot(x[y > top], [0.93] * sum(y > top), "^", transform=panel.get_xaxis_transform(), **look)
        if i in named:
            words = f"after {rung_in_words(rung.steps)}"
            panel.plot(
                [], [], joined if held else "o", color=colour, markerfacecolor="white", markersize=4, label=words
            )
    panel.plot([], [], "o", color=MUTED if winner is None else BLUE, markersize=4.5, label="at the end")


def rung_in_words(steps: int | list[int]) -> str:
    """Write the updates of a rung: 7 updates; 7 or 14 updates, where batch sizes differ."""
    listed = steps if isinstance(steps, list) else [steps]
    return " or ".join(f"{step:,}" for step in listed) + " updates"


def _on_the_line(row: MeasuredSetting, name: str, winner: Winner) -> bool:
    return all(value == winner.setting[other] for other, value in row.values.items() if other != name)


def _places(rows: Sequence[MeasuredSetting], name: str, among: Sequence[Any]) -> np.ndarray:
    return positions([row.values[name] for row in rows], among)


def _axis_panel(panel: Axes, name: str, summary: Summary, top: float) -> None:
    among = summary.axes[name]

    def place(rows: Sequence[Any]) -> np.ndarray:
        return positions([row.get(name) for row in rows], among)

    by = summary.ranking.objective
    finished = [trial for trial in summary.trials if trial[by] is not None]
    inside = [trial for trial in finished if trial[by] <= top]
    panel.plot(place(inside), [trial[by] for trial in inside], ".", color=MUTED, alpha=0.35, markersize=4)
    marks: dict[str, Any] = {"transform": panel.get_xaxis_transform()}
    beyond = [trial for trial in finished if trial[by] > top]
    panel.plot(place(beyond), [0.93] * len(beyond), "^", color=MUTED, alpha=0.5, markersize=4, **marks)
    lost = [trial for trial in summary.trials if trial.get("state") == "diverged"]
    panel.plot(place(lost), [0.97] * len(lost), "x", color=ORANGE, markersize=5, **marks)
    winner = summary.winner
    if winner is None:
        return
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.3, "markersize": 11}
    panel.plot(positions([winner.setting[name]], among), winner.mean, "o", zorder=4, **ring)
    if is_population(summary.settings):
        return
    settings = [row for row in summary.settings if row.mean is not None and row.values[name] is not None]
    held = [row for row in settings if _on_the_line(row, name, winner)]
    x, y = _places(held, name, among), np.array([row.known_mean for row in held])
    order = np.argsort(x)
    x, y, noise = x[order], y[order], summary.seed_noise
    if scale_of(among) == "rank" or len(x) == 1:
        panel.errorbar(x, y, yerr=noise, fmt="o", color=BLUE, capsize=3, markersize=4.5, zorder=3)
    else:
        panel.plot(x, y, "o-", color=BLUE, markersize=4.5, zorder=3)
        if noise is not None:
            panel.fill_between(x, y - noise, y + noise, color=BLUE, alpha=0.15, linewidth=0)


def fullest(
    settings: Sequence[Setting], rungs: Sequence[SweepRung] = ()
) -> tuple[Sequence[MeasuredSetting], int | list[int] | None]:
    """Return (settings with a mean, updates after which) where the most have one; None as updates: at the end.

    After early stopping few settings have a loss at the end; at an earlier rung all can be compared.
    """
    ended = [row for row in settings if row.mean is not None]
    stops = [] if is_population(settings) else rungs[:-1]
    most = max(stops, key=lambda rung: (len(rung.settings), rung.tokens), default=None)
    if most is None or len(most.settings) <= len(ended):
        return ended, None
    return most.settings, most.steps
