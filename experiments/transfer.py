"""Test whether the best learning rate is the same at all widths (Yang et al. 2022, "Tensor Programs V", figure 1).

Under muP it should be, so that a rate tuned on the narrowest model is good for wide ones. Under the standard
parameterization it falls about as 1 / width.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.coordcheck import PARAMETERIZATIONS, TITLES, resize
from experiments.report.style import INK, WIDTH, log_axis, new_figure, sequence, styled
from experiments.sweep.analysis.optimum import log_parabola
from experiments.sweep.analysis.results import collect
from experiments.sweep.analysis.summary import summarize
from experiments.sweep.definition import define
from experiments.sweep.run import run_sweep
from model import Execution, ModelConfig
from model.ambient import pinned
from model.config import Parameterization
from model.errors import InputError
from train import HParams, TrainConfig


@pinned()
def learning_rate_transfer(
    config: ModelConfig,
    widths: Sequence[int],
    learning_rates: Sequence[float],
    *,
    train_config: TrainConfig,
    base: HParams,
    steps: int,
    seeds: Sequence[int],
    data: str | Path,
    folder: str | Path,
    parameterizations: Sequence[Parameterization] = PARAMETERIZATIONS,
    evaluate_tokens: int = 32_768,
    execution: Execution = Execution(),
) -> dict[str, Any]:
    """Sweep the same rates at every width, one compiled program each; the same call again resumes.

    "cells" has a sweep's summary (`experiments.sweep.analysis.summary`) for every parameterization and width, with
    "optimum_per_seed": the rate at the vertex of a parabola through the best loss and its neighbours, None at the
    grid's edge. "spread": the ratio of the highest to the lowest best rate over widths, by the mean over seeds.
    """
    widths = sorted(set(widths))
    if len(widths) < 2 or len(set(learning_rates)) < 3:
        raise InputError("a transfer needs at least two widths and three learning rates")
    rates = sorted(set(learning_rates))
    fields = {
        field.name: getattr(train_config, field.name) for field in dataclasses.fields(train_config)
    } | base.to_dict()
    fields |= {name: value for name, value in execution.to_dict().items() if value is not None}
    cells = []
    for name in parameterizations:
        for width in widths:
            sweep = define(
                resize(config, "width", width, widths[0], name),
                data=data,
                folder=Path(folder) / f"{name}-{width}",
                steps=steps,
                axes=[f"learning_rate={','.join(map(repr, rates))}"],
                seeds=list(seeds),
                base=fields,
                batch_size=train_config.batch_size,
                seq_len=train_config.seq_len,
                evaluate_tokens=evaluate_tokens,
            )
            results = collect(sweep.folder, run_sweep(sweep))
            summary = summarize({"learning_rate": rates}, results.rows)
            cells.append(
                {"parameterization": name, "width": width}
                | summary.to_dict()
                | {"optimum_per_seed": [_vertex(summary.trials, seed) for seed in seeds]}
            )
    return {
        "widths": widths,
        "learning_rates": rates,
        "seeds": list(seeds),
        "steps": steps,
        "cells": cells,
        "spread": {name: _spread(cells, name) for name in parameterizations},
    }


def _vertex(trials: list[dict[str, Any]], seed: int) -> float | None:
    """Return the best rate of one seed, between the grid's points."""
    known = sorted((t["learning_rate"], t["loss"]) for t in trials if t["seed"] == seed and t["loss"] is not None)
    best = min(range(len(known)), key=lambda i: known[i][1], default=0)
    if not 0 < best < len(known) - 1:
        return None
    rates, losses = zip(*known[best - 1 : best + 2], strict=True)
    found = log_parabola(rates, losses, (1, 1, 1), None, 0)
    return None if isinstance(found, str) else found.learning_rate


def _spread(cells: list[dict[str, Any]], name: str) -> float | None:
    """Return the spread; None if a width has no best rate because every rate has a diverged run."""
    winners = [cell["winner"] for cell in cells if cell["parameterization"] == name]
    if not all(winners):
        return None
    rates = [winner["setting"]["learning_rate"] for winner in winners]
    return max(rates) / min(rates)


@styled
def transfer_figure(document: dict[str, Any]) -> Figure:
    """Draw loss over learning rate, one panel per parameterization, one line per width; rings: best rates.

    Lines are means over seeds, small dots single runs.
    """
    names = list(document["spread"])
    figure = new_figure(WIDTH, 3.9)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    colours = sequence(len(document["widths"]))
    rates = document["learning_rates"]
    best = []
    for axes, name in zip(panels, names, strict=True):
        cells = [cell for cell in document["cells"] if cell["parameterization"] == name]
        for cell, colour in zip(cells, colours, strict=True):
            known = [(row["learning_rate"], row["mean"]) for row in cell["settings"] if row["mean"] is not None]
            axes.plot(*zip(*sorted(known), strict=True), "o-", color=colour, label=f"{cell['width']:,}", zorder=3)
            dots = [(trial["learning_rate"], trial["loss"]) for trial in cell["trials"] if trial["loss"] is not None]
            axes.plot(*zip(*dots, strict=True), ".", color=colour, alpha=0.4, markersize=4)
            if cell["winner"] is not None:
                point = (cell["winner"]["setting"]["learning_rate"], cell["winner"]["mean"])
                best.append(point[1])
                axes.plot(*point, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, zorder=4)
        log_axis(axes.xaxis, rates[0], rates[-1])
        axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="learning rate", title=TITLES[name])
    losses = [t["loss"] for cell in document["cells"] for t in cell["trials"] if t["loss"] is not None]
    if best:  # hide losses far above the valleys
        panels[0].set_ylim(min(losses) - 0.1, min(max(losses) + 0.1, max(best) + 1.5))
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[-1].legend(title="width", title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
