"""Print the results of tasks as tables on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.commands.options import console, new_table
from experiments.words import counted

_BESIDE = ("acc", "acc_norm", "bits_per_byte")
"""Metrics that are shown beside the quoted one, where the task has them."""


def print_results(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Print a row per task and model, a table of domains for each text task, and what to know about the numbers."""
    screen = console()
    asked = [result for result in results if result["kind"] != "text"]
    if asked:
        screen.print(_table(asked, screen.width))
    for result in results:
        if result["kind"] == "text":
            screen.print(_domains(result))
    for note in notes(results):
        screen.print(note, highlight=False, markup=False)
    screen.print(f"answers and results.json: {out}", highlight=False, markup=False)


def notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences about results that a reader might take for more than they are."""
    found = []
    for result in results:
        who, quoted = f"{result['model']}, {result['task']}", result["metrics"][result["metric"]]
        chance = result["chance"]
        if chance and quoted["low"] is not None and quoted["low"] <= chance <= quoted["high"]:
            found.append(f"{who}: {result['metric']} cannot be distinguished from chance, {_percent(chance)}")
        if result["boundary_differs"]:
            number = counted(result["boundary_differs"], "question")
            found.append(f"{who}: in {number} a token reaches over the end of the context")
        if result["truncated"]:
            found.append(f"{who}: the context of {counted(result['truncated'], 'question')} was cut at its beginning")
    return found


def _table(results: Sequence[Mapping[str, Any]], width: int) -> Any:
    """Return the table of choice and generation tasks; a narrow terminal leaves out the metrics beside the quoted."""
    beside = [name for name in _BESIDE if width >= 110 and any(name in result["metrics"] for result in results)]
    models = list(dict.fromkeys(result["model"] for result in results))
    named = ("model",) if len(models) > 1 else ()
    words = ("task", "protocol", *named, "metric")
    table = new_table(
        *words,
        "questions",
        "value",
        "95 %",
        "chance",
        *("bits/byte" if name == "bits_per_byte" else name for name in beside),
    )
    for column in table.columns[: len(words)]:
        column.justify = "left"
    if not named:
        table.title = models[0]
    order = {task: number for number, task in enumerate(dict.fromkeys(result["task"] for result in results))}
    last = None
    for result in sorted(results, key=lambda one: order[one["task"]]):
        metric, found = result["metric"], result["metrics"]
        protocol = result["protocol"] + (f", {counted(result['shots'], 'shot')}" if result["shots"] else "")
        about = (result["task"], protocol)
        table.add_row(
            *(about if about != last else ("", "")),
            *((result["model"],) if named else ()),
            metric,
            f"{result['questions']:,}",
            _joined(metric, " ± ", found[metric]["value"], found[metric]["standard_error"]),
            _joined(metric, " … ", found[metric]["low"], found[metric]["high"]),
            _percent(result["chance"]) if result["chance"] else "–",
            *(_joined(name, "", found[name]["value"]) if name in found else "–" for name in beside),
        )
        last = about
    return table


def _domains(result: Mapping[str, Any]) -> Any:
    table = new_table("domain", "texts", "tokens", "bytes", "bits per byte", "perplexity")
    table.title = f"{result['model']}: {result['task']}"
    for domain, found in sorted(result["domains"].items(), key=lambda pair: pair[1]["bits_per_byte"]):
        counts = (f"{found[name]:,}" for name in ("texts", "tokens", "bytes"))
        table.add_row(domain, *counts, f"{found['bits_per_byte']:.4f}", f"{found['perplexity']:.2f}")
    bits, perplexity = result["metrics"]["bits_per_byte"], result["metrics"]["perplexity"]
    domains = result["domains"].values()
    totals = (f"{sum(one[name] for one in domains):,}" for name in ("texts", "tokens", "bytes"))
    error = "" if bits["standard_error"] is None else f" ± {bits['standard_error']:.4f}"
    both = (f"{bits['value']:.4f}{error}", f"{perplexity['value']:.2f}")
    table.add_row("all", *totals, *both)
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _joined(metric: str, between: str, *values: float | None) -> str:
    """Write numbers of a metric with one unit; a dash for what is not known."""
    if metric == "bits_per_byte":
        return between.join("–" if value is None else f"{value:.3f}" for value in values)
    return between.join("–" if value is None else f"{100 * value:.1f}" for value in values) + " %"
