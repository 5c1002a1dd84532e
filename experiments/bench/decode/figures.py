"""Draw the decode benchmark: throughput against latency, distance from the roofline, speed over the batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.bench.render import COORDINATES
from experiments.report.style import (
    MUTED,
    PALETTE,
    figures_of,
    legend_aside,
    log_axis,
    new_figure,
    new_panels,
    sequence,
    styled,
)
from model.errors import InputError

_SERIES = [name for name in COORDINATES if name not in ("batch", "steps")]
_MARKERS = "osD^vP"


@styled
def draw(document: dict[str, Any]) -> Figure:
    """Draw the frontier, one point per batch size, and next to it the roofline with this machine's two ceilings."""
    cells = [cell for cell in document["cells"] if "error" not in cell]
    if not cells:
        raise InputError("no cell was measured, so that there is nothing to draw")
    figure = new_figure(11.0, 4.4)
    frontier, roof = figure.subplots(1, 2)
    names = [name for name in _SERIES if len({cell[name] for cell in cells}) > 1]
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["batch"]):
        series.setdefault(tuple(cell[name] for name in names), []).append(cell)
    _draw_ceilings(roof, cells, document["ceilings"])
    for index, (values, row) in enumerate(series.items()):
        label = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(names, values, strict=True))
        style = {"color": PALETTE[index % len(PALETTE)], "marker": _MARKERS[index // len(PALETTE) % len(_MARKERS)]}
        _draw_frontier(frontier, row, label, style, named=index == 0)
        roof.plot(
            [cell["flops_per_byte"] for cell in row],
            [cell["flops_exact_per_second"] for cell in row],
            linestyle="none",
            label=label,
            **style,
        )
    rates = [[cell[f"decode_tokens_per_second_{of}"] for cell in cells] for of in ("per_sequence", "aggregate")]
    log_axis(frontier.xaxis, min(rates[0]), max(rates[0]), margin=0.15)
    log_axis(frontier.yaxis, min(rates[1]), max(rates[1]), margin=0.15)
    frontier.set(
        title="Throughput against speed",
        xlabel="tokens per second, each sequence",
        ylabel="tokens per second, whole batch",
    )
    if names:
        figure.legend(*frontier.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _draw_frontier(axes: Axes, row: list[dict[str, Any]], label: str, style: dict[str, Any], *, named: bool) -> None:
    x, y = ([cell[f"decode_tokens_per_second_{of}"] for cell in row] for of in ("per_sequence", "aggregate"))
    axes.plot(x, y, label=label, **style)
    if named:
        for cell, at in zip(row, zip(x, y, strict=True), strict=True):
            words = f"batch {cell['batch']}"
            axes.annotate(words, at, (6, 5), textcoords="offset points", fontsize=8, color=MUTED)


def _draw_ceilings(axes: Axes, cells: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    read, peak = ceilings["read_bytes_per_second"], ceilings["matmul_flops_per_second"]
    intensities = [cell["flops_per_byte"] for cell in cells] + [peak / read]
    low, high = min(intensities) / 2, max(intensities) * 3
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(read * x, peak), color=MUTED, linewidth=2)
    speeds = [cell["flops_exact_per_second"] for cell in cells]
    log_axis(axes.xaxis, low, high, margin=0)
    log_axis(axes.yaxis, min([*speeds, read * low]), peak, powers=True, margin=0.08)
    axes.annotate(
        f"product in {ceilings['matmul_dtype']}: {peak / 1e9:,.0f} GFLOP/s",
        (high, peak),
        (-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )
    axes.annotate(
        f"reads {read / 1e9:.1f} GB/s",
        (np.sqrt(low * peak / read), read * np.sqrt(low * peak / read)),
        (-6, 6),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )
    axes.set(title="Roofline of a decode step", xlabel="FLOP per byte read", ylabel="FLOP per second")


@styled
def throughput(cells: Sequence[dict[str, Any]]) -> list[Figure]:
    """Draw prefill and decode tokens per second over the batch, a line per context; bars from slowest to fastest."""
    panels = new_panels(2, 3.5)
    contexts = sorted({cell["context"] for cell in cells})
    batches = sorted({cell["batch"] for cell in cells})
    colours = sequence(len(contexts))
    for axes, kind, speed_of in zip(panels, ("prefill", "decode"), ("", "_aggregate"), strict=True):
        extent = []
        for i, (context, colour) in enumerate(zip(contexts, colours, strict=True)):
            row = sorted((cell for cell in cells if cell["context"] == context), key=lambda cell: cell["batch"])
            # Shifted sideways, so that bars of different contexts do not overlap.
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
