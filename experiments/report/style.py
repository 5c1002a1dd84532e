"""Define the common style of all figures, and convert figures to SVG for HTML pages.

Figures are made without pyplot: no global state, no display, nothing to close.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

INK = "#222222"
MUTED = "#767676"
GRID = "#e6e6e6"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
WIDTH = 9.0  # inches, as wide as a page's column: text then has the same size in every figure
PANEL = 3.6  # inches, as wide as a phone's column: the smallest text, 7.5 points, then has ten pixels there
NARROW = 6.0  # inches: narrower figures have no room next to their axes
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY)
"""Okabe & Ito 2008, distinguishable under every common colour blindness; for categories."""

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so that figures are the same on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "isoflop",  # the same figure gives the same bytes
    "svg.fonttype": "path",  # independent of the reader's fonts
}

Draw = TypeVar("Draw", bound=Callable[..., Any])
styled: Callable[[Draw], Draw] = mpl.rc_context(STYLE)
"""Decorator for functions that draw: many of matplotlib's settings are read when an artist is made."""


@mpl.rc_context(STYLE)
def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """Make an empty figure of the given size in inches whose axes never overlap."""
    return Figure(figsize=(width, height), layout="constrained")


def new_panels(count: int, height: float = 3.0) -> list[Axes]:
    """Make axes, each in a figure of its own: side by side on a page, one below the other on a phone."""
    return [new_figure(PANEL, height).subplots() for _ in range(count)]


def figure_of(axes: Axes) -> Figure:
    """Return the figure that axes are in."""
    return cast(Figure, axes.get_figure(root=True))


def figures_of(panels: Sequence[Axes]) -> list[Figure]:
    """Return the figures of `new_panels`."""
    return [figure_of(axes) for axes in panels]


def legend_aside(axes: Axes, title: str | None = None, entries: int | None = None) -> None:
    """Put the legend where no data can be: right of a wide figure, below a narrow one.

    entries: how many there are at most in a row below, by default as many as fit.
    """
    figure = figure_of(axes)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    look: dict[str, Any] = {"title": title, "title_fontsize": 8}
    if figure.get_figwidth() > NARROW:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **look)
        return
    longest = max(map(len, labels))
    fit = max(1, min(len(labels), int(46 / (longest + 5))))
    figure.legend(handles, labels, loc="outside lower center", ncols=entries or fit, columnspacing=1.2, **look)


def sequence(count: int) -> list[Any]:
    """Return `count` colours of a sequential map (viridis without its pale end)."""
    return [mpl.colormaps["viridis"](value) for value in np.linspace(0.0, 0.85, max(count, 1))]


def amount(value: float, digits: int = 3) -> str:
    """Return a count with a suffix: 25k, 1.3M, 70B, 15T."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * (1 - 1e-9):
            scaled = value / limit
            return f"{scaled:,.0f}{suffix}" if scaled >= 10**digits else f"{scaled:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def power_of_ten(value: float) -> str:
    """Return a count in mathtext, three digits and a power of ten."""
    exponent = int(np.floor(np.log10(value) + 1e-9))
    mantissa = value / 10.0**exponent
    if abs(mantissa - 1) < 1e-6:
        return f"$10^{{{exponent}}}$"
    return f"${mantissa:.3g}\\!\\times\\!10^{{{exponent}}}$"


def log_axis(axis: Axis, low: float, high: float, *, powers: bool = False, margin: float = 0.06) -> None:
    """Make an axis logarithmic over low…high with few, readable ticks: 200k, 1M, 5M, or powers of ten."""
    axes = axis.axes
    horizontal = axis is axes.xaxis
    set_scale, set_limits = (axes.set_xscale, axes.set_xlim) if horizontal else (axes.set_yscale, axes.set_ylim)
    set_scale("log")
    pad = (high / low) ** margin if high > low else 1.5
    set_limits(low / pad, high * pad)
    decades = np.log10(high * pad**2 / low)
    if decades < 0.8:
        subs: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    elif decades < 1.8:
        subs = (1.0, 2.0, 5.0)
    else:
        subs = (1.0, 3.0) if decades < 3.2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value) if powers else amount(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def note(axes: Axes, text: str) -> None:
    """Put a remark in grey above the right end of the axes, where no data can be."""
    axes.set_title(text, loc="right", fontsize=8, fontweight="normal", color=MUTED)


def svg(figure: Figure, label: str = "") -> str:
    """Return the figure as one `<svg>` element for inline HTML: no XML header, no date, the same bytes every time.

    It shrinks with its container; `label` is the alt text for screen readers.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # One page has many figures, and an id may occur in it only once: unreferenced ids are removed.
    used = set(re.findall(r"(?:#)([\w.:-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    attributes = 'style="max-width:100%;height:auto"'
    if label:
        attributes += f' role="img" aria-label="{html.escape(label)}"'
    return re.sub(r"^<svg ", f"<svg {attributes} ", text, count=1)
