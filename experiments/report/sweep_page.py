"""The page of a sweep: its analysis and the runs' learning curves, in one file that needs no network."""

from pathlib import Path
from typing import Any

from experiments.report import sweep_figures, sweep_maps
from experiments.report.figures import Curve, read_curve
from experiments.report.page import Drawn, drawn, render
from experiments.sweep.reading.curves import UNEQUAL, chosen
from experiments.sweep.reading.results import Results
from experiments.sweep.reading.scales import text
from experiments.words import counted
from train.files import write_atomically

MOST_ROWS = 1000  # of the table of settings


def write_sweep_page(path: Path, results: Results, document: dict[str, Any], no_parquet: str | None = None) -> None:
    """Write the report of a sweep: self-contained, whole or absent.

    document: `experiments.sweep.reading.analysis.analyse` of the results. no_parquet: why there is no table in Parquet.
    """
    write_atomically(path, render("sweep.html.jinja", **_view(results, document, no_parquet)))


def _view(results: Results, document: dict[str, Any], no_parquet: str | None) -> dict[str, Any]:
    winner = document["winner"]
    return document | {
        "title": results.folder.resolve().name,
        "total": len(results.rows),
        "names": list(results.axes),
        "varied": [_axis_in_words(name, values) for name, values in results.axes.items()],
        "seeds": len({row["seed"] for row in results.rows}),
        "running": sum(document["counts"][state] for state in ("planned", "running")),
        "order": sorted(document["settings"], key=lambda row: (row["mean"] is None, row["mean"] or 0.0))[:MOST_ROWS],
        "winning": None if winner is None else winner["setting"],
        "equal": [] if winner is None else winner["indistinguishable"] or [],
        "no_parquet": no_parquet,
        "write": text,
        "figures": _figures(results, document),
    }


def _axis_in_words(name: str, values: list[Any]) -> dict[str, str]:
    numbers = len(values) > 12
    said = (
        f"{counted(len(values), 'value')}, {text(values[0])} … {text(values[-1])}"
        if numbers
        else ", ".join(map(_short, values))
    )
    return {"name": name, "values": said}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text(value)


def _figures(results: Results, document: dict[str, Any]) -> dict[str, Drawn]:
    names = list(results.axes)
    no_loss = None if any(row["mean"] is not None for row in document["settings"]) else "No trial has finished yet."
    if no_loss and document["counts"]["diverged"]:
        no_loss = "No trial has a loss: those that ended have diverged."
    no_axes = None if names else "Nothing varies but the seed."
    few = None if len(names) > 1 else "It takes two axes."
    curves = _curves(results)
    refused = document["importance"]["ped_anova"].get("refused")
    found = {
        "axes": drawn("Loss against each axis", lambda: sweep_figures.axis_panels(document), no_loss or no_axes),
        "curves": drawn(
            "Training loss of runs over tokens",
            lambda: sweep_figures.learning_curves(curves, _costs_differ(results)),
            None if curves else "No run has left a learning curve beside this sweep.",
        ),
        "parallel": drawn(
            "Settings as lines through their values",
            lambda: sweep_figures.parallel_coordinates(document),
            no_loss or no_axes,
        ),
        "importance": drawn(
            "Importance of each axis",
            lambda: sweep_figures.importance_bars(document["importance"]),
            None if refused is None else f"Importances were refused: {refused}.",
        ),
        "pairs": drawn("Loss over pairs of axes", lambda: sweep_maps.pair_maps(document), no_loss or few),
    }
    if document["pareto"] is not None:
        found["pareto"] = drawn("Pareto front", lambda: sweep_maps.pareto_front(document["pareto"]))
    if document["transfer"] is not None:
        found["transfer"] = drawn(
            "Optimum of the learning rate at each size",
            lambda: sweep_maps.rate_transfer(document["transfer"]),
            None if any(row["line"] for row in document["transfer"]["sizes"]) else "No size has a loss.",
        )
    return found


def _curves(results: Results) -> list[tuple[dict[str, Any], Curve]]:
    pairs = [(row, read_curve(results.folder / row["run"], points=120)) for row in chosen(results.rows)]
    return [(row, curve) for row, curve in pairs if curve is not None]


def _costs_differ(results: Results) -> bool:
    """Whether a step costs more in some trials than in others, so that FLOPs are the fair abscissa."""
    costs = [row["flops_6nd"] / results.fact(row, "tokens") for row in results.rows if row["flops_6nd"]]
    return bool(costs) and max(costs) > UNEQUAL * min(costs)
