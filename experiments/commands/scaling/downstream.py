"""Implement `isoflop scaling downstream`: accuracies of larger models, predicted from a table of benchmark results."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.commands.options import JsonFile
from experiments.commands.scaling.options import Column

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.scaling.downstream.fit import Coverage, DownstreamFit, DownstreamPrediction

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK")]
Levels = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK=LEVEL")]


@dataclasses.dataclass(frozen=True)
class DownstreamOptions:
    """Names of the table's columns; by default columns are found by their usual names."""

    params: Column = "params"
    """Model sizes N, in parameters."""
    tokens: Column = "tokens"
    """Training tokens D, of the checkpoint where rows are checkpoints."""
    task: Column = "task"
    """The benchmark; without it the table has a column per task and metric, as arc_easy_bpb and arc_easy_acc."""
    bits_per_byte: Column = "bits_per_byte"
    """Bits per byte of the gold answer."""
    nats_per_byte: Column = "nats_per_byte"
    """Instead: nats per byte of the gold answer."""
    loss: Column = "loss"
    """Instead: nats per token of the gold answer."""
    accuracy: Column = "accuracy"
    """Accuracy as a fraction or in per cent."""
    error_rate: Column = "error_rate"
    """Instead: one minus the accuracy."""
    questions: Column = "questions"
    """The number of questions of the task."""
    chance: Column = "chance"
    """The accuracy that guessing reaches."""
    ceiling: Column = "ceiling"
    """The highest accuracy that is possible, by default 1."""
    run: Column = "run"
    """Name that all checkpoints of a run share."""
    step: Column = "step"
    """The step of a checkpoint."""
    recipe: Column = "recipe"
    """Name of a family of models, such as their training data; each family is fitted separately."""
    seed: Column = "seed"
    """The seed of a run."""

    def given(self) -> dict[str, str]:
        """Return the columns that are named, by role."""
        return {role: name for role, name in dataclasses.asdict(self).items() if name != role}


BY_NAME = DownstreamOptions()
"""Every column by its usual name."""
Columns = Annotated[DownstreamOptions, tyro.conf.arg(name="columns")]


def downstream(
    table: tyro.conf.Positional[Path],
    *,
    params: float | None = None,
    tokens: float | None = None,
    tasks: Names = (),
    chance: Levels = (),
    ceiling: Levels = (),
    widest: float = 20.0,
    bootstraps: int = 100,
    seed: int = 0,
    columns: Columns = BY_NAME,
    json: JsonFile = None,
    report: File = None,
) -> None:
    """Predict benchmarks of a larger model from a ladder of smaller ones, with intervals and refusals.

    Two steps, fitted to each task: bits per byte of the gold answer as a law of N and D, and accuracy as a function of
    those bits. Several forms of each step are fitted to resampled runs, weighted by how well they predict the larger
    sizes of the table from its smaller ones. A task without signal, and an interval too wide to be useful, is refused
    with the reason.

    Rows whose column `held_out` is true are not fitted but predicted: the share refused, the share of measured
    accuracies inside their intervals and the mean width are printed in one row. Exit code 0 if any task was fitted,
    else 2.

    Example: isoflop scaling downstream results.csv --params 7e9 --tokens 4e12 --report page.html

    Args:
        table: Results, one row per model (or checkpoint) and task: .csv, .tsv, .jsonl or .parquet.
        params: N of a planned run; give tokens too.
        tokens: D of a planned run.
        tasks: Only these tasks.
        chance: Accuracy of guessing, in place of the table's or of what the task's name says, as mytask=0.25.
        ceiling: The highest accuracy that is possible, by default 1, as mytask=0.95.
        widest: Points of accuracy above which the width of an interval is refused.
        bootstraps: Resamples behind the intervals.
        seed: Of the resamples.
        columns: Which column of the table is which.
        json: Write every number to this file.
        report: Write a page with figures to this file (.html), which works offline.
    """
    from experiments.commands.options import console, output, write_document
    from experiments.scaling.downstream.fit import fit_downstream
    from experiments.scaling.downstream.table import read_downstream
    from experiments.words import counted
    from model.errors import InputError, check_number
    from train.progress import progress_bar

    if (params is None) != (tokens is None):
        raise InputError("a planned run takes both --params and --tokens")
    check_number("--widest", widest, above=0, most=100, hint="it is in points of accuracy")
    results = read_downstream(
        table, columns.given(), chance=_levels("--chance", chance), ceiling=_levels("--ceiling", ceiling)
    )
    for note in results.notes:
        print(f"{table}: {note}", file=sys.stderr)
    if results.dropped:
        first = results.dropped[0]
        left_out = counted(len(results.dropped), "result")
        print(f"{table}: {left_out} left out, the first in row {first.row}: {first.reason}", file=sys.stderr)
    chosen = [task for key, task in results.tasks.items() if not tasks or key.task in tasks]
    if params is None and chosen and not any(task.targets for task in chosen):
        raise InputError("there is no run to predict: give --params with --tokens, or mark rows in a column held_out")
    with progress_bar("fit", max(len(chosen), 1)) as advance:
        fit = fit_downstream(
            results, tasks=tasks, bootstraps=bootstraps, seed=seed, widest=widest / 100, advance=advance
        )
    predictions = fit.predict_targets()
    if params is not None and tokens is not None:
        predictions += [fit.predict(params, tokens, *key) for key in fit.table.tasks]
    write_document(json, fit.document(predictions))
    _show(console(), fit, predictions)
    if report is not None:
        from experiments.scaling.downstream.report import write_downstream_page

        with output(report):
            write_downstream_page(report, fit, predictions, table.resolve().name)
        print(report)
    if not fit.fits:
        raise InputError(f"{table}: every task was refused, the reasons are above")


