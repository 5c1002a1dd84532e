"""The figure of replayed searches: which share of them has come to the best region, against trials."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.style import MUTED, PALETTE, new_figure, note, styled


@styled
def reached(document: Mapping[str, Any]) -> Figure:
    """Of `compare_samplers`' document: solid, the best region was tried; dashed, it is what the search would name."""
    figure = new_figure(5.5, 3.4)
    axes = figure.subplots()
    trials = np.arange(document["budget"] + 1)
    for (sampler, found), colour in zip(document["samplers"].items(), PALETTE * 2, strict=False):
        for name, line in (("first", "-"), ("settled", "--")):
            numbers = np.array([np.inf if number is None else number for number in found[name]])
            share = (numbers[None, :] <= trials[:, None]).mean(axis=1)
            axes.step(trials, share, line, where="post", color=colour, label=sampler if name == "first" else None)
    axes.plot([], [], "-", color=MUTED, label="tried")
    axes.plot([], [], "--", color=MUTED, label="named best, to the end")
    axes.set(xlabel="trials", ylabel="share of the searches", xlim=(0, document["budget"]), ylim=(0, 1.02))
    axes.set_title("Best region")
    note(axes, f"{len(document['best_region'])} of {document['points']} points, {document['replays']} searches each")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
