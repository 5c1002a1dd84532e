"""The page of a table's scaling laws: every estimator, how sure it is, and what it was tested on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report import scaling_figures
from experiments.report.page import inline, render
from experiments.scaling import plots
from experiments.scaling.analysis import Analysis
from train.files import write_atomically

NAMES = {
    "parametric": "parametric law",
    "isoflop": "IsoFLOP valleys, parabola",
    "isoflop.skewed": "IsoFLOP valleys, skewed",
    "isoflop.spline": "IsoFLOP valleys, spline",
    "envelope": "envelope of training curves",
}
"""Estimators as the page calls them."""
Drawn = dict[str, Any]


def write_scaling_page(path: Path, analysis: Analysis, title: str, tables: str | None = None) -> None:
    """Write the page of an analysis: self-contained, whole or absent.

    tables: where the same numbers are, as the page shall say it.
    """
    write_atomically(path, render("scaling.html.jinja", **_view(analysis, title, tables)))


def _view(analysis: Analysis, title: str, tables: str | None) -> dict[str, Any]:
    document, table = analysis.document(), analysis.fits.table
    flops = 6 * table.params * table.tokens
    return {
        "title": title,
        "tables": tables,
        "rows": len(table),
        "ranges": {"params": _range(table.params), "tokens": _range(table.tokens), "flops": _range(flops)},
        "estimators": [row | {"name": NAMES[row["estimator"]]} for row in analysis.exponents],
        "refused": [{"name": NAMES.get(name, name), "reason": reason} for name, reason in analysis.refused.items()],
        "warnings": [row | {"about": NAMES.get(row["about"], row["about"])} for row in document["warnings"]],
        "parametric": document["parametric"],
        "isoflop": document["isoflop"],
        "envelope": document["envelope"],
        "forms": document["forms"],
        "formulas": {} if analysis.choice is None else _formulas(analysis),
        "conventions": document["conventions"],
        "held_out": document["held_out"],
        "dropped": document["dropped"],
        "outliers": _outliers(document),
        "figures": _figures(analysis),
    }


def _figures(analysis: Analysis) -> dict[str, Drawn]:
    fits, table = analysis.fits, analysis.fits.table
    parametric, isoflop = fits.parametric, fits.isoflop
    valleys = {"valleys, parabola": isoflop} if isoflop is not None and "isoflop.intervals" not in fits.refused else {}
    valleys |= {
        f"valleys, {name}": fit for name, fit in fits.valleys.items() if f"isoflop.{name}.intervals" not in fits.refused
    }
    no_law = f"The parametric law was refused: {fits.refused.get('parametric')}."
    no_law_or = None if parametric is not None else no_law
    runs = [] if analysis.held_out is None else analysis.held_out["runs"]
    tested = [run for run in runs if run["loss"] is not None and run["measured"] is not None]
    neither = "Both estimators were refused." if parametric is None and isoflop is None else None
    drawn = {
        "optimal": _draw(
            "Compute-optimal parameters and tokens over compute",
            lambda: plots.compute_optimal(isoflop, parametric),
            neither,
        ),
        "contours": _draw("Loss over N and D", lambda: scaling_figures.contours(_some(parametric), isoflop), no_law_or),
        "residuals": _draw("Residuals over N, D and C", lambda: plots.residuals(_some(parametric)), no_law_or),
        "clouds": _draw(
            "Bootstrap draws of the exponents",
            lambda: scaling_figures.clouds(parametric, valleys),
            None if parametric is not None or valleys else "No estimator has an interval.",
        ),
        "held_out": _draw(
            "Held-out runs and their predictions",
            lambda: scaling_figures.held_out(tested),
            None if tested else "No held-out run has both a prediction and a loss.",
        ),
    }
    if isoflop is not None:
        drawn["valleys"] = _draw("Loss over parameters for each budget", lambda: plots.valleys(isoflop), None)
    else:
        drawn["valleys"] = _draw(
            "Loss over compute, by size",
            lambda: scaling_figures.losses(table.params, table.tokens, table.loss),
            None,
        )
    return drawn


def _draw(label: str, draw: Callable[[], Figure], reason: str | None) -> Drawn:
    """The figure for the page, or the reason why there is none."""
    if reason is not None:
        return {"svg": None, "reason": reason}
    with np.errstate(invalid="ignore"):  # a band may be infinite where bootstrap draws lost a term
        figure = draw()
    figure.set_size_inches(scaling_figures.WIDTH, figure.get_figheight())
    return {"svg": inline(figure, label), "reason": None}


def _some(fit: Any) -> Any:
    assert fit is not None
    return fit


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _formulas(analysis: Analysis) -> dict[str, str]:
    from experiments.scaling.forms import get

    return {score.form: get(score.form).formula for score in analysis.choice.scores} if analysis.choice else {}


def _outliers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each estimator, by its name."""
    found = []
    if document["parametric"] is not None:
        found += [row | {"estimator": NAMES["parametric"]} for row in document["parametric"]["outliers"]]
    if document["isoflop"] is not None:
        found += [row | {"estimator": NAMES["isoflop"]} for row in document["isoflop"]["outliers"]]
    return found
