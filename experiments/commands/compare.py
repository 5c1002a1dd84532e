"""Implement `isoflop compare`: whether one model is better than another, by their answers to the same questions."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.commands.options import JsonFile
from experiments.words import counted

if TYPE_CHECKING:
    from rich.table import Table

    from experiments.evaluate.compare import Comparison, TaskComparison

WIDE = 110  # columns of a terminal that have room for every interval


def compare(
    out: tyro.conf.Positional[Path],
    *,
    baseline: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None,
    metric: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    protocols: bool = False,
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    json: JsonFile = None,
) -> None:
    """Compare models by their answers to the same questions: which is better, and what cannot be distinguished.

    Reads a folder of `isoflop eval --out`. Every question is a pair: the difference of two models is far less noisy
    than their two scores. p is corrected for the number of comparisons, and for each task the smallest difference is
    shown that its questions can show. The prompts must be the same. (`isoflop bench compare` compares speeds.)

    Example: isoflop compare evals

    Example: isoflop compare evals --baseline best --report evals/compared.html

    Example: isoflop compare evals --metric bits_per_byte --json evals/compared.json

    Example: isoflop compare evals --protocols

    Args:
        out: The folder of answers.
        baseline: The model with which the others are compared, by default the first one; best: all pairs are compared,
            and each task's best is the reference.
        metric: The metric to compare, by default the one that each task quotes.
        protocols: Compare the protocols under which a model answered, on the questions that they share.
        report: Also write an HTML page with figures, calibration and cost.
        json: Also write every number to this file.
    """
    from experiments.commands.options import console, output, write_document
    from experiments.evaluate.compare import compare as compare_answers
    from experiments.evaluate.evaluations import read_evaluations
    from experiments.evaluate.sentences import sentences

    evaluations = read_evaluations(out)
    found = compare_answers(evaluations, baseline=baseline, metric=metric, protocols=protocols)
    said = sentences(found)
    write_document(json, {"sentences": said} | found.to_dict())
    terminal = console()
    for table in _tables(found, is_narrow=terminal.width < WIDE):
        terminal.print(table)
        terminal.print()
    count = counted(len(found.differences), "comparison")
    terminal.print(f"p is corrected for {count}. Detectable: the smallest true difference found with 80 % probability.")
    for sentence in said:
        terminal.print(sentence, highlight=False)
    for sentence in found.left_out:
        terminal.print(sentence, style="yellow", highlight=False)
    if report is not None:
        from experiments.evaluate.report import write_comparison_page

        with output(report):
            write_comparison_page(report, evaluations, found)
        terminal.print(f"{report}", highlight=False, soft_wrap=True)


def _tables(comparison: "Comparison", is_narrow: bool) -> "list[Table]":
    """Return a table for each task, with columns of one width; the first has the header.

    is_narrow: a terminal has no room for the intervals of scores, and columns are as wide as each table needs.
    """
    from experiments.commands.options import new_table
    from experiments.evaluate.sentences import described, full_name, task_names, written

    first = "protocol" if comparison.baseline is None else "model"
    header = (first, "score" if is_narrow else "score (95 %)", "difference (95 %)", "p", "verdict")
    lines = [_lines(comparison, task, is_narrow) for task in comparison.tasks]
    widths = [max(len(row[column]) for row in [header, *itertools.chain(*lines)]) for column in range(4)]
    tables: list[Table] = []
    for name, task, rows in zip(task_names(comparison), comparison.tasks, lines, strict=True):
        said = f"{full_name(task, name)}: {described(task)}; detectable {written(task, task.detectable)}"
        table = new_table(*header, title=said)
        if not is_narrow:
            table.show_header = not tables
            for column, width in zip(table.columns, widths, strict=False):
                column.min_width = width
        table.columns[0].overflow = "fold"
        table.columns[4].no_wrap, table.columns[4].justify = False, "left"
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def _lines(comparison: "Comparison", task: "TaskComparison", is_narrow: bool) -> list[tuple[str, ...]]:
    """Return the cells of a line for each score of a task."""
    from experiments.evaluate.sentences import judged, written, written_difference, written_p

    compared = {row.second: row for row in task.differences if row.first == comparison.reference(task)}
    found: list[tuple[str, ...]] = []
    for score in task.scores:
        mean, row = score.mean, compared.get(score.name)
        interval = "" if is_narrow else f" ({written(task, mean.low)} … {written(task, mean.high)})"
        cells = ("", "", "")
        if row is not None:
            low, high = (written_difference(task, end) for end in (row.paired.low, row.paired.high))
            difference = f"{written_difference(task, row.paired.mean)} ({low} … {high})"
            cells = (difference, written_p(row.adjusted_p), judged(task, row))
        found.append((score.name, written(task, mean.value) + interval, *cells))
    return found
