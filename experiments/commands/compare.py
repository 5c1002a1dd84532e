"""Implement `isoflop compare`: whether one model is better than another, by their answers to the same questions."""

from pathlib import Path
from typing import Annotated

import tyro

from experiments.commands.options import JsonFile


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
    from experiments.commands.options import console, new_table, output, write_document
    from experiments.evaluate.compare import compare as compare_answers
    from experiments.evaluate.evaluations import read_evaluations
    from experiments.evaluate.sentences import (
        is_share,
        judged,
        sentences,
        task_names,
        written,
        written_difference,
        written_p,
    )

    evaluations = read_evaluations(out)
    found = compare_answers(evaluations, baseline=baseline, metric=metric, protocols=protocols)
    said = sentences(found)
    write_document(json, {"sentences": said} | found.to_dict())
    terminal = console()
    columns = (
        "task",
        "protocol" if protocols else "model",
        "score",
        "95 %",
        "difference",
        "95 %",
        "p",
        "verdict",
        "detectable",
    )
    table = new_table(*columns)
    for name, task in zip(task_names(found), found.tasks, strict=True):
        by_name = {row.second: row for row in task.differences if row.first == found.reference(task)}
        title = f"{task.model}: {name}" if task.model else name
        for index, score in enumerate(task.scores):
            row, mean = by_name.get(score.name), score.mean
            cells = ["", "", "", "", ""]
            if row is not None:
                paired = row.paired
                ends = f"{written_difference(task, paired.low)} … {written_difference(task, paired.high)}"
                difference = written_difference(task, paired.mean)
                cells = [difference, ends, written_p(row.adjusted_p), judged(task, row), written(task, row.detectable)]
            unit = " %" if is_share(task) else ""
            interval = f"{written(task, mean.low)} … {written(task, mean.high)}"
            table.add_row("" if index else title, score.name, written(task, mean.value) + unit, interval, *cells)
        table.add_section()
    terminal.print(table)
    for sentence in said:
        terminal.print(sentence, highlight=False)
    for sentence in found.left_out:
        terminal.print(sentence, style="yellow", highlight=False)
    if report is not None:
        from experiments.evaluate.report import write_comparison_page

        with output(report):
            write_comparison_page(report, evaluations, found)
        terminal.print(f"{report}", highlight=False, soft_wrap=True)
