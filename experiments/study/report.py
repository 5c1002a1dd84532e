"""Write the study's report: `study.json` and the runs' loss curves as one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench.decode.figures import throughput
from experiments.report.page import Drawn, device_name, drawn, drawn_twice, known, render
from experiments.runs.curves import LossCurve, read_curve
from experiments.scaling.figures import laws
from experiments.scaling.fit import fit_both
from experiments.scaling.law.problem import LARGEST_EXPONENT
from experiments.scaling.rows.table import HELD_OUT_REASON, read_table
from experiments.scaling.valleys.isoflop import DEFAULT
from experiments.study import figures
from experiments.study.command_lines import commands
from experiments.sweep.analysis.outcome import Summary
from experiments.sweep.figures.panels import axis_panels, goes_beyond
from train.checksums import read_sealed
from train.files import write_atomically
from train.run.metrics import troubles

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SOURCES = {"sotu": "State of the Union addresses", "stdlib": "Python’s standard library"}
FATES = {"diverged": "diverged", "interrupted": "was interrupted", "finished": "finished"}
CURVES = {"spline": "smoothing spline", "skewed": "skewed parabola", "parabola": "parabola"}
WIDE_EXPONENT = 0.5  # an exponent is between 0 and 1: a 95 % interval wider than this says little
WIDE_PREDICTION = 0.1  # of the predicted loss: falling into a wider interval is a weak test


def write_study_page(folder: Path, document: dict[str, Any]) -> None:
    """Write `report.html` next to the study's runs, self-contained and atomically.

    A missing figure (refused fit, no prediction, diverged run) is replaced by a sentence with the reason.
    """
    write_atomically(folder / "report.html", render(TEMPLATE, **_view(folder, document)))


def _view(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Return the template's variables: the document's parts, never None, and values derived from them."""
    parts = {name: document.get(name) or {} for name in ("settings", "data", "plan", "sweep", "fit", "totals")}
    parts |= {name: document.get(name) or {} for name in ("prediction", "heldout", "device", "versions")}
    every, cells = document.get("ladder") or [], _measured(document)
    rows = [row for row in every if not row["held_out"]]
    fit = parts["fit"]
    parametric, isoflop = fit.get("parametric"), fit.get("isoflop")
    source = parts["settings"].get("source", "unknown")
    return parts | {
        "rows": rows,
        "budgets": len({row["budget"] for row in rows}),
        "decode": cells,
        "samples": document.get("samples") or [],
        "transfer_rule": document.get("transfer_rule"),
        "source_name": SOURCES.get(source, source),
        "device_name": device_name(parts["device"]),
        "parametric": parametric,
        "isoflop": isoflop,
        "valley_curve": CURVES[(isoflop or {}).get("method", DEFAULT)],
        "refused": fit.get("refused") or {},
        "exponents": [
            {"name": name, "a": _exponent(law, "a"), "b": _exponent(law, "b")}
            for name, law in (("IsoFLOP valleys", isoflop), ("the parametric law", parametric))
            if law is not None
        ],
        "undetermined": [] if parametric is None else _undetermined(parametric),
        "left_out": [
            {"run": every[entry["row"] - 1]["name"], "reason": entry["reason"]}
            for entry in fit.get("dropped") or []
            if entry["reason"] != HELD_OUT_REASON
        ],
        "troubles": troubles(folder / "ladder" / row["run"] for row in every),
        "unfinished": [row for row in rows if row["status"] != "finished"],
        "fate": FATES.get(str(parts["heldout"].get("status")), "did not finish"),
        "weak_test": _weak_test(parts["prediction"]),
        "fastest": max(cells, key=lambda cell: cell["decode_tokens_per_second_aggregate"], default=None),
        "beyond": bool(parts["sweep"]) and goes_beyond(Summary.from_dict(parts["sweep"])),
        "order": _best_first(parts["sweep"]),
        "stages": _stages(folder),
        "commands": commands(document),
        "figures": _figures(folder, document, rows),
    }