def _levels(option: str, words: Sequence[str]) -> dict[str, float]:
    """Return {task: level} of words such as hellaswag=0.25."""
    from model.errors import InputError, check_number

    found = {}
    for word in words:
        task, equals, level = word.rpartition("=")
        try:
            found[task] = float(level)
        except ValueError:
            equals = ""
        if not equals or not task:
            raise InputError(f"{option} {word}: write a task and a fraction, as hellaswag=0.25")
        check_number(f"{option} {task}", found[task], least=0, most=1)
    return found


def _show(console: "Console", fit: "DownstreamFit", predictions: "Sequence[DownstreamPrediction]") -> None:
    from experiments.commands.options import new_table
    from experiments.scaling.downstream.fit import coverage
    from experiments.words import count_in_words

    measured = [prediction for prediction in predictions if prediction.target is not None]
    names = ["task", "N", "D", "accuracy %", "95 %", *(["measured", "error"] if measured else []), fit.unit, "verdict"]
    shown = new_table(*names)
    shown.columns[-1].justify, shown.columns[-1].no_wrap = "left", False
    for prediction in predictions:
        row = [
            prediction.name,
            count_in_words(prediction.params),
            count_in_words(prediction.tokens),
            _points(prediction.value),
        ]
        row.append("–" if prediction.width is None else f"{_points(prediction.low)} … {_points(prediction.high)}")
        if measured:
            target = prediction.target
            known = None if target is None else target.accuracy
            row.append(_points(known))
            row.append("–" if known is None or prediction.value is None else f"{100 * (prediction.value - known):+.1f}")
        row.append("–" if prediction.bits_per_byte is None else f"{prediction.bits_per_byte:.3f}")
        row.append(_verdict(prediction))
        shown.add_row(*row)
    summary = new_table("coverage", "pairs", "refused", "inside of the rest", "mean width", "mean error")
    if measured:
        summary.add_row("held-out runs", *_cells(coverage(measured)))
    summary.add_row("larger sizes of the table from its smaller ones", *_cells(fit.held_out_coverage))
    console.print(shown)
    console.print()
    console.print(summary)


def _verdict(prediction: "DownstreamPrediction") -> str:
    if prediction.refused is not None:
        return f"refused: {prediction.refused}"
    return {None: "predicted", True: "inside", False: "outside"}[prediction.inside]


def _cells(found: "Coverage") -> list[str]:
    inside = "–" if not found.answered else f"{100 * found.inside / found.answered:.0f} %"
    refused = "–" if not found.pairs else f"{100 * found.refused / found.pairs:.0f} %"
    return [str(found.pairs), refused, inside, _points(found.mean_width), _points(found.mean_error)]


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
