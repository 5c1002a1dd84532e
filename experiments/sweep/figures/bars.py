"""Draw bars: importance of a sweep's axes, training speed of its executions."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.report.style import (
    BLUE,
    INK,
    NARROW,
    ORANGE,
    WIDTH,
    amount,
    new_figure,
    styled,
)
from experiments.sweep.analysis.executions import ExecutionComparison, execution_text
from experiments.sweep.analysis.importance import Importances


@styled
def importance_bars(importance: Importances, width: float = WIDTH) -> Figure:
    """Draw the shares of every axis by each estimator that was not refused, with 95 % whiskers."""
    listed = (
        (importance.ped_anova, "PED-ANOVA: to be among the best", BLUE),
        (importance.fanova, "fANOVA: variance everywhere", ORANGE),
    )
    methods = [(label, found, colour) for found, label, colour in listed if not isinstance(found, str)]
    names = sorted(methods[0][1], key=lambda name: methods[0][1][name].share)
    figure = new_figure(width, 0.9 + 0.42 * len(names) + (0 if width > NARROW else 0.3))
    axes = figure.subplots()
    height = 0.36
    for i, (label, found, colour) in enumerate(methods):
        here = [name for name in names if name in found]
        y = np.array([names.index(name) for name in here]) + (0.5 - i) * height * (len(methods) > 1)
        share = np.array([found[name].share for name in here])
        low, high = np.array([found[name].interval_95 for name in here]).T
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
def execution_bars(found: ExecutionComparison, width: float = WIDTH) -> Figure:
    """Draw the training speed of every execution, the fastest on top; whiskers: spread over trials."""
    timed = [(row, row.tokens_per_second) for row in found.executions if row.tokens_per_second][::-1]
    figure = new_figure(width, 0.8 + 0.36 * len(timed))
    axes = figure.subplots()
    places, speeds = np.arange(len(timed)), [speed for _, speed in timed]
    axes.barh(places, speeds, height=0.6, color=BLUE, alpha=0.75)
    axes.errorbar(speeds, places, xerr=[row.std or 0.0 for row, _ in timed], fmt="none", ecolor=INK, capsize=3)
    labels = [execution_text(row.execution) for row, _ in timed]
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
