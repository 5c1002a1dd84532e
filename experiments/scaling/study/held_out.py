"""Predict losses and optima of budgets that are not trained yet, and compare them with the measurements later."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling.fit import Fits, choose_form, fit_both
from experiments.scaling.forms.fit import FormFit
from experiments.scaling.rows.table import read_table
from experiments.scaling.study.rungs import Rung
from experiments.scaling.use import optimal, planned_loss
from experiments.scaling.valleys.spline import Spline
from experiments.scaling.valleys.valley import PARABOLA, Valley, ValleyShape, reason_against
from experiments.words import counted
from model.errors import InputError
from train.checksums import read_sealed, write_sealed

SCHEMA_VERSION = 1
LEVEL = 95


def predict(
    folder: Path, rungs: Sequence[Rung], say: Callable[[str], None] = print, bootstraps: int = 1000
) -> dict[str, Any]:
    """Write prediction.json for rungs that are not trained yet, from runs.csv; an existing file is never changed.

    Per run the parametric law's loss with its interval, and that by every form of law; which form the held-out error
    within the fitted budgets prefers; per budget each estimator's N*, D* with intervals, and the parametric loss there.
    """
    path = folder / "prediction.json"
    if path.exists():
        say(f"[2/3] {path} was written before; it stays")
        return read_sealed(path)
    if (folder / "held_out" / "sweep.json").exists():
        raise InputError(f"{folder} has held-out runs, but {path.name} is gone: what is written now predicts nothing")
    say(f"[2/3] prediction of {counted(len(rungs), 'run')} before any is made: {path}")
    table = read_table(folder / "runs.csv")
    fits = fit_both(table, bootstraps=bootstraps)
    try:
        choice = choose_form(fits, bootstraps=min(bootstraps, 100))
        forms = {"winner": choice.winner, "told_apart": choice.told_apart, "reason": choice.reason}
        laws = choice.fits
    except InputError as error:
        forms, laws = {"refused": str(error)}, {}
    document = {
        "schema_version": SCHEMA_VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "level": LEVEL,
        "runs": [_of_run(fits, laws, rung) for rung in rungs],
        "forms": forms,
        "budgets": [_of_budget(fits, flops) for flops in dict.fromkeys(rung.budget_flops for rung in rungs)],
        "valleys": _valleys(fits),
        "refused": fits.refused,
    }
    write_sealed(path, document)
    return document


def compare(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write held_out.json: every predicted run with its measured loss, every budget with its own valley.

    rows: of runs.csv. An error is measured − predicted.
    """
    said = read_sealed(folder / "prediction.json")
    valleys = said.get("valleys")
    shape = PARABOLA if valleys is None else Spline(valleys["smoothing"])
    tested = {row["name"]: row for row in rows if row["held_out"]}
    runs = [run | _error(run, tested[run["name"]]["loss"]) for run in said["runs"]]
    errors = np.array([run["relative_error"] for run in runs if run["relative_error"] is not None])
    budgets = []
    for budget in said["budgets"]:
        members = [row for row in tested.values() if row["budget_flops"] == budget["flops"] and row["loss"] is not None]
        budgets.append(budget | {"measured": _valley(members, budget["optima"], shape)})
    document = {
        "schema_version": SCHEMA_VERSION,
        "written": said["written"],
        "level": said["level"],
        "valleys": valleys,
        "runs": runs,
        "budgets": budgets,
        "mean_relative_error": float(errors.mean()) if len(errors) else None,
        "largest_relative_error": float(np.abs(errors).max()) if len(errors) else None,
        "inside": sum(bool(run["inside"]) for run in runs),
        "forms": said.get("forms", {}),
        "errors_by_form": _by_form(runs),
    }
    write_sealed(folder / "held_out.json", document)
    return document


def nearest_to_optimum(tested: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, float]:
    """Return (run, estimator, its N*) of the first budget's run nearest to the predicted optimum (or the middle)."""
    optima, sizes = tested["budgets"][0]["optima"], sorted(run["params"] for run in tested["runs"])
    estimator = next((name for name in ("isoflop", "parametric") if name in optima), None)
    best = sizes[len(sizes) // 2] if estimator is None else optima[estimator]["params"]
    return min(tested["runs"], key=lambda run: abs(np.log(run["params"] / best))), estimator, best


def _of_run(fits: Fits, laws: Mapping[str, FormFit], rung: Rung) -> dict[str, Any]:
    run = {"name": rung.name, "params": rung.params, "tokens": rung.tokens, "flops": rung.flops_6nd}
    run |= {"repeated": rung.repeated, "loss": None, "interval": None}
    if fits.parametric is not None:
        answer = planned_loss(fits.parametric, rung.params, rung.tokens, LEVEL)
        run |= {"loss": answer.loss, "interval": answer.interval}
    by_form = {name: float(law.predict(params=rung.params, tokens=rung.tokens)) for name, law in laws.items()}
    return run | {"by_form": by_form}


def _by_form(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return {form: {mean, rms}} of measured over predicted, less 1."""
    tested = [run for run in runs if run["measured"] is not None]
    errors: dict[str, list[float]] = {}
    for run in tested:
        for name, loss in run.get("by_form", {}).items():
            errors.setdefault(name, []).append(run["measured"] / loss - 1)
    return {
        name: {"mean": float(np.mean(found)), "rms": float(np.sqrt(np.mean(np.square(found))))}
        for name, found in errors.items()
    }


def _of_budget(fits: Fits, flops: float) -> dict[str, Any]:
    known = {"parametric": fits.parametric, "isoflop": fits.isoflop, **fits.valleys}
    optima = optimal({name: fit for name, fit in known.items() if fit is not None}, flops, LEVEL)
    return {"flops": flops, "optima": {name: best.to_dict() for name, best in optima.items()}}


def _valleys(fits: Fits) -> dict[str, Any] | None:
    """Return the curve of the fitted valleys, by which the held-out valley is judged; None without them."""
    if fits.isoflop is None or not isinstance(fits.isoflop.shape, Spline):
        return None
    return {"method": fits.isoflop.method, "smoothing": fits.isoflop.shape.smoothing}


def _error(run: dict[str, Any], loss: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"measured": loss, "error": None, "relative_error": None, "inside": None}
    if loss is not None and run["loss"] is not None:
        low, high = run["interval"]
        found |= {"error": loss - run["loss"], "relative_error": loss / run["loss"] - 1, "inside": low <= loss <= high}
    return found


def _valley(rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Any], shape: ValleyShape) -> dict[str, Any]:
    """Return {params, tokens, loss} of one budget's minimum, or {refused}, and the error of each estimator's N*."""
    if not rows:
        return {"refused": "none of its runs has a loss"}
    params, tokens, loss = (np.array([row[name] for row in rows], np.float64) for name in ("params", "tokens", "loss"))
    reason = reason_against(params, loss, shape)
    if reason is not None:
        return {"refused": reason}
    flops = float(np.exp(np.log(6 * params * tokens).mean()))
    curve = PARABOLA.coefficients(np.log(params) - np.log(params).mean(), loss)
    best = Valley(flops, params, tokens, loss, curve, None, shape).optimum
    against = {}
    for name, optimum in predicted.items():
        low, high = (optimum["intervals"] or {}).get("params", (None, None))
        against[name] = {
            "params_over_predicted": best.params / optimum["params"],
            "inside": None if low is None else low <= best.params <= high,
        }
    return {"params": best.params, "tokens": best.tokens, "loss": best.loss, "against": against}