def _figures(folder: Path, document: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Drawn]:
    # The document's fits again, as objects that can be drawn: same table, same seed, same numbers.
    fits = fit_both(read_table(folder / "ladder" / "runs.csv"))
    method = ((document.get("fit") or {}).get("isoflop") or {}).get("method", DEFAULT)
    parametric, isoflop, refused = fits.parametric, fits.methods.get(method), fits.refused
    sweep, measured = document.get("sweep") or {}, document.get("heldout") or {}
    prediction, cells = document.get("prediction") or {}, _measured(document)
    by_budget: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        by_budget.setdefault(row["budget_flops"], []).append(row)
    usable = [(budget, [row for row in members if known(row["loss"])]) for budget, members in by_budget.items()]
    usable = [(budget, members) for budget, members in usable if members]
    curves = [(budget, _curves(folder, members)) for budget, members in by_budget.items()]
    curves = [(budget, members) for budget, members in curves if members]
    held_out = _held_out_curve(folder, measured)
    no_valleys = "No run of the ladder has a loss."
    no_law = f"The parametric law was refused: {refused.get('parametric', 'no reason was given')}."

    found = {
        "sweep": drawn(
            "Validation loss against each axis of the sweep",
            lambda: axis_panels(Summary.from_dict(sweep)),
            None if any(known(setting["mean"]) for setting in sweep.get("settings", ())) else "No trial has a loss.",
        ),
        "curves": drawn_twice(
            "Training loss of every run of the ladder over compute",
            lambda width: figures.loss_curves(curves, width),
            None if curves else "The runs' metrics.jsonl files are not in this study's folder.",
        ),
        "optimal": drawn(
            "Compute-optimal parameters and tokens over compute",
            lambda: laws.compute_optimal(isoflop, parametric),
            "Both estimators were refused, so there is no N*(C)." if parametric is None and isoflop is None else None,
        ),
        "held_out": drawn_twice(
            "Loss of the held-out run over tokens with the predicted interval",
            lambda width: figures.held_out_curve(
                held_out,
                loss=measured.get("loss"),
                predicted=prediction.get("loss"),
                interval=prediction.get("interval_95"),
                tokens=measured["tokens"],
                width=width,
            ),
            None if measured and (held_out or known(measured["loss"])) else "The held-out run left no loss to draw.",
        ),
        "decode": drawn(
            "Prefill and decode throughput over batch size",
            lambda: throughput(cells),
            None if cells else "Decoding was not measured.",
        ),
    }
    if isoflop is not None:
        found["valleys"] = drawn_twice(
            "Loss over parameters for each budget", lambda width: laws.valleys(isoflop, width)
        )
    else:
        found["valleys"] = drawn_twice(
            "Loss over parameters for each budget",
            lambda width: figures.losses_by_size(usable, width),
            None if usable else no_valleys,
        )
    if parametric is None:
        found |= {name: {"svg": None, "reason": no_law} for name in ("measured", "residuals")}
    else:
        held = [measured] if known(measured.get("loss")) else []
        found["measured"] = drawn(
            "Measured over predicted loss",
            lambda: laws.measured_predicted(parametric, held),
        )
        found["residuals"] = drawn("Residuals over N, D and C", lambda: laws.residuals(parametric))
    return found


def _curves(folder: Path, rows: Sequence[dict[str, Any]]) -> list[LossCurve]:
    read = [read_curve(folder / "ladder" / row["run"]) for row in rows]
    return [curve for curve in read if curve is not None]


def _held_out_curve(folder: Path, measured: dict[str, Any]) -> LossCurve | None:
    return read_curve(folder / "ladder" / measured["run"]) if measured else None


def _exponent(law: dict[str, Any], name: str) -> dict[str, Any]:
    interval = (law.get("intervals") or {}).get(name, {}).get("95")
    certain = interval is not None and known(interval[0]) and known(interval[1])
    wide = not certain or interval[1] - interval[0] > WIDE_EXPONENT
    return {"value": law[name], "interval": interval, "wide": wide}


def _undetermined(parametric: dict[str, Any]) -> list[str]:
    """Return the exponents whose 95 % interval reaches a bound of the search: the runs do not determine them."""
    names = []
    for name in ("alpha", "beta"):
        interval = (parametric.get("intervals") or {}).get(name, {}).get("95") or [None, None]
        low, high = interval
        if not known(low) or not known(high) or low < 1e-3 or high > 0.99 * LARGEST_EXPONENT:
            names.append(name)
    return names


def _weak_test(prediction: dict[str, Any]) -> float | None:
    """Return the width of the predicted interval as a share of the prediction if it is wide, else None."""
    if not known(prediction.get("loss")) or prediction.get("interval_95") is None:
        return None
    low, high = prediction["interval_95"]
    share = (high - low) / prediction["loss"]
    return share if share > WIDE_PREDICTION else None


def _best_first(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a sweep's settings by mean loss, those with a diverged run last."""
    last = float("inf")
    return sorted(
        sweep.get("settings", ()),
        key=lambda setting: (setting["lost"] > 0, setting["mean"] if known(setting["mean"]) else last),
    )


def _stages(folder: Path) -> list[dict[str, Any]]:
    """Return wall seconds and compiled programs of each stage, as far as recorded."""
    stages = []
    for path in (folder / "stages").glob("*.json"):
        note = read_sealed(path)
        stages.append({"name": path.stem, "seconds": note["seconds"], "compiles": note["compiles"]})
    return sorted(stages, key=lambda stage: -stage["seconds"])


def _measured(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of the decode benchmark that did not fail."""
    return [cell for cell in document.get("decode") or [] if "error" not in cell]
