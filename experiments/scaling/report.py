"""Write the page of a table's scaling laws: every estimator, its uncertainty and its tests."""

from pathlib import Path
from typing import Any, cast

import numpy as np

from experiments.report.page import Drawn, drawn, drawn_twice, render
from experiments.report.style import amount
from experiments.scaling.analysis import NAMES, Analysis, Remark
from experiments.scaling.figures import laws, uncertainty
from experiments.scaling.valleys.isoflop import METHODS, IsoflopFit, RejectedBudget
from train.files import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_LEFT_OUT = 200  # lines of a table on the page


def write_scaling_page(path: Path, analysis: Analysis, title: str, tables: str | None = None) -> None:
    """Write the page of an analysis, self-contained and atomically.

    tables: text that tells the reader where the same numbers are as CSV.
    """
    write_atomically(path, render(TEMPLATE, **_view(analysis, title, tables)))


def _view(analysis: Analysis, title: str, tables: str | None) -> dict[str, Any]:
    document, table = analysis.document(), analysis.fits.table
    flops = 6 * table.params * table.tokens
    return {
        "title": title,
        "tables": tables,
        "rows": len(table),
        "ranges": {"params": _range(table.params), "tokens": _range(table.tokens), "flops": _range(flops)},
        "estimators": [row.to_dict() | {"name": NAMES[row.estimator]} for row in analysis.exponents]
        + [
            row.to_dict() | {"name": f"{NAMES[row.estimator]}, with every run"} for row in analysis.unscreened_exponents
        ],
        "refused": [{"name": NAMES.get(name, name), "reason": reason} for name, reason in analysis.refused.items()],
        "thinned": analysis.thinned,
        "warnings": [Remark(NAMES.get(remark.about, remark.about), remark.text) for remark in analysis.warnings],
        "parametric": document["parametric"],
        "isoflop": document["isoflop"],
        "envelope": document["envelope"],
        "forms": document["forms"],
        "formulas": {} if analysis.choice is None else _formulas(analysis),
        "conventions": document["conventions"],
        "held_out": document["held_out"],
        "rejected": [] if analysis.fits.isoflop is None else _rejected(analysis.fits.isoflop.rejected),
        "left_out": _left_out(analysis),
        "dotted": len(analysis.fits.valleys) > 0 or analysis.envelope is not None,
        "starred": bool(_minima(analysis)),
        "smooth": _equal(analysis.valleys.get("parabola"), analysis.valleys.get("spline")),
        "estimator_names": _predictors(analysis.held_out),
        "figures": _figures(analysis),
    }


def _figures(analysis: Analysis) -> dict[str, Drawn]:
    fits, table = analysis.fits, analysis.fits.table
    isoflop, parametric = fits.isoflop, cast(Any, fits.parametric)  # drawn only where it is there
    valleys = {f"valleys, {name}": fit for name, fit in analysis.valleys.items()}
    others = dict(fits.valleys) | ({} if analysis.envelope is None else {"envelope": analysis.envelope})
    no_law = f"The parametric law was refused: {fits.refused.get('parametric')}."
    no_law_or = None if parametric is not None else no_law
    runs = [] if analysis.held_out is None else analysis.held_out["runs"]
    tested = [run for run in runs if run["loss"] is not None and run["measured"] is not None]
    neither = "Both estimators were refused." if parametric is None and isoflop is None else None
    found = {
        "optimal": drawn(
            "Compute-optimal parameters and tokens over compute",
            lambda: laws.compute_optimal(isoflop, parametric, others, _minima(analysis)),
            neither,
        ),
        "contours": drawn_twice(
            "Loss over N and D", lambda width: uncertainty.contours(parametric, isoflop, width), no_law_or
        ),
        "residuals": drawn("Residuals over N, D and C", lambda: laws.residuals(parametric), no_law_or),
        "clouds": drawn(
            "Bootstrap draws of the exponents",
            lambda: uncertainty.clouds(parametric, valleys),
            None if parametric is not None or valleys else "No estimator has an interval.",
        ),
        "held_out": drawn(
            "Held-out runs and their predictions",
            lambda: uncertainty.held_out(tested),
            None if tested else "No held-out run has both a prediction and a loss.",
        ),
    }
    if isoflop is not None:
        found["valleys"] = drawn_twice(
            "Loss over parameters for each budget", lambda width: laws.valleys(isoflop, width)
        )
    else:
        found["valleys"] = drawn_twice(
            "Loss over compute, by size",
            lambda width: uncertainty.losses(table.params, table.tokens, table.loss, width),
        )
    return found


def _minima(analysis: Analysis) -> list[laws.MeasuredMinimum]:
    """Return the minima measured at budgets that were held out of every fit."""
    budgets = [] if analysis.held_out is None else analysis.held_out["budgets"]
    found = [(budget["flops"], budget["measured"]) for budget in budgets if "params" in budget["measured"]]
    return [laws.MeasuredMinimum(flops, best["params"], best["tokens"]) for flops, best in found]


def _predictors(held_out: dict[str, Any] | None) -> dict[str, str]:
    """Return the names of a prediction's estimators; those of before the method was written down used the parabola."""
    valleys = (held_out or {}).get("valleys") or {"method": "parabola"}
    methods = {name: NAMES[f"isoflop.{name}"] for name in METHODS}
    return NAMES | methods | {"isoflop": methods[valleys["method"]]}


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _formulas(analysis: Analysis) -> dict[str, str]:
    from experiments.scaling.forms.registry import get

    return {score.form: get(score.form).formula for score in analysis.choice.scores} if analysis.choice else {}


def _equal(one: IsoflopFit | None, other: IsoflopFit | None) -> bool:
    return one is not None and other is not None and bool(np.isclose(one.a, other.a, rtol=1e-6))


def _rejected(budgets: list[RejectedBudget]) -> list[dict[str, Any]]:
    """Return [{flops, reason}] with the budgets of one reason together, in the order of the first."""
    together: dict[str, list[float]] = {}
    for budget in budgets:
        together.setdefault(budget.reason, []).append(budget.flops)
    return [{"flops": flops, "reason": reason} for reason, flops in together.items()]


def _left_out(analysis: Analysis) -> list[dict[str, str]]:
    """Return [{run, of, reason}]: rows with one reason together; of: the estimators that left a run out."""
    dropped: dict[str, list[int]] = {}
    outliers: dict[tuple[str, str], list[str]] = {}
    for row in analysis.left_out:
        if row.run is not None:
            run = f"N {amount(row.run.params)}, D {amount(row.run.tokens)}, loss {row.run.loss:.4g}"
            run = run if row.row is None else f"row {row.row}: {run}"
            outliers.setdefault((run, row.reason), []).append(NAMES[row.estimator])
        elif row.row is not None:
            dropped.setdefault(row.reason, []).append(row.row)
    found = [
        {"run": f"{'row' if len(rows) == 1 else 'rows'} {_spans(rows)}", "of": "all", "reason": reason}
        for reason, rows in dropped.items()
    ]
    found += [{"run": run, "of": "; ".join(names), "reason": reason} for (run, reason), names in outliers.items()]
    more = len(found) - MOST_LEFT_OUT
    if more > 0:
        rest = {"run": f"{more:,} more lines", "of": "", "reason": "listed in the JSON document and the tables"}
        found = [*found[:MOST_LEFT_OUT], rest]
    return found


def _spans(rows: list[int]) -> str:
    """Write row numbers with their ranges: 3, 7–9."""
    spans: list[list[int]] = []
    for row in sorted(rows):
        if spans and row == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], row]
        else:
            spans.append([row])
    return ", ".join("–".join(map(str, span)) for span in spans)
