"""Write the page of a sweep: its analysis and the runs' learning curves, in one file that works offline."""

from pathlib import Path
from typing import Any

from experiments.report.page import Drawn, drawn, drawn_twice, render
from experiments.runs.curves import LossCurve, read_curve
from experiments.sweep.analysis.curves import MOST, UNEQUAL, chosen
from experiments.sweep.analysis.document import SweepAnalysis
from experiments.sweep.analysis.executions import one_per_training
from experiments.sweep.analysis.ranking import Ranking
from experiments.sweep.analysis.results import Results, Tables
from experiments.sweep.analysis.scales import MANY, distinct, is_number, text
from experiments.sweep.analysis.settings import Setting, by_setting
from experiments.sweep.analysis.summary import fate
from experiments.sweep.figures import bars, lines, maps, panels
from experiments.words import counted
from train.files import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_ROWS = 1000  # of the table of settings


def write_sweep_page(path: Path, results: Results, analysis: SweepAnalysis, tables: Tables | None = None) -> None:
    """Write the report of a sweep, self-contained and atomically.

    analysis: of the results. tables: those in the page's folder, if any.
    """
    write_atomically(path, render(TEMPLATE, **_view(results, analysis, tables)))


def _view(results: Results, analysis: SweepAnalysis, tables: Tables | None) -> dict[str, Any]:
    summary, transfer = analysis.summary, analysis.transfer
    winner = summary.winner
    return analysis.to_dict() | {
        "title": results.folder.resolve().name,
        "total": len(results.rows),
        "names": list(results.axes),
        "varied": [
            _axis_in_words(name, _given(results, name), results.sampler != "all")
            for name in (*results.axes, *results.executions)
        ],
        "seeds": _seeds(results),
        "population": results.policy == "population",
        "compared_at": _compared_at(analysis),
        "ranked": "ped_anova" not in analysis.importance.refused,
        "vague": analysis.importance.refused,
        "many": len(results.rows) > MOST,
        "unknown": any(
            row["last_loss" if summary.ranking.by_loss else summary.ranking.objective] is None
            and row["state"] not in ("planned", "diverged")
            for row in results.rows
        ),
        "optima": [] if transfer is None else [row.optimum for row in transfer.sizes if row.optimum],
        "beyond": panels.goes_beyond(summary, analysis.compared_rungs),
        "fate": fate,
        "everywhere": [*results.axes, *results.executions],
        "total_settings": len(summary.settings),
        "starts": sum(bool(rung.first) for rung in analysis.rungs),
        "began": {row["member"]: row["parent_steps"] for row in results.rows},
        "rung_in_words": panels.rung_in_words,
        "running": sum(summary.counts[state] for state in ("planned", "running")),
        "order": sorted(summary.settings, key=lambda setting: _place(setting, summary.ranking))[:MOST_ROWS],
        "by_loss": summary.ranking.by_loss,
        "measure": summary.ranking.words,
        "best_word": summary.ranking.best,
        "winning": None if winner is None else winner.setting | {"member": winner.member},
        "equal": [] if winner is None else winner.indistinguishable or [],
        "tables": tables,
        "write": text,
        "figures": _figures(results, analysis),
    }


def _place(setting: Setting, ranked: Ranking) -> tuple[bool, bool, float, float]:
    """Return the sort key: candidates first, then by the tokens of the last rung and the loss at it."""
    tokens, stopped_at = (setting.stopped.tokens, setting.stopped.mean) if setting.stopped else (0, 0.0)
    cost = stopped_at if setting.mean is None else ranked.cost(setting.mean)
    return bool(fate(setting)), setting.mean is None, -tokens, cost


def _given(results: Results, name: str) -> list[Any]:
    """Return the initial values of an axis; a population moves to others."""
    return distinct(row[name] for row in results.rows if row["member"] is None)


def _seeds(results: Results) -> int:
    """Return the largest number of trials of a setting."""
    rows = [row for row in one_per_training(results.rows) if row["member"] is None]
    return max(len(members) for members in by_setting(list(results.axes), rows).values())


