"""Figures of a sweep: its analysis (`experiments.sweep.reading.analysis`) in, a matplotlib Figure out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from experiments.report.figures import TRAINING_LOSS, Curve, interrupted
from experiments.report.style import BLUE, GRID, INK, MUTED, ORANGE, WIDTH, log_axis, new_figure, styled
from experiments.report.sweep_axes import loss_colours, place_axis, readable_top, ticks
from experiments.sweep.reading.scales import positions, scale_of

LOSS = "validation loss"
MOST_LINES = 250  # of parallel coordinates
Document = Mapping[str, Any]


@styled
def axis_panels(document: Document) -> Figure:
    """Loss against each axis: every trial faint; in blue the settings that share the winner's other values.

    The band is ± the seed noise of one run. Diverged trials are crosses at the top, pruned ones hollow at the last loss
    that they had; a triangle at the top stands for a loss beyond it.
    """
    axes = document["axes"]
    names = list(axes)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(WIDTH, 0.35 + 2.45 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    losses = [trial["loss"] for trial in document["trials"] if trial["loss"] is not None]
    top = readable_top(losses)
    low = min(losses)
    pad = 0.06 * (top - low) or 0.05
    for i, panel in enumerate(panels.flat):
        if i >= len(names):
            panel.set_visible(False)
            continue
        _axis_panel(panel, names[i], document, top)
        place_axis(panel.xaxis, axes[names[i]])
        panel.set_xlabel(names[i].replace("_", " "))
        if i % columns == 0:
            panel.set_ylabel(LOSS)
    panels.flat[0].set_ylim(low - pad, top + 2 * pad)
    return figure


def _axis_panel(panel: Axes, name: str, document: Document, top: float) -> None:
    among = document["axes"][name]
    place = lambda rows: positions([row.get(name) for row in rows], among)
    finished = [trial for trial in document["trials"] if trial["loss"] is not None]
    inside = [trial for trial in finished if trial["loss"] <= top]
    panel.plot(place(inside), [trial["loss"] for trial in inside], ".", color=MUTED, alpha=0.35, markersize=4)
    marks: dict[str, Any] = {"transform": panel.get_xaxis_transform()}
    beyond = [trial for trial in finished if trial["loss"] > top]
    panel.plot(place(beyond), [0.93] * len(beyond), "^", color=MUTED, alpha=0.5, markersize=4, **marks)
    pruned = [t for t in document["trials"] if t.get("state") == "pruned" and (t.get("last_loss") or math.inf) <= top]
    hollow: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 0.6, "alpha": 0.5, "markersize": 3.5}
    panel.plot(place(pruned), [trial["last_loss"] for trial in pruned], "o", color=MUTED, **hollow)
    lost = [trial for trial in document["trials"] if trial.get("state") == "diverged"]
    panel.plot(place(lost), [0.97] * len(lost), "x", color=ORANGE, markersize=5, **marks)
    winner = document["winner"]
    if winner is None:
        return
    same = lambda row: all(row[other] == winner["setting"][other] for other in document["axes"] if other != name)
    held = [row for row in document["settings"] if row["mean"] is not None and row[name] is not None and same(row)]
    x, y = place(held), np.array([row["mean"] for row in held])
    order = np.argsort(x)
    x, y, noise = x[order], y[order], document["seed_noise"]
    if scale_of(among) == "rank":
        panel.errorbar(x, y, yerr=noise, fmt="o", color=BLUE, capsize=3, markersize=4.5, zorder=3)
    else:
        panel.plot(x, y, "o-", color=BLUE, markersize=4.5, zorder=3)
        if noise is not None and len(x) > 1:
            panel.fill_between(x, y - noise, y + noise, color=BLUE, alpha=0.15, linewidth=0)
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.3, "markersize": 11}
    panel.plot(positions([winner["setting"][name]], among), winner["mean"], "o", zorder=4, **ring)


@styled
def learning_curves(curves: Sequence[tuple[Mapping[str, Any], Curve]], by_flops: bool) -> Figure:
    """Smoothed training loss of runs, coloured by their last validation loss. by_flops: over FLOPs, else over tokens.

    A cross ends a run that diverged, a bar one that was pruned.
    """
    figure = new_figure(WIDTH, 4.0)
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
        lows.append((curve.loss.min(), curve.loss[0]))
    log_axis(axes.xaxis, min(low for low, _ in ends), max(high for _, high in ends), powers=by_flops, margin=0.03)
    bottom, first = min(low for low, _ in lows), float(np.median([start for _, start in lows]))
    axes.set_ylim(bottom - 0.04 * (first - bottom) - 1e-3, first + 0.1 * (first - bottom) + 1e-3)
    axes.set(xlabel="compute spent so far, 6·N·tokens (FLOPs)" if by_flops else "tokens seen", ylabel=TRAINING_LOSS)
    if len(known) > 1:
        _colour_bar(figure, axes, colours, norm, "last validation loss")
    return figure


@styled
def parallel_coordinates(document: Document) -> Figure:
    """A line per setting through its values and its mean loss, coloured by it; the best are drawn last.

    Lines are set a little apart where values coincide. Settings without a mean are left out.
    """
    names = list(document["axes"])
    rows = sorted((row for row in document["settings"] if row["mean"] is not None), key=lambda row: row["mean"])
    rows = [rows[i] for i in np.unique(np.round(np.linspace(0, len(rows) - 1, MOST_LINES)).astype(int))]
    losses = [row["mean"] for row in rows]
    top, low = readable_top(losses), min(losses)
    figure = new_figure(WIDTH, 3.9)
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
        _coordinate(axes, i, name.replace("_", " "), _unit(np.array(places), among), labels)
        if missing.any():
            axes.text(i - 0.03, -0.09, "none", ha="right", va="center", fontsize=7.5, color=MUTED)
    span = (top - low) or 1.0
    columns.append(np.minimum((np.array(losses) - low) / span, 1.0))
    shown = np.linspace(low, top, 5) if top > low else np.array([low])
    _coordinate(axes, len(names), "loss", (shown - low) / span, [f"{value:.3f}" for value in shown], side=1)
    lines = np.stack([np.stack([np.full(len(rows), i), column], 1) for i, column in enumerate(columns)], 1)
    colours, norm = loss_colours(losses)
    alpha = float(np.clip(30 / len(rows), 0.25, 0.8))
    rest: dict[str, Any] = {"linewidths": 0.9, "alpha": alpha, "array": np.array(losses[1:][::-1])}
    axes.add_collection(LineCollection(list(lines[1:][::-1]), cmap=colours, norm=norm, **rest))
    axes.plot(lines[0, :, 0], lines[0, :, 1], color=INK, linewidth=2.0, zorder=5)
    axes.set(xlim=(-0.45, len(names) + 0.3), ylim=(-0.14, 1.16))
    return figure


def _unit(places: np.ndarray, among: Sequence[Any]) -> np.ndarray:
    """Positions on 0…1 of their axis."""
    everything = positions([value for value in among if value is not None], among)
    span = everything.max() - everything.min()
    return (places - everything.min()) / span if span > 0 else np.where(np.isnan(places), np.nan, 0.5)


def _coordinate(
    axes: Axes, x: float, name: str, places: Sequence[float] | np.ndarray, labels: Sequence[str], side: int = -1
) -> None:
    """side: of the labels, -1 left, 1 right."""
    axes.plot([x, x], [0, 1], color=MUTED, linewidth=0.9, zorder=4)
    axes.text(x, 1.1, name, ha="center", va="bottom", fontsize=9, fontweight="bold")
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
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
def importance_bars(importance: Mapping[str, Any]) -> Figure:
    """Shares of every axis by each estimator that could be asked, with 95 % whiskers."""
    listed = (
        ("ped_anova", "PED-ANOVA: to be among the best", BLUE),
        ("fanova", "fANOVA: variance everywhere", ORANGE),
    )
    methods = [(label, importance[key], colour) for key, label, colour in listed if "refused" not in importance[key]]
    names = sorted(methods[0][1], key=lambda name: methods[0][1][name]["share"])
    figure = new_figure(WIDTH, 0.9 + 0.42 * len(names))
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
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return figure


def _colour_bar(figure: Figure, axes: Any, colours: Any, norm: Any, label: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02, shrink=0.8, aspect=28)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8, color=GRID)
    bar.outline.set_visible(False)
