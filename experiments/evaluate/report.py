"""Write the page of a comparison of models: scores, paired differences, calibration, bits per byte, cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import to_hex

from experiments.evaluate import figures
from experiments.evaluate.compare import BEST, Comparison, Difference, Domain, Score, TaskComparison
from experiments.evaluate.evaluations import Evaluations
from experiments.evaluate.sentences import (
    described,
    full_name,
    is_share,
    judged,
    sentences,
    task_names,
    written,
    written_difference,
    written_p,
)
from experiments.evaluate.statistics.power import questions_needed
from experiments.report.page import DASH, Drawn, drawn, drawn_twice, render
from train.files import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_PANELS = 12
_TESTS = {
    "mcnemar": "McNemar’s test (mid-p)",
    "t": "Student’s t of the differences",
    "clustered t": "cluster-robust t of the differences",
}


def write_comparison_page(path: Path, evaluations: Evaluations, comparison: Comparison) -> None:
    """Write the page of a comparison, self-contained and atomically. comparison: of these evaluations."""
    write_atomically(path, render(TEMPLATE, **_view(evaluations, comparison)))


def _view(evaluations: Evaluations, comparison: Comparison) -> dict[str, Any]:
    named = list(zip(task_names(comparison), comparison.tasks, strict=True))
    verdicts = [row.verdict for row in comparison.differences]
    return {
        "title": evaluations.folder.resolve().name,
        "baseline": comparison.baseline,
        "by_protocol": comparison.baseline is None,
        "models": comparison.models,
        "questions": sum(task.questions for task in comparison.tasks),
        "sentences": sentences(comparison),
        "left_out": comparison.left_out,
        "comparisons": len(verdicts),
        "told": sum(verdict in ("better", "worse") for verdict in verdicts),
        "at_chance": [name for name, task in named if _all_at_chance(task)],
        "tasks": [_task(name, task, comparison.reference(task)) for name, task in named],
        "power": [_power(name, task) for name, task in named if task.differences],
        "calibrations": [
            {"name": name, "scores": [score for score in task.scores if score.calibration]}
            for name, task in named
            if any(score.calibration for score in task.scores)
        ],
        "calibrated": [
            f"{score.name} on {name}"
            for name, task in named
            for score in task.scores
            if score.calibration and score.calibration.ece <= score.calibration.ece_if_calibrated
        ],
        "domains": [_domains(name, task, comparison.reference(task)) for name, task in named if task.domains],
        "costs": _costs(evaluations.results, comparison.models),
        "tests": [_TESTS[name] for name in dict.fromkeys(row.paired.test for row in comparison.differences)],
        "colours": {name: to_hex(colour) for name, colour in _colours(comparison).items()},
        "figures": _figures(named, comparison),
    }


def _task(name: str, task: TaskComparison, against: str) -> dict[str, Any]:
    by_name = {row.second: row for row in task.differences if row.first == against}
    return {
        "name": full_name(task, name),
        "note": described(task),
        "rows": [_row(task, score, by_name.get(score.name), against) for score in task.scores],
    }


def _row(task: TaskComparison, score: Score, row: Difference | None, against: str) -> dict[str, Any]:
    """Return a line of the table; row: the difference from the reference, None for the reference itself."""
    mean, found = score.mean, {"difference": None, "difference_interval": None, "verdict": None, "p": None, "class": ""}
    if row is not None:
        is_known = row.paired.low is not None
        ends = [written_difference(task, end) for end in (row.paired.low, row.paired.high)]
        colour = "" if task.model else {"better": "good", "worse": "bad"}.get(row.verdict, "muted")
        found = {
            "difference": written_difference(task, row.paired.mean),
            "difference_interval": " … ".join(ends) if is_known else None,
            "verdict": judged(task, row),
            "p": written_p(row.adjusted_p),
            "class": colour,
        }
    return found | {
        "name": score.name,
        "score": written(task, mean.value),
        "interval": f"{written(task, mean.low)} … {written(task, mean.high)}" if mean.low is not None else DASH,
        "best": score.name == task.best,
        "at_chance": _at_chance(task, score),
        "reference": score.name == against,
    }


def _at_chance(task: TaskComparison, score: Score) -> bool:
    mean = score.mean
    if task.chance is None or mean.low is None or mean.high is None:
        return False
    return mean.low <= task.chance <= mean.high


def _all_at_chance(task: TaskComparison) -> bool:
    return all(_at_chance(task, score) for score in task.scores)


def _power(name: str, task: TaskComparison) -> dict[str, Any]:
    """Return what the questions of a task can show: of the pair whose answers vary most."""
    most = max(task.differences, key=lambda row: row.detectable or 0.0)
    counts = (most.paired.only_first, most.paired.only_second)
    share = None if None in counts else sum(count or 0 for count in counts) / most.paired.questions
    is_counted = most.paired.test == "mcnemar" and share is not None and share >= 0.01
    return {
        "name": full_name(task, name),
        "questions": task.questions,
        "clusters": task.clusters,
        "discordant": None if share is None else f"{100 * share:.1f} %",
        "detectable": written(task, task.detectable) + (" points" if is_share(task) else ""),
        "for_a_point": questions_needed(0.01, share) if is_counted and share is not None else None,
    }


def _domains(name: str, task: TaskComparison, against: str) -> dict[str, Any]:
    return {
        "name": full_name(task, name),
        "names": [score.name for score in task.scores],
        "against": against,
        "rows": [
            _domain(task, domain, against) for domain in (*task.domains, Domain("all", task.scores, task.differences))
        ],
    }


def _domain(task: TaskComparison, domain: Domain, against: str) -> dict[str, Any]:
    by_name = {row.second: row for row in domain.differences if row.first == against}
    cells = [_row(task, score, by_name.get(score.name), against) for score in domain.scores]
    return {"name": domain.name, "rows": domain.scores[0].mean.questions, "cells": cells}


def _costs(results: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[dict[str, Any]]:
    """Return seconds and, where they are recorded, latency and cost of each model, over all its tasks."""
    found = []
    for model in models:
        timed = [row for row in results if row["model"] == model and row.get("seconds") is not None]
        if not timed:
            continue
        seconds, questions = (sum(row[name] for row in timed) for name in ("seconds", "questions"))
        tokens = sum(row["tokens"] for row in timed) if all(row.get("tokens") for row in timed) else None
        found.append(
            {
                "model": model,
                "seconds": seconds,
                "questions": questions,
                "per_question": 1e3 * seconds / questions if questions else None,
                "per_token": None if tokens is None else 1e6 * seconds / tokens,
                "latency": _mean(row.get("latency_seconds") for row in timed),
                "cost": _mean(row.get("cost_per_million_tokens") for row in timed),
            }
        )
    return found


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figures(named: Sequence[tuple[str, TaskComparison]], comparison: Comparison) -> dict[str, Drawn]:
    shares = [(name, task) for name, task in named if is_share(task) and task.differences]
    calibrated = [(name, task.scores) for name, task in named if any(score.calibration for score in task.scores)]
    colours = _colours(comparison)
    rest = comparison.baseline if comparison.baseline != BEST else "the best of each task"
    rest = rest or "the first protocol"
    found = {
        "differences": drawn_twice(
            "Paired differences of each task with their intervals",
            lambda width: figures.forest(
                [_forest_row(name, task, task, comparison) for name, task in shares],
                colours,
                f"points more than {rest}",
                width,
            ),
            None if shares else "No task has a metric that is a share.",
        ),
        "reliability": drawn(
            "Reliability of predictions",
            lambda: figures.reliability(calibrated[:MOST_PANELS], colours),
            None if calibrated else "No task has the log-probabilities of several choices.",
        ),
    }
    for name, task in named:
        if task.domains:
            rows = [_forest_row(domain.name, task, domain, comparison) for domain in task.domains]
            rows.append(_forest_row("all", task, task, comparison))
            found[f"domains {name}"] = drawn_twice(
                f"Differences of bits per byte of {name} by domain",
                lambda width, rows=rows: figures.forest(rows, colours, f"bits per byte less than {rest}", width),  # type: ignore[misc]
            )
    return found


def _colours(comparison: Comparison) -> dict[str, Any]:
    """Return the colour of each model, or of each protocol where protocols are compared."""
    return figures.colours_of(list(dict.fromkeys(score.name for task in comparison.tasks for score in task.scores)))


def _forest_row(
    name: str, task: TaskComparison, compared: TaskComparison | Domain, comparison: Comparison
) -> figures.ForestRow:
    against = comparison.reference(task)
    rows = [row for row in compared.differences if row.first == against]
    label = full_name(task, name)
    return figures.ForestRow(label, rows, 100.0 if is_share(task) else 1.0, task.higher_is_better)