def _compared_at(analysis: SweepAnalysis) -> str:
    """Return which losses the figures of all axes show."""
    settings = analysis.summary.settings
    rows, steps = panels.fullest(settings, analysis.compared_rungs)
    total = len(settings)
    if steps is None:
        what = "members" if panels.is_population(settings) else "settings"
        return "" if len(rows) == total else f"Of the {len(rows)} {what} of {total} that were trained to the end. "
    where = panels.rung_in_words(steps)
    return f"Losses after {where}, where the most settings can be compared: {len(rows)} of {total}. "


def _axis_in_words(name: str, values: list[Any], drawn: bool) -> dict[str, str]:
    numbers = all(map(is_number, values)) and len(values) > (3 if drawn else MANY)
    said = (
        f"{counted(len(values), 'value')}, {text(values[0])} … {text(values[-1])}"
        if numbers
        else ", ".join(map(_short, values))
    )
    return {"name": name, "values": said}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text(value)


def _figures(results: Results, analysis: SweepAnalysis) -> dict[str, Drawn]:
    names, summary, rungs = list(results.axes), analysis.summary, analysis.compared_rungs
    ranked = summary.ranking
    no_loss = None if any(row.mean is not None for row in summary.settings) else "No trial has finished yet."
    if no_loss and summary.counts["diverged"]:
        no_loss = "No trial has a loss: those that ended have diverged."
    no_axes = None if names else "Nothing varies but the seed."
    few = None if len(names) > 1 else "It takes two axes that vary."
    curves = _curves(results, ranked)
    # A single setting gives no comparison, so these figures need several.
    compared, _ = panels.fullest(summary.settings, rungs)
    single = None if len(compared) > 1 else "One setting has a loss: nothing to compare."
    refused = list(analysis.importance.refused.values())
    found = {
        "axes": drawn(
            f"{ranked.words.capitalize()} against each axis",
            lambda: panels.axis_panels(summary, rungs),
            no_loss or no_axes,
        ),
        "curves": drawn_twice(
            "Training loss of runs over tokens",
            lambda width: lines.learning_curves(curves, _costs_differ(results), width, ranked),
            None if curves else "No run of this sweep has a learning curve.",
        ),
        "parallel": drawn_twice(
            "Settings as lines through their values",
            lambda width: lines.parallel_coordinates(analysis, width),
            no_loss or no_axes or few or single,
        ),
        "importance": drawn_twice(
            "Importance of each axis",
            lambda width: bars.importance_bars(analysis.importance, width),
            None if len(refused) < 2 else f"Importances were refused: {refused[0]}.",
        ),
        "pairs": drawn(
            f"{ranked.words.capitalize()} over pairs of axes",
            lambda: maps.pair_maps(analysis),
            no_loss or few or single,
        ),
    }
    if (executions := summary.executions) is not None:
        timed = any(row.tokens_per_second for row in executions.executions)
        found["executions"] = drawn_twice(
            "Training tokens per second of each execution",
            lambda width: bars.execution_bars(executions, width),
            None if timed else "No trial has a speed yet.",
        )
    if (pareto := analysis.pareto) is not None:
        found["pareto"] = drawn("Pareto front", lambda: maps.pareto_front(pareto))
    if (transfer := analysis.transfer) is not None:
        found["transfer"] = drawn(
            "Optimum of the learning rate at each size",
            lambda: maps.rate_transfer(transfer),
            None if any(row.line for row in transfer.sizes) else "No size has a loss.",
        )
    return found


def _curves(results: Results, ranked: Ranking) -> list[tuple[dict[str, Any], LossCurve]]:
    pairs = [(row, read_curve(results.folder / row["run"], points=120)) for row in chosen(results.rows, ranked)]
    return [(row, curve) for row, curve in pairs if curve is not None]


def _costs_differ(results: Results) -> bool:
    """Return whether a step costs more in some trials than in others, so that curves should be drawn over FLOPs."""
    costs = [row["flops_6nd"] / results.fact(row, "tokens") for row in results.rows if row["flops_6nd"]]
    return bool(costs) and max(costs) > UNEQUAL * min(costs)
