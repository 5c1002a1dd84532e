"""Draw the study's runs: loss curves of the ladder and of the held-out run."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.report.style import (
    BLUE,
    INK,
    NARROW,
    ORANGE,
    WIDTH,
    legend_aside,
    log_axis,
    new_figure,
    power_of_ten,
    sequence,
    styled,
)
from experiments.runs.curves import TRAINING_LOSS, LossCurve, interrupted

VALIDATION_LOSS = "validation loss (nats per token)"


@styled
def loss_curves(groups: Sequence[tuple[float, Sequence[LossCurve]]], width: float = WIDTH) -> Figure:
    """Draw training loss over compute; `groups` are (budget in FLOPs, its runs), and the colour is the budget's."""
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
    """Draw validation loss over N per budget, without fitted curves: for a ladder without a fit of its valleys."""
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
    curve: LossCurve | None,
    *,
    loss: float | None,
    predicted: float | None,
    interval: Sequence[float] | None,
    tokens: float,
    width: float = WIDTH,
) -> Figure:
    """Draw a run's training loss over tokens, the prediction for its end, and the validation loss that it reached."""
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
