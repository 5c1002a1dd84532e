"""Lay out the axes of a sweep's figures: values of any kind, with few, readable ticks."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from experiments.sweep.analysis.ranking import Ranking
from experiments.sweep.analysis.scales import MANY, distinct, positions, scale_of, text

LONGEST = 12  # characters of a tick's label


def tick_labels(values: Sequence[Any]) -> list[str]:
    """Return labels as short as they can be while values that differ look different."""
    for digits in (2, 3, 4, 6):
        labels = [_short(value, digits) for value in values]
        if len(set(labels)) == len(set(map(str, values))):
            break
    return labels


def _short(value: Any, digits: int) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        said = text(value)
        return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"
    if isinstance(value, int) and abs(value) < 100_000:
        return str(value)
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def ticks(among: Sequence[Any], most: int = 6) -> tuple[list[float], list[str]]:
    """Return (positions, labels) of at most about `most` ticks for an axis of these values."""
    listed, scale = distinct(among), scale_of(among)
    if len(listed) > MANY and scale == "log":
        low, high = math.floor(math.log10(listed[0])), math.ceil(math.log10(listed[-1]))
        steps = (1, 2, 5) if high - low < 2 else (1, 3) if high - low < 3 else (1,)
        shown = [step * 10.0**power for power in range(low, high + 1) for step in steps]
        shown = [value for value in shown if listed[0] * 0.999 <= value <= listed[-1] * 1.001]
    elif len(listed) > MANY and scale == "linear":
        shown = [float(value) for value in MaxNLocator(most - 1).tick_values(listed[0], listed[-1])]
        shown = [value for value in shown if listed[0] <= value <= listed[-1]]
    else:
        shown = listed
    if scale == "rank":
        return positions(shown, among).tolist(), tick_labels(shown)
    places = np.log10(np.array(shown, float)) if scale == "log" else np.array(shown, float)
    kept = _apart(places, 0.8 * np.ptp(positions(listed, among)) / most) if len(places) else []
    return places[kept].tolist(), tick_labels([shown[i] for i in kept])


def _apart(places: np.ndarray, gap: float) -> list[int]:
    """Choose rising places so that each is at least `gap` from the one before; the ends are preferred."""
    kept = [0]
    for i in range(1, len(places)):
        if places[i] - places[kept[-1]] >= gap:
            kept.append(i)
    last = len(places) - 1
    if kept[-1] != last and len(kept) > 1:
        kept[-1] = last
    return kept


def place_axis(axis: Axis, among: Sequence[Any], most: int = 6) -> None:
    """Give an axis that is drawn in `positions` its ticks, labels and limits."""
    places, labels = ticks(among, most)
    axis.set_major_locator(FixedLocator(places))
    axis.set_ticklabels(labels)
    axis.set_minor_locator(NullLocator())
    everything = positions(distinct(among), among)
    if len(everything) == 0:
        return
    low, high = everything.min(), everything.max()
    pad = 0.07 * (high - low) if high > low else 0.5
    if scale_of(among) == "rank":
        pad = 0.5
    horizontal = axis is axis.axes.xaxis
    axis.axes.set(**{"xlim" if horizontal else "ylim": (low - pad, high + pad)})
    if horizontal and sum(map(len, labels)) > 30:
        axis.set_tick_params(rotation=25)


def readable_top(losses: Sequence[float]) -> float:
    """Return where a loss axis should end so that a few very bad runs do not press the good ones together."""
    found = np.sort(np.asarray(losses, float))
    low, middle, high = found[0], float(np.median(found)), found[-1]
    return float(high) if middle <= low else float(min(high, low + 3 * (middle - low)))


def value_colours(values: Sequence[float], ranked: Ranking) -> tuple[Colormap, Normalize]:
    """Return (colour map, norm) for values of the objective that ranks: dark is good."""
    if ranked.by_loss:
        return loss_colours(values)
    viridis = mpl.colormaps["viridis"](np.linspace(0, 0.93, 256))
    low, high = min(values), max(values)
    colours = ListedColormap(viridis[::-1] if ranked.highest else viridis)
    return colours, Normalize(low, high if high > low else low + 1e-6)


def loss_colours(losses: Sequence[float]) -> tuple[Colormap, Normalize]:
    """Return (colour map, norm) for losses: dark is good; the pale end of viridis is left out."""
    viridis = mpl.colormaps["viridis"](np.linspace(0, 0.93, 256))
    low, high = min(losses), readable_top(losses)
    return ListedColormap(viridis), Normalize(low, high if high > low else low + 1e-6)
