"""Write the page of single runs: their curves in common panels, their differing settings, their results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.page import device_name, drawn, render
from experiments.report.style import PALETTE, amount, figures_of, legend_aside, log_axis, new_panels, styled
from experiments.runs.curves import holes_before, interrupted, smoothed
from experiments.runs.started import in_words, started_from_weights
from model.errors import InputError
from train import objectives
from train.files import write_atomically
from train.objectives import Objective
from train.overlay import OBJECTIVE
from train.recipe import later_defaults
from train.run import read_record
from train.run.metrics import Metrics, open_metrics

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PANELS = (
    ("loss", "loss ({unit})"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "norm of the gradient"),
    ("tokens_per_second", "tokens per second"),
)
MOST_RUNS = len(PALETTE)
MOST_POINTS = 1000


def write_run_page(path: Path, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Write the page of these run directories, finished or not; returns the row of each in the page's table.

    Raises `InputError` if a folder is not a run, no run has made a step, or there are too many for one figure.
    """
    if len(runs) > MOST_RUNS:
        raise InputError(
            f"{len(runs)} runs are too many for one figure; give at most {MOST_RUNS}, or use isoflop sweep report"
        )
    records = [read_record(run) for run in runs]
    read = [open_metrics(run) for run in runs]
    metrics = [each.lines for each in read]
    if not any(metrics):
        trouble = "".join(f"; {each.trouble}" for each in read if each.trouble)
        raise InputError(f"{', '.join(map(str, runs))}: no step has been made yet{trouble}")
    rows = [
        _row(run, record, each, differing)
        for run, record, each, differing in zip(runs, records, read, _differences(records), strict=True)
    ]
    units = {row["unit"] for row in rows}
    unit = rows[0]["unit"] if len(units) == 1 else "nats"
    figure = drawn(
        "Loss, learning rate, gradient norm and speed", lambda: _curves([run.name for run in runs], metrics, unit)
    )
    page = render(
        TEMPLATE,
        title=", ".join(run.resolve().name for run in runs),
        rows=rows,
        figure=figure,
        in_words=in_words,
    )
    write_atomically(path, page)
    return rows


def _row(run: Path, record: dict[str, Any], metrics: Metrics, differing: dict[str, Any]) -> dict[str, Any]:
    lines = metrics.lines
    last = lines[-1] if lines else {}
    validated = [line for line in lines if line.get("validation_loss") is not None]
    objective = _objective(record["identity"])
    speeds = [line["tokens_per_second"] for line in lines[1:] if line.get("tokens_per_second")]
    return {
        "run": str(run),
        "status": record["status"],
        "device": device_name(record["device"]),
        "steps": last.get("step"),
        "tokens": last.get("tokens"),
        "epochs": last.get("epoch"),
        "flops_6nd": last.get("flops_6nd"),
        "loss": last.get("loss"),
        "validation_loss": validated[-1]["validation_loss"] if validated else None,
        "validation_bits_per_byte": validated[-1].get("validation_bits_per_byte") if validated else None,
        "objective": objective.NAME,
        "unit": objective.UNIT,
        "likelihood": objective.LIKELIHOOD,
        "evaluated": {
            name: validated[-1].get(f"validation_{name}") if validated else None
            for name in objective.EVALUATED
            if name != "loss"
        },
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "seconds": last.get("seconds"),
        "skipped": sum(line.get("skipped", 0) for line in lines),
        "rollbacks": len(record.get("rollbacks", ())),
        "differing": differing,
        "started": started_from_weights(run, record),
        "trouble": metrics.trouble,
    }


def _differences(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each run the settings that differ between runs; those of the objective where all have one kind."""
    flat = [_flatten(record["identity"]) for record in records]
    alike = len({one[OBJECTIVE] for one in flat}) == 1
    names = sorted(
        name
        for name in {name for one in flat for name in one}
        if (alike or not name.startswith(f"{OBJECTIVE}."))
        and any(name not in one or one[name] != flat[0].get(name) for one in flat)
    )
    return [{name: one.get(name) for name in names} for one in flat]


def _flatten(identity: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = later_defaults()
    for name, value in identity.items():
        if name != OBJECTIVE:
            found |= value if isinstance(value, dict) else {name: value}
    objective = _objective(identity)
    inside = {f"{OBJECTIVE}.{name}": value for name, value in objective.to_dict().items() if name != "name"}
    return found | {OBJECTIVE: objective.NAME} | inside


def _objective(identity: dict[str, Any]) -> Objective:
    return objectives.from_dict(identity.get(OBJECTIVE, objectives.LanguageModeling.NAME))


@styled
def _curves(names: Sequence[str], metrics: Sequence[list[dict[str, Any]]], unit: str) -> list[Figure]:
    """Draw one panel per quantity over tokens, one colour per run; thin: steps, thick: smoothed."""
    recorded = [
        (field, label) for field, label in PANELS if any(line.get(field) for lines in metrics for line in lines)
    ]
    panels = new_panels(len(recorded), 3.0)
    for axes, (field, label) in zip(panels, recorded, strict=True):
        low, high = np.inf, 0.0
        for name, lines, colour in zip(names, metrics, PALETTE, strict=False):
            known = [index for index, line in enumerate(lines) if line.get(field)]
            if not known:
                continue
            tokens, values = np.array([(lines[index]["tokens"], lines[index][field]) for index in known], float).T
            low, high = min(low, tokens[0]), max(high, tokens[-1])
            shown = np.unique(np.round(np.geomspace(1, len(tokens), MOST_POINTS)).astype(int)) - 1
            hole = np.diff(holes_before(lines)[known][shown], prepend=0) > 0
            if field == "tokens_per_second":
                mean = 1 / smoothed(tokens, 1 / values)  # tokens over the seconds that they took
            elif field == "learning_rate":
                mean = values
            else:
                mean = smoothed(tokens, values)
                axes.plot(*interrupted(tokens[shown], values[shown], hole), color=colour, linewidth=0.5, alpha=0.3)
            axes.plot(*interrupted(tokens[shown], mean[shown], hole), color=colour, label=name)
            if field == "loss":
                checks = [
                    (li["tokens"], li["validation_loss"]) for li in lines if li.get("validation_loss") is not None
                ]
                axes.plot(*np.array(checks).reshape(-1, 2).T, "o", color=colour, markeredgecolor="white")
        log_axis(axes.xaxis, low, high, margin=0.03)
        if field == "grad_norm":
            norms = [line[field] for lines in metrics for line in lines if line.get(field)]
            log_axis(axes.yaxis, min(norms), max(norms))
        else:
            axes.yaxis.set_major_formatter(lambda value, _: amount(value))
        axes.set(xlabel="tokens", ylabel=label.format(unit=unit))
        if len(names) > 1:
            legend_aside(axes, entries=1)
    return figures_of(panels)
