"""Render pages: fill a template with figures and formatted numbers; None is a dash."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.report import style
from experiments.words import counted

DASH = "–"
Drawn = dict[str, Any]
"""{"svg": a figure for a template, "reason": why there is none}; one of them is None."""


def render(template: Path, **values: Any) -> str:
    """Return the text of a template file, filled; it may extend and import the templates of this folder.

    All text is escaped except Markup.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= FILTERS | {"counted": counted}
    text = environment.get_template(template.name).render(**values)
    return re.sub(r"(?<=\d) %", "\u00a0%", text)  # a line never breaks between a number and its per cent sign


def inline(figure: Figure, label: str) -> Markup:
    """Return the figure as SVG for a page; `label` is the alt text for screen readers."""
    return Markup(style.svg(figure, label))


def drawn(label: str, draw: Callable[[], Figure | Sequence[Figure]], reason: str | None = None) -> Drawn:
    """Return a figure for the page, or, if a reason is given, the reason why there is none.

    Several figures are panels, which are side by side if there is room, and below each other on a phone.
    """
    if reason is not None:
        return {"svg": None, "reason": reason}
    with np.errstate(invalid="ignore"):  # a band may be infinite if a term vanished in bootstrap draws
        figures = draw()
    if isinstance(figures, Figure):
        return {"svg": inline(figures, label), "reason": None}
    names = [f"{label}: {figure.axes[0].get_xlabel()}" for figure in figures]
    panels = Markup().join(
        Markup("<div>{}</div>").format(inline(figure, name)) for figure, name in zip(figures, names, strict=True)
    )
    return {"svg": Markup('<div class="panels">{}</div>').format(panels), "reason": None}


def drawn_twice(label: str, draw: Callable[[float], Figure], reason: str | None = None) -> Drawn:
    """Return a figure as `drawn`, twice: as wide as its column and, for a phone, as narrow as a panel.

    draw: takes the width in inches.
    """
    if reason is not None:
        return {"svg": None, "reason": reason}
    with np.errstate(invalid="ignore"):
        wide, narrow = draw(style.WIDTH), draw(style.PANEL)
    both = Markup('<div class="wide">{}</div><div class="narrow">{}</div>')
    return {"svg": both.format(inline(wide, label), inline(narrow, label)), "reason": None}


def device_name(device: dict[str, Any]) -> str:
    """Return the device of a run as text: CPU, 8 × NVIDIA H100."""
    kind, platform = device.get("kind", "unknown"), device.get("platform", "unknown")
    name = kind.upper() if kind == "cpu" else kind if kind == platform else f"{kind} ({platform})"
    count = device.get("count", 1)
    return name if count == 1 else f"{count} × {name}"


def known(value: Any) -> bool:
    """Return whether a number is given and finite."""
    return value is not None and math.isfinite(value)


def _dash_if_unknown(write: Callable[..., str]) -> Callable[..., str]:
    def written(value: Any, *arguments: Any) -> str:
        return write(value, *arguments) if known(value) else DASH

    return written


def _minus(text: str) -> str:
    return text.replace("-", "−")


@_dash_if_unknown
def integer(value: float) -> str:
    """Write a whole number: 12,345."""
    return _minus(f"{value:,.0f}")


@_dash_if_unknown
def fixed(value: float, digits: int = 4) -> str:
    """Write a number with fixed decimals: 3.6463."""
    return _minus(f"{value:.{digits}f}")


@_dash_if_unknown
def signed(value: float, digits: int = 4) -> str:
    """Write a number with an explicit sign: +0.0123."""
    return _minus(f"{value:+.{digits}f}")


@_dash_if_unknown
def percent(value: float, digits: int = 1) -> str:
    """Write a ratio as signed per cent: +1.2 %."""
    return _minus(f"{100 * value:+.{digits}f}") + " %"


@_dash_if_unknown
def number(value: float, digits: int = 3) -> str:
    """Write significant digits; very large and very small numbers with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"
        return _minus(text)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return Markup("{} × 10<sup>{}</sup>").format(_minus(mantissa), _minus(str(int(exponent))))


@_dash_if_unknown
def amount(value: float) -> str:
    """Write a count with a suffix: 4.08M."""
    return _minus(style.amount(value))


@_dash_if_unknown
def general(value: float) -> str:
    """Write a setting as its author would type it: 0.04, 1e-08."""
    return f"{value:g}"


@_dash_if_unknown
def duration(seconds: float) -> str:
    """Write seconds in a readable unit: 52 s, 7.9 minutes, 1.4 hours."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def interval(pair: Sequence[float | None] | None, write: Callable[..., str] = number, *arguments: Any) -> str:
    """Write `low … high`; a bound that is not known is a dash."""
    if pair is None:
        return DASH
    low, high = (write(bound, *arguments) for bound in pair)
    return Markup("{} … {}").format(low, high)


FILTERS: dict[str, Callable[..., str]] = {
    "integer": integer,
    "fixed": fixed,
    "signed": signed,
    "percent": percent,
    "number": number,
    "amount": amount,
    "general": general,
    "duration": duration,
    "interval": interval,
    "fixed_interval": lambda pair, digits=4: interval(pair, fixed, digits),
}
