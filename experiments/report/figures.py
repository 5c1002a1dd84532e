"""Figures of runs, sweeps and decode benchmarks: plain numbers in, a matplotlib Figure out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.report.style import (
    BLUE,
    INK,
    NARROW,
    ORANGE,
    WIDTH,
    figures_of,
    legend_aside,
    log_axis,
    new_figure,
    new_panels,
    power_of_ten,
    sequence,
    styled,
)
from model.errors import InputError
from train.run.metrics import open_metrics

SMOOTHING = 0.1  # a point of a loss curve is the mean over the steps within this share of its own step
TRAINING_LOSS = "training loss (nats)"
VALIDATION_LOSS = "validation loss (nats per token)"


@dataclass(frozen=True)
class Curve:
    """A run's training loss, smoothed and thinned out. flops: 6·N·D spent so far. hole: steps before it are missing."""

    steps: Float[np.ndarray, " points"]
    tokens: Float[np.ndarray, " points"]
    flops: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]
    diverged: bool
    hole: Bool[np.ndarray, " points"]


def read_curve(run: Path, points: int = 200) -> Curve | None:
    """The curve of a run directory at about `points` steps, evenly spread in log steps; None where none can be read.

    Each point is the mean over the steps within ±10 % of its own, so that curves look alike on a log axis however
    long they are. What comes after the first loss that is not finite is left out.
    """
    try:
        lines = open_metrics(run).lines
    except InputError:  # `train.run.metrics.troubles` says why
        return None
    holes = holes_before(lines)
    known = [index for index, line in enumerate(lines) if line["loss"] is not None]
    records = [lines[index] for index in known]
    loss = np.array([record["loss"] for record in records], np.float64)
    finite = len(loss) if np.isfinite(loss).all() else int(np.argmin(np.isfinite(loss)))
    if finite == 0:
        return None
    steps, tokens, flops = (
        np.array([record[name] for record in records[:finite]], np.float64) for name in ("step", "tokens", "flops_6nd")
    )
    chosen = np.unique(np.round(np.geomspace(1, finite, points)).astype(int)) - 1
    smooth = smoothed(steps, loss[:finite])
    hole = np.diff(holes[known][chosen], prepend=0) > 0
    return Curve(steps[chosen], tokens[chosen], flops[chosen], smooth[chosen], finite < len(loss), hole)


def holes_before(lines: Sequence[dict[str, Any]]) -> Int[np.ndarray, " lines"]:
    """Return how many times, up to each line of a run's metrics, steps are missing."""
    steps = np.array([line["step"] for line in lines], int)
    return np.cumsum(np.diff(steps, prepend=steps[:1] - 1) > 1)


def interrupted(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], hole: Bool[np.ndarray, " points"]
) -> tuple[Float[np.ndarray, " drawn"], Float[np.ndarray, " drawn"]]:
    """The points of a line that is not drawn across holes: a NaN stands in each."""
    places = np.flatnonzero(hole)
    return np.insert(x, places, x[places]), np.insert(y, places, np.nan)


