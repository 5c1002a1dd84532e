"""Draw a load test: latencies and goodput over the load, with the capacity if it was searched for."""

from typing import Any

from matplotlib.figure import Figure

from experiments.bench.render import offered_in_words
from experiments.bench.serve.measures import E2E, TPOT, TTFT
from experiments.report.style import MUTED, PALETTE, log_axis, new_figure, styled
from model.errors import InputError

_LATENCIES = {"to the first token": TTFT, "per output token": TPOT, "to the end": E2E}


@styled
def draw(document: dict[str, Any]) -> Figure:
    """Draw medians (lines) and 99th percentiles (dashed), and the share of good requests, of every load."""
    rows = [row for row in document["load"] if row["served"]]
    if not rows:
        raise InputError("no request was served, so that there is nothing to draw")
    figure = new_figure(11.0, 4.2)
    times, goodput = figure.subplots(1, 2)
    is_over_rates = all(row["rate_requests_per_second"] is not None for row in rows)
    x = [row["rate_requests_per_second"] for row in rows] if is_over_rates else list(range(len(rows)))
    for colour, (label, name) in zip(PALETTE, _LATENCIES.items(), strict=False):
        for suffix, line in (("", "-"), ("_p99", "--")):
            y = [row[name + suffix] for row in rows]
            times.plot(x, y, line, color=colour, marker="o", markersize=4, label=None if suffix else label)
    times.set_yscale("log")
    times.set(title="Latency: median, and 99th percentile dashed", ylabel="seconds")
    times.legend()
    goodput.plot(x, [row["goodput_share"] for row in rows], "o", color=PALETTE[0], markersize=4)
    goodput.set(title="Share of good requests", ylabel="share", ylim=(-0.03, 1.03))
    for axes in (times, goodput):
        if is_over_rates:
            log_axis(axes.xaxis, min(x), max(x), margin=0.15)
            axes.set_xlabel("requests per second offered")
        else:
            axes.set_xticks(x, [offered_in_words(row) for row in rows])
    if found := document.get("capacity"):
        name = "capacity_requests_per_second"
        goodput.axvspan(found[f"{name}_low"], found[f"{name}_high"], color=PALETTE[1], alpha=0.25, linewidth=0)
        goodput.axvline(found[name], color=PALETTE[1])
        goodput.axhline(found["service_share"], color=MUTED, linewidth=0.8)
    return figure
