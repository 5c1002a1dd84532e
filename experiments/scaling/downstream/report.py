"""Write the page of downstream laws: the predictions, their test, and both steps of every task."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.report.page import drawn, render
from experiments.scaling.downstream.figures import task_panels
from experiments.scaling.downstream.fit import DownstreamFit, DownstreamPrediction, coverage
from train.files import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_FIGURES = 60  # tasks drawn on one page


def write_downstream_page(
    path: Path, fit: DownstreamFit, predictions: Sequence[DownstreamPrediction], title: str
) -> None:
    """Write the page, self-contained and atomically."""
    write_atomically(path, render(TEMPLATE, **_view(fit, predictions, title)))


def _view(fit: DownstreamFit, predictions: Sequence[DownstreamPrediction], title: str) -> dict[str, Any]:
    document = fit.document(predictions)
    measured = [prediction for prediction in predictions if prediction.target is not None]
    tasks: list[dict[str, Any]] = []
    for row, (key, task) in zip(document["tasks"], fit.table.tasks.items(), strict=True):
        found = fit.fits.get(key)
        own = [p for p in predictions if (p.task, p.recipe) == key]
        view: dict[str, Any] = {"name": str(key), "figure": None, "targets": bool(task.targets)} | row
        if found is not None and len([view for view in tasks if view["figure"]]) < MOST_FIGURES:
            panels = partial(task_panels, found, fit.unit, own)
            view["figure"] = drawn(f"{key}: law and link", panels)
        tasks.append(view)
    return {
        "title": title,
        "unit": fit.unit,
        "rows": [prediction.to_dict() | {"name": prediction.name} for prediction in predictions],
        "measured": coverage(measured).to_dict() if measured else None,
        "held_out": document["held_out"],
        "stretch": document["stretch"],
        "bootstraps": fit.bootstraps,
        "tasks": tasks,
        "notes": fit.table.notes,
        "dropped": len(fit.table.dropped),
    }
