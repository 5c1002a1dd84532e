"""Draw downstream laws: bits per byte over compute with the law, accuracy over bits per byte with the link."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    amount,
    figures_of,
    log_axis,
    new_panels,
    sequence,
    styled,
)
from experiments.scaling.downstream.fit import DownstreamPrediction, TaskFit
from experiments.scaling.downstream.held_out import by_size

FLOPS = "compute C = 6·N·D (FLOPs)"
ACCURACY = "accuracy (%)"
_GRID = 80
_SHOWN_BEFORE = 0.03  # of a predicted run's tokens, from where its curve is drawn


@styled
def task_panels(fit: TaskFit, unit: str, predictions: Sequence[DownstreamPrediction]) -> list[Figure]:
    """Draw both steps of one task, with the predicted runs and, where they are known, the measured ones."""
    law, link = new_panels(2, height=3.4)
    predicted = [prediction for prediction in predictions if prediction.value is not None]
    _draw_law(law, fit, unit, predicted)
    _draw_link(link, fit, unit, predicted)
    return figures_of([law, link])


def _draw_law(axes: Axes, fit: TaskFit, unit: str, predictions: Sequence[DownstreamPrediction]) -> None:
    runs, groups = fit.task.runs, by_size(fit.task.runs)
    for group, colour in zip(groups, sequence(len(groups)), strict=True):
        tokens = np.geomspace(group.tokens.min() / 1.2, group.tokens.max() * 1.2, _GRID)
        axes.plot(*_curve(fit, float(np.median(group.params)), tokens), color=colour)
        axes.plot(
            group.flops, group.bits_per_byte, "o", color=colour, markersize=4, label=amount(float(group.params.max()))
        )
    seen = [runs.flops]
    for prediction in predictions:
        flops = 6 * prediction.params * prediction.tokens
        ends = np.array([prediction.bits_per_byte_low, prediction.bits_per_byte_high], float)
        tokens = prediction.tokens * np.geomspace(_SHOWN_BEFORE, 1, _GRID)
        axes.plot(*_curve(fit, prediction.params, tokens), color=ORANGE, linestyle=":", linewidth=1)
        axes.plot([flops] * 2, ends, color=ORANGE, linewidth=2)
        axes.plot([flops], np.array([prediction.bits_per_byte], float), "D", color=ORANGE, markersize=5)
        seen.append(np.array([flops]))
        if prediction.target is not None:
            axes.plot(flops, prediction.target.bits_per_byte, "*", color=INK, markersize=9, zorder=5)
    compute = np.concatenate(seen)
    log_axis(axes.xaxis, compute.min(), compute.max(), powers=True, margin=0.04)
    axes.set(xlabel=FLOPS, ylabel=f"{unit}, gold answer", title="The law")
    axes.legend(title="N", title_fontsize=8, loc="best", ncols=2, handletextpad=0.2, columnspacing=0.8)


def _curve(fit: TaskFit, params: float, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return compute and the weighted mean of the laws at one size."""
    sizes = np.full(len(tokens), params)
    logs = fit.ensemble.log_bits_per_byte(sizes, tokens)
    return 6 * sizes * tokens, np.exp(fit.weights.among(logs) @ np.stack([log[0] for log in logs.values()]))


def _draw_link(axes: Axes, fit: TaskFit, unit: str, predictions: Sequence[DownstreamPrediction]) -> None:
    runs, task = fit.task.runs, fit.task
    measured = [p.target.bits_per_byte for p in predictions if p.target is not None]
    ends = [*runs.bits_per_byte, *(float(p.bits_per_byte or 0) for p in predictions), *measured]
    low, high = min(ends), max(ends)
    grid = np.linspace(max(low - 0.06 * (high - low), 1e-3), high + 0.03 * (high - low), _GRID)
    curves = 100 * fit.ensemble.accuracy(grid)
    for curve, weight in zip(curves, fit.weights.links, strict=True):
        axes.plot(grid, curve, color=BLUE, alpha=0.2 + 0.5 * float(weight), linewidth=0.8)
    axes.plot(grid, fit.weights.links @ curves, color=BLUE)
    groups = by_size(runs)
    for group, colour in zip(groups, sequence(len(groups)), strict=True):
        axes.plot(group.bits_per_byte, 100 * group.accuracy, "o", color=colour, markersize=4)
    for prediction in predictions:
        interval = [100 * float(prediction.low or 0), 100 * float(prediction.high or 0)]
        colour = ORANGE if prediction.refused is None else MUTED
        x = float(prediction.bits_per_byte or 0)
        axes.plot([x] * 2, interval, color=colour, linewidth=2)
        axes.plot(x, 100 * float(prediction.value or 0), "D", color=colour, markersize=5)
        if prediction.target is not None:
            target = prediction.target
            axes.plot(target.bits_per_byte, 100 * target.accuracy, "*", color=INK, markersize=9, zorder=5)
    axes.axhline(100 * float(task.chance or 0), color=MUTED, linestyle=":", linewidth=1)
    axes.invert_xaxis()
    axes.set(xlabel=f"{unit}, gold answer", ylabel=ACCURACY, title="The link")
