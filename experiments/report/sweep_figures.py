"""Figures of a sweep: its analysis (`experiments.sweep.reading.analysis`) in, a matplotlib Figure out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.report.figures import TRAINING_LOSS, Curve, interrupted
from experiments.report.style import (
    BLUE,
    GRID,
    INK,
    MUTED,
    NARROW,
    ORANGE,
    WIDTH,
    amount,
    figures_of,
    legend_aside,
    log_axis,
    new_figure,
    new_panels,
    styled,
)
from experiments.report.sweep_axes import loss_colours, place_axis, readable_top, ticks
from experiments.sweep.reading.executions import execution_text
from experiments.sweep.reading.scales import positions, scale_of

LOSS = "validation loss"
MOST_LINES = 250  # of parallel coordinates
Document = Mapping[str, Any]


@styled
def axis_panels(document: Document) -> list[Figure]:
    """Loss against each axis: every finished trial faint; in blue the settings that share the winner's other values.

    The band is ± the seed noise of one run. Hollow marks are losses at the rungs of a sweep that stops trials, darker
    at later rungs, so that each is seen against the others after the same tokens; lines join those that share the
    winner's other values. Diverged trials are crosses at the top; a triangle there stands for a loss beyond it.
    """
    axes = document["axes"]
    rungs = _stops(document)
    low, top = _frame(document)
    pad = 0.06 * (top - low) or 0.05
    panels = new_panels(len(axes), 3.4 if rungs else 2.9)
    for panel, (name, among) in zip(panels, axes.items(), strict=True):
        _draw_rungs(panel, name, document, rungs, top)
        _axis_panel(panel, name, document, top)
        place_axis(panel.xaxis, among, 5)
        panel.set(xlabel=name.replace("_", " "), ylabel=LOSS, ylim=(low - pad, top + 2 * pad))
        if rungs:
            legend_aside(panel)
    return figures_of(panels)


def _frame(document: Document) -> tuple[float, float]:
    """The lowest and the highest loss that `axis_panels` shows where it is; of what was stopped, all but the worst."""
    losses = _shown_losses(document)
    stopped = [row["stopped"]["mean"] for row in document["settings"] if row.get("stopped")]
    top = max(readable_top(some) for some in (losses, stopped) if some)
    winner, noise = document["winner"], document["seed_noise"]
    band = [] if winner is None or noise is None else [winner["mean"] - noise]
    return min(losses + band), top


def _shown_losses(document: Document) -> list[float]:
    ended = [row["loss"] for row in document["trials"] if row["loss"] is not None]
    return ended + [row["mean"] for rung in _stops(document) for row in rung["settings"]]


def goes_beyond(document: Document) -> bool:
    """Return whether `axis_panels` has losses above its frame, which it marks by triangles."""
    losses = _shown_losses(document)
    return bool(losses) and max(losses) > _frame(document)[1]


def _stops(document: Document) -> list[Any]:
    """The rungs of a sweep before its last one."""
    return document["halving"]["rungs"][:-1] if document.get("halving") else []


def is_population(document: Document) -> bool:
    """Return whether settings changed along runs, so that a value says nothing of what was trained before."""
    return any(row.get("member") is not None for row in document["settings"])


def _draw_rungs(panel: Axes, name: str, document: Document, rungs: Sequence[Any], top: float) -> None:
    among, winner = document["axes"][name], document["winner"]
    cut = winner is not None and not is_population(document)
    named = {round(place) for place in np.linspace(0, len(rungs) - 1, 4)}
    for i, (rung, shade) in enumerate(zip(rungs, np.linspace(0.4, 0.9, len(rungs)), strict=True)):
        colour = mpl.colormaps["Purples"](shade)
        rows = [row for row in rung["settings"] if row[name] is not None]
        held = [row for row in rows if cut and _on_the_line(row, name, document)]
        rest = [row for row in rows if row not in held]
        joined = "o" if scale_of(among) == "rank" else "o-"
        for members, marker, alpha in ((rest, "o", 0.45), (held, joined, 1.0)):
            x, y = positions([row[name] for row in members], among), np.array([row["mean"] for row in members])
            order = np.argsort(x)
            look: dict[str, Any] = {"color": colour, "markerfacecolor": "white", "markersize": 4, "alpha": alpha}
            panel.plot(x[order], y[order], marker, linewidth=0.9, **look)
            panel.plot(x[y > top], [0.93] * sum(y > top), "^", transform=panel.get_xaxis_transform(), **look)
        if i in named:
            words = f"after {rung_in_words(rung['steps'])}"
            panel.plot(
                [], [], joined if held else "o", color=colour, markerfacecolor="white", markersize=4, label=words
            )
    panel.plot([], [], "o", color=BLUE if cut else MUTED, markersize=4.5, label="at the end")


def rung_in_words(steps: Any) -> str:
    """7 updates; 7 or 14 updates, where batch sizes differ."""
    listed = steps if isinstance(steps, list) else [steps]
    return " or ".join(f"{step:,}" for step in listed) + " updates"


def _on_the_line(row: Mapping[str, Any], name: str, document: Document) -> bool:
    setting = document["winner"]["setting"]
    return all(row[other] == setting[other] for other in document["axes"] if other != name)


def _axis_panel(panel: Axes, name: str, document: Document, top: float) -> None:
    among = document["axes"][name]
    place = lambda rows: positions([row.get(name) for row in rows], among)
    finished = [trial for trial in document["trials"] if trial["loss"] is not None]
    inside = [trial for trial in finished if trial["loss"] <= top]
    panel.plot(place(inside), [trial["loss"] for trial in inside], ".", color=MUTED, alpha=0.35, markersize=4)
    marks: dict[str, Any] = {"transform": panel.get_xaxis_transform()}
    beyond = [trial for trial in finished if trial["loss"] > top]
    panel.plot(place(beyond), [0.93] * len(beyond), "^", color=MUTED, alpha=0.5, markersize=4, **marks)
    lost = [trial for trial in document["trials"] if trial.get("state") == "diverged"]
    panel.plot(place(lost), [0.97] * len(lost), "x", color=ORANGE, markersize=5, **marks)
    winner = document["winner"]
    if winner is None:
        return
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.3, "markersize": 11}
    panel.plot(positions([winner["setting"][name]], among), winner["mean"], "o", zorder=4, **ring)
    if is_population(document):
        return
    settings = [row for row in document["settings"] if row["mean"] is not None and row[name] is not None]
    held = [row for row in settings if _on_the_line(row, name, document)]
    x, y = place(held), np.array([row["mean"] for row in held])
    order = np.argsort(x)
    x, y, noise = x[order], y[order], document["seed_noise"]
    if scale_of(among) == "rank" or len(x) == 1:
        panel.errorbar(x, y, yerr=noise, fmt="o", color=BLUE, capsize=3, markersize=4.5, zorder=3)
    else:
        panel.plot(x, y, "o-", color=BLUE, markersize=4.5, zorder=3)
        if noise is not None:
            panel.fill_between(x, y - noise, y + noise, color=BLUE, alpha=0.15, linewidth=0)


@styled
def learning_curves(curves: Sequence[tuple[Mapping[str, Any], Curve]], by_flops: bool, width: float = WIDTH) -> Figure:
    """Smoothed training loss of runs, coloured by their last validation loss. by_flops: over FLOPs, else over tokens.

    A cross ends a run that diverged, a bar one that was pruned.
    """
    figure = new_figure(width, 4.0 if width > NARROW else 3.4)
    axes = figure.subplots()
    known = [row["last_loss"] for row, _ in curves if row["last_loss"] is not None]
    colours, norm = loss_colours(known or [0.0])
    ends, lows = [], []
    for row, curve in reversed(curves):  # the best on top
        x = curve.flops if by_flops else curve.tokens
        loss = row["last_loss"]
        lost = row["state"] == "diverged" or curve.diverged
        colour = ORANGE if lost else MUTED if loss is None else colours(norm(loss))
        axes.plot(*interrupted(x, curve.loss, curve.hole), color=colour, linewidth=0.9, alpha=0.75)
        marker = "x" if lost else "|" if row["state"] == "pruned" else ""
        axes.plot(x[-1], curve.loss[-1], marker, color=colour, markersize=7, markeredgewidth=1.4, zorder=4)
        ends.append((x[max(0, np.searchsorted(x, x[-1] / 300))], x[-1]))
        lows.append((curve.loss.min(), curve.loss[0], curve.steps[0]))
    log_axis(axes.xaxis, min(low for low, _ in ends), max(high for _, high in ends), powers=by_flops, margin=0.03)
    bottom, begun = min(low for low, *_ in lows), min(step for *_, step in lows)
    # Where runs go on from others, those that began at the start say where the axis ends.
    first = float(np.median([start for _, start, step in lows if step == begun]))
    axes.set_ylim(bottom - 0.04 * (first - bottom) - 1e-3, first + 0.1 * (first - bottom) + 1e-3)
    axes.set(xlabel="compute spent so far, 6·N·tokens (FLOPs)" if by_flops else "tokens seen", ylabel=TRAINING_LOSS)
    if len(known) > 1:
        _colour_bar(figure, axes, colours, norm, "last validation loss", below=width <= NARROW)
    return figure


def fullest(document: Document) -> tuple[list[Any], Any]:
    """(settings with a mean, updates after which) where the most have one; None as updates: at the end.

    After early stopping few settings have a loss at the end; at an earlier rung all can be compared.
    """
    ended = [row for row in document["settings"] if row["mean"] is not None]
    rungs = [] if is_population(document) else _stops(document)
    most = max(rungs, key=lambda rung: (len(rung["settings"]), rung["tokens"]), default=None)
    if most is None or len(most["settings"]) <= len(ended):
        return ended, None
    return most["settings"], most["steps"]


@styled
def parallel_coordinates(document: Document, width: float = WIDTH) -> Figure:
    """A line per setting through its values and its mean loss, coloured by it; the best are drawn last.

    Losses are those of `fullest`. Lines are set a little apart where values coincide. In a narrow figure the
    coordinates lie below each other.
    """
    names, upright = list(document["axes"]), width > NARROW
    rows = sorted(fullest(document)[0], key=lambda row: row["mean"])
    rows = [rows[i] for i in np.unique(np.round(np.linspace(0, len(rows) - 1, MOST_LINES)).astype(int))]
    losses = [row["mean"] for row in rows]
    top, low = readable_top(losses), min(losses)
    figure = new_figure(width, 3.9 if upright else 0.6 + 0.75 * (len(names) + 1))
    axes = figure.subplots()
    axes.set_axis_off()
    shift = np.linspace(-0.022, 0.022, len(rows)) if len(rows) > 1 else np.zeros(1)
    columns = []
    for i, name in enumerate(names):
        among = document["axes"][name]
        unit = _unit(positions([row[name] for row in rows], among), among)
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
    _coordinate(axes, len(names), "loss", (shown - low) / span, [f"{value:.3f}" for value in shown], upright, side=1)
    lines = np.stack([np.stack([np.full(len(rows), i), column], 1) for i, column in enumerate(columns)], 1)
    if not upright:
        lines = lines[..., ::-1] * np.array([1, -1])
    colours, norm = loss_colours(losses)
    alpha = float(np.clip(30 / len(rows), 0.25, 0.8))
    rest: dict[str, Any] = {"linewidths": 0.9, "alpha": alpha, "array": np.array(losses[1:][::-1])}
    axes.add_collection(LineCollection(list(lines[1:][::-1]), cmap=colours, norm=norm, **rest))
    axes.plot(lines[0, :, 0], lines[0, :, 1], color=INK, linewidth=2.0, zorder=5)
    if upright:
        axes.set(xlim=(-0.45, len(names) + 0.3), ylim=(-0.14, 1.16))
    else:
        axes.set(xlim=(-0.16, 1.12), ylim=(-len(names) - 0.35, 0.5))
    return figure


def _unit(places: np.ndarray, among: Sequence[Any]) -> np.ndarray:
    """Positions on 0…1 of their axis."""
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
    """side: of the labels of an upright coordinate, -1 left, 1 right; they are below one that lies."""
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


@styled
def importance_bars(importance: Mapping[str, Any], width: float = WIDTH) -> Figure:
    """Shares of every axis by each estimator that was not refused, with 95 % whiskers."""
    listed = (
        ("ped_anova", "PED-ANOVA: to be among the best", BLUE),
        ("fanova", "fANOVA: variance everywhere", ORANGE),
    )
    methods = [(label, importance[key], colour) for key, label, colour in listed if "refused" not in importance[key]]
    names = sorted(methods[0][1], key=lambda name: methods[0][1][name]["share"])
    figure = new_figure(width, 0.9 + 0.42 * len(names) + (0 if width > NARROW else 0.3))
    axes = figure.subplots()
    height = 0.36
    for i, (label, found, colour) in enumerate(methods):
        here = [name for name in names if name in found]
        y = np.array([names.index(name) for name in here]) + (0.5 - i) * height * (len(methods) > 1)
        share = np.array([found[name]["share"] for name in here])
        low, high = np.array([found[name]["interval_95"] for name in here]).T
        axes.barh(y, share, height=height, color=colour, alpha=0.75, label=label)
        # A bootstrap's percentiles need not hold the share itself.
        whiskers = np.maximum([share - low, high - share], 0)
        axes.errorbar(share, y, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlim=(0, 1.02), xlabel="share of importance")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2 if width > NARROW else 1)
    return figure


@styled
def execution_bars(found: Mapping[str, Any], width: float = WIDTH) -> Figure:
    """Mean training tokens per second of every execution, the fastest on top; whiskers: the spread over trials."""
    timed = [row for row in found["executions"] if row["tokens_per_second"]][::-1]
    figure = new_figure(width, 0.8 + 0.36 * len(timed))
    axes = figure.subplots()
    places, speeds = np.arange(len(timed)), [row["tokens_per_second"] for row in timed]
    axes.barh(places, speeds, height=0.6, color=BLUE, alpha=0.75)
    axes.errorbar(speeds, places, xerr=[row["std"] or 0.0 for row in timed], fmt="none", ecolor=INK, capsize=3)
    labels = [execution_text(row["execution"]) for row in timed]
    if width <= NARROW:
        labels = [label.replace(", ", "\n") for label in labels]
        figure.set_figheight(0.8 + 0.16 * sum(label.count("\n") + 2 for label in labels))
    axes.set_yticks(places, labels)
    axes.set(xlim=(0, None), xlabel="training tokens per second")
    axes.xaxis.set_major_locator(MaxNLocator(6 if width > NARROW else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


def _colour_bar(figure: Figure, axes: Any, colours: Any, norm: Any, label: str, below: bool) -> None:
    place: dict[str, Any] = {"location": "bottom"} if below else {"pad": 0.02, "shrink": 0.8}
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=28, **place)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8, color=GRID)
    bar.outline.set_visible(False)