def smoothed(at: Float[np.ndarray, " points"], values: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """The mean of `values` over the points within ±10 % of each point's own place; `at` rises."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.searchsorted(at, at * (1 - SMOOTHING))
    high = np.searchsorted(at, at * (1 + SMOOTHING), side="right")
    return (total[high] - total[low]) / (high - low)


@styled
def loss_curves(groups: Sequence[tuple[float, Sequence[Curve]]], width: float = WIDTH) -> Figure:
    """Training loss over compute; `groups` are (budget in FLOPs, its runs), and the colour is the budget's."""
    figure = new_figure(width, 4.4)
    axes = figure.subplots()
    for (budget, curves), colour in zip(groups, sequence(len(groups)), strict=True):
        for i, curve in enumerate(curves):
            label = None if i else power_of_ten(float(f"{budget:.2g}"))
            axes.plot(
                *interrupted(curve.flops, curve.loss, curve.hole), color=colour, linewidth=1.1, alpha=0.85, label=label
            )
            marker, size = ("x", 7.0) if curve.diverged else ("o", 3.5)
            axes.plot(curve.flops[-1], curve.loss[-1], marker, color=colour, markersize=size)
    everything = [curve for _, curves in groups for curve in curves]
    ends = [curve.flops[-1] for curve in everything]
    log_axis(axes.xaxis, min(ends) / 100, max(ends), powers=True, margin=0.03)
    axes.set(xlabel="compute spent so far, 6·N·tokens (FLOPs)", ylabel=TRAINING_LOSS, title="Loss curves of the ladder")
    if width > NARROW:
        axes.legend(title="budget (FLOPs)", title_fontsize=8, loc="upper right")
    else:
        legend_aside(axes, title="budget (FLOPs)")
    return figure


@styled
def losses_by_size(groups: Sequence[tuple[float, Sequence[dict[str, Any]]]], width: float = WIDTH) -> Figure:
    """Validation loss over N per budget, without curves: for a ladder whose valleys were refused."""
    figure = new_figure(width, 4.2)
    axes = figure.subplots()
    for (budget, rows), colour in zip(groups, sequence(len(groups)), strict=True):
        pairs = sorted((row["params"], row["loss"]) for row in rows)
        axes.plot(
            *zip(*pairs, strict=True), "o-", color=colour, linewidth=1, label=power_of_ten(float(f"{budget:.2g}"))
        )
    sizes = [row["params"] for _, rows in groups for row in rows]
    log_axis(axes.xaxis, min(sizes), max(sizes))
    axes.set(xlabel="parameters N", ylabel=VALIDATION_LOSS, title="Loss by size at each budget")
    legend_aside(axes, title="compute C (FLOPs)")
    return figure


@styled
def held_out_curve(
    curve: Curve | None,
    *,
    loss: float | None,
    predicted: float | None,
    interval: Sequence[float] | None,
    tokens: float,
    width: float = WIDTH,
) -> Figure:
    """A run's training loss over tokens, what was predicted of its end, and the validation loss it reached."""
    figure = new_figure(width, 4.2)
    axes = figure.subplots()
    low = tokens / 300 if curve is None else max(curve.tokens[0], tokens / 300)
    if interval is not None:
        axes.axhspan(*interval, color=ORANGE, alpha=0.13, linewidth=0, label="95 % interval of the prediction")
    if predicted is not None:
        axes.axhline(predicted, color=ORANGE, linestyle="--", linewidth=1.3, label="predicted validation loss")
    if curve is not None:
        axes.plot(*interrupted(curve.tokens, curve.loss, curve.hole), color=BLUE, label="training loss")
        if curve.diverged:
            axes.plot(curve.tokens[-1], curve.loss[-1], "x", color=BLUE, markersize=9, label="diverged here")
    if loss is not None:
        axes.plot(
            tokens,
            loss,
            "*",
            color=BLUE,
            markersize=14,
            markeredgecolor=INK,
            zorder=4,
            label="measured validation loss",
        )
    log_axis(axes.xaxis, low, tokens, margin=0.03)
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title="The held-out run and its prediction")
    if width > NARROW:
        axes.legend(loc="upper right")
    else:
        legend_aside(axes)
    return figure


@styled
def decode_throughput(cells: Sequence[dict[str, Any]]) -> list[Figure]:
    """Prefill and decode tokens per second over the batch, a line per context; bars from slowest to fastest."""
    panels = new_panels(2, 3.5)
    contexts = sorted({cell["context"] for cell in cells})
    batches = sorted({cell["batch"] for cell in cells})
    colours = sequence(len(contexts))
    for axes, kind, speed_of in zip(panels, ("prefill", "decode"), ("", "_aggregate"), strict=True):
        extent = []
        for i, (context, colour) in enumerate(zip(contexts, colours, strict=True)):
            row = sorted((cell for cell in cells if cell["context"] == context), key=lambda cell: cell["batch"])
            # Set apart sideways, so that bars of different contexts do not hide each other.
            shift = 1 + 0.06 * (i - (len(contexts) - 1) / 2)
            x = [cell["batch"] * shift for cell in row]
            speed = np.array([cell[f"{kind}_tokens_per_second{speed_of}"] for cell in row])
            ends = [
                np.array([cell.get(f"{kind}_tokens_per_second_{end}", middle) for cell, middle in zip(row, speed)])  # noqa: B905
                for end in ("slowest", "fastest")
            ]
            bars = np.maximum([speed - ends[0], ends[1] - speed], 0)
            axes.errorbar(x, speed, yerr=bars, fmt="o-", color=colour, capsize=3, label=f"{context:,}")
            extent += [*ends[0], *ends[1]]
        log_axis(axes.xaxis, batches[0], batches[-1], margin=0.08)
        axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
        axes.xaxis.set_minor_locator(NullLocator())
        log_axis(axes.yaxis, min(extent), max(extent))
        axes.set(xlabel="batch (sequences)", title=kind.capitalize())
        axes.set_ylabel("tokens per second, whole batch")
        legend_aside(axes, title="context (tokens)")
    return figures_of(panels)
