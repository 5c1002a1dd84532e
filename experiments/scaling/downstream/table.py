"""Read a table of benchmark results: one row per model and task, or one per model with a column per task and metric.

Of each run the last checkpoints are averaged; their deviation is the noise of a single checkpoint.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.scaling.downstream.chance import known_chance
from experiments.scaling.downstream.columns import DOWNSTREAM_ALIASES, PROXIES
from experiments.scaling.downstream.ensemble import TaskRuns
from experiments.scaling.rows.columns import find_column, require, truth
from experiments.scaling.rows.files import Record, column_names, read_records
from experiments.scaling.rows.numerals import read_numbers
from experiments.scaling.rows.table import HELD_OUT, DroppedRow
from experiments.words import counted
from model.errors import InputError, UnknownNameError

LAST = 5  # checkpoints of a run at most that are averaged
LAST_SHARE = 0.9  # of the run's tokens from where a checkpoint counts as one of the last
LEAST_FRACTION = 0.1  # a mean accuracy from here to 1, in a column in per cent, is taken for a fraction
SCORES = ("accuracy", "error_rate")
_COUNTS = ("params", "tokens", "questions")
_LEVELS = ("chance", "ceiling")
_FITTED = ("params", "tokens", "proxy", "accuracy")
_NUMBERS = (*_FITTED, "questions", *_LEVELS)
_TEXT = ("task", "run", "step", "recipe", "seed")
_WIDE = {
    "bits_per_byte": ("_bpb", "_bits_per_byte"),
    "accuracy": ("_len_norm", "_acc_norm", "_accuracy", "_acc"),
    "error_rate": ("_error_rate", "_error"),
}
"""Ends of column names in a table with a column per task and metric; the first that a task has is taken.

A slash, a dot or a space may stand before a metric, as in arc_easy/acc.
"""


class TaskKey(NamedTuple):
    """One task under one recipe of training; recipe is None in a table without recipes."""

    task: str
    recipe: str | None = None

    def __str__(self) -> str:
        return self.task if self.recipe is None else f"{self.task} ({self.recipe})"


@dataclass(frozen=True)
class TargetRun:
    """A run whose column `held_out` is true: a prediction is compared with it."""

    name: str
    params: float
    tokens: float
    bits_per_byte: float
    accuracy: float


@dataclass(frozen=True)
class Task:
    """The runs of one task, its chance level and ceiling, and the noise of its scores."""

    key: TaskKey
    runs: TaskRuns
    chance: float | None
    """None if neither the table nor `CHANCE` knows it."""
    ceiling: float
    questions: float | None
    checkpoint_noise: float | None
    """Standard deviation of the accuracy among the last checkpoints of a run; None without several of them."""
    checkpoints: int
    """How many rows were averaged."""
    targets: tuple[TargetRun, ...] = ()


@dataclass(frozen=True)
class DownstreamTable:
    """The tasks of a table, and what was left out or assumed in reading it."""

    tasks: dict[TaskKey, Task]
    unit: str
    """Of the quantity that the links start from, such as "bits per byte"."""
    dropped: list[DroppedRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Row(NamedTuple):
    row: int
    task: TaskKey
    run: tuple[str, ...]
    params: float
    tokens: float
    proxy: float
    accuracy: float
    questions: float
    chance: float
    ceiling: float
    held_out: bool


def read_downstream(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    chance: Mapping[str, float] | None = None,
    ceiling: Mapping[str, float] | None = None,
) -> DownstreamTable:
    """Read the results of a ladder of models; formats and spellings of numbers are those of `rows.table.read_table`.

    columns: by role (a key of `DOWNSTREAM_ALIASES`), the names that are not usual ones; chance, ceiling: by task, in
    place of the table's own. Raises `InputError` for a file that cannot be read, missing columns, accuracies outside
    0 … 1 (or 0 … 100), and rows that cannot be told apart.
    """
    path = Path(path)
    records = read_records(path)
    if not records:
        raise InputError(f"{path} has no rows")
    present = column_names(records)
    given = columns or {}
    for role in given:
        if role not in DOWNSTREAM_ALIASES:
            raise UnknownNameError("role of a column", role, DOWNSTREAM_ALIASES, guess=False)
    names = {role: _named(path, role, given.get(role), present) for role in DOWNSTREAM_ALIASES}
    notes = []
    if names["task"] is None:
        records, wide, without = _long(path, records, present)
        names |= dict.fromkeys((*PROXIES, *SCORES)) | wide
        of_tasks = {record["task"] for _, record in records}
        notes.append(f"the table has a column per task: {counted(len(of_tasks), 'task')}")
        if without:
            some = ", ".join(without[:5]) + (" …" if len(without) > 5 else "")
            notes.append(f"{counted(len(without), 'task')} left out, without bits per byte or without accuracy: {some}")
        present = column_names(records)
    required = [name or role for role, name in names.items() if role in ("params", "tokens", "task")]
    require(path, required, present)
    proxy = _only(path, names, given, PROXIES, "a loss of the gold answer, such as bits_per_byte")
    score = _only(path, names, given, SCORES, "an accuracy or error_rate")
    unused = {*PROXIES, *SCORES} - {proxy, score}
    named = {role: name for role, name in names.items() if name is not None and role not in unused}
    stand_ins = [f"{name!r} for {role}" for role, name in named.items() if name not in (role, given.get(role))]
    if stand_ins:
        notes.append(f"taking the column {', '.join(stand_ins)}")
    wanted = {role: names[role] for role in (*_COUNTS, *_LEVELS, proxy, score) if names[role]}
    numbers, read = read_numbers(path, records, {str(name): role in _COUNTS for role, name in wanted.items()})
    notes += read
    found = {role: np.array(numbers[str(name)]) for role, name in wanted.items()}
    of_rows = [record.get(names["task"] or "task") for _, record in records]
    _check_units(path, str(names[score]), found[score], of_rows, by_chance=score == "accuracy")
    found["accuracy"] = _fractions(path, str(names[score]), found[score], notes)
    if score == "error_rate":
        found["accuracy"] = 1 - found["accuracy"]
        notes.append(f"accuracy is taken as one minus the column {names[score]!r}")
    for level in _LEVELS:
        if level in found:
            found[level] = _fractions(path, str(names[level]), found[level], notes)
    unit, factor = PROXIES[proxy]
    found["proxy"] = found[proxy] * factor
    rows, dropped = _usable(path, records, names, found)
    if not rows:
        first = f"; row {dropped[0].row}: {dropped[0].reason}" if dropped else ""
        raise InputError(f"{path}: no row is left to fit{first}")
    tasks = _tasks(path, rows, chance or {}, ceiling or {})
    if earlier := len(rows) - sum(task.checkpoints for task in tasks.values()):
        run = f"by the column {names['run']!r}" if names["run"] else "by size and seed"
        notes.append(
            f"{counted(earlier, 'row')} of earlier checkpoints of their runs are not used; runs are told apart {run}, "
            "or by what --columns.run names"
        )
    return DownstreamTable(tasks, unit, dropped, notes)


def _named(path: Path, role: str, given: str | None, present: Sequence[str]) -> str | None:
    """Return the column of a role: the given one, or one of its usual names; None if none of those is present."""
    if given is not None:
        require(path, [given], present)
        return given
    found = find_column(path, role, role, present, DOWNSTREAM_ALIASES)
    return found if found in present else None


def _only(
    path: Path, names: Mapping[str, str | None], given: Mapping[str, str], roles: Iterable[str], what: str
) -> str:
    """Return the first of the roles whose column is given, else the first that the table has."""
    roles = sorted(roles, key=lambda role: role not in given)
    role = next((role for role in roles if names[role] is not None), None)
    if role is None:
        options = " or ".join(f"--columns.{role.replace('_', '-')}" for role in roles)
        raise InputError(f"{path} has no column with {what}; name it with {options}")
    return role


def _long(
    path: Path, records: list[Record], present: Sequence[str]
) -> tuple[list[Record], dict[str, str | None], list[str]]:
    """Return a table with a column per task and metric as one row per model and task.

    Also its new columns by role, and the tasks that lack one of the metrics.
    """
    by_task: dict[str, dict[str, str]] = {}
    for role, ends in _WIDE.items():
        for end in ends:
            for column in present:
                name = _task_and_metric(column)
                if name.lower().endswith(end) and len(name) > len(end):
                    by_task.setdefault(name[: -len(end)], {}).setdefault(role, column)
    score = next((role for role in SCORES if any(role in found for found in by_task.values())), "")
    tasks = {task: found for task, found in by_task.items() if "bits_per_byte" in found and score in found}
    if not tasks and by_task:
        named = ", ".join(repr(column) for found in list(by_task.values())[:3] for column in found.values())
        raise InputError(
            f"{path} has no column 'task', and no task with both bits per byte and an accuracy among {named}; write "
            "columns such as arc_easy_bpb and arc_easy_acc, or one row per model and task"
        )
    if not tasks:
        require(path, ["task"], present)
    metrics = {column for found in by_task.values() for column in found.values()}
    long = []
    for row, record in records:
        rest = {name: value for name, value in record.items() if name not in metrics}
        for task, found in tasks.items():
            cells = {"task": task, "bits_per_byte": record.get(found["bits_per_byte"]), score: record.get(found[score])}
            long.append((row, rest | cells))
    without = [task for task in by_task if task not in tasks]
    return long, {"task": "task", "bits_per_byte": "bits_per_byte", score: score}, without


def _task_and_metric(column: str) -> str:
    """Return arc_easy_acc for eval/arc_easy_acc, arc_easy/acc, arc_easy.acc and "arc_easy acc"."""
    name = re.sub(r"\s+", "_", column.strip())
    parts = re.fullmatch(r"(?:.*/)?([^/]+)[/.]([^/.]+)", name)
    if parts and any(f"_{parts[2].lower()}" in ends for ends in _WIDE.values()):
        return f"{parts[1]}_{parts[2]}"
    return name.rsplit("/", 1)[-1]


def _fractions(path: Path, name: str, values: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return accuracies as fractions; a column that exceeds 1 is in per cent."""
    known = values[np.isfinite(values)]
    if not len(known) or (known.min() >= 0 and known.max() <= 1):
        return values
    if known.min() < 0 or known.max() > 100:
        wrong = known.min() if known.min() < 0 else known.max()
        raise InputError(
            f"{path}: column {name!r} holds {wrong:g}, but an accuracy is from 0 to 1, or to 100 in per cent"
        )
    notes.append(f"column {name!r} is taken in per cent")
    return values / 100


def _check_units(path: Path, name: str, values: np.ndarray, tasks: Sequence[object], *, by_chance: bool) -> None:
    """Raise InputError if some numbers of a column are in per cent and others seem to be fractions.

    Those of a task that are all up to 1 seem to be; by_chance: so does any single one from 0.1 to 1, if guessing
    reaches 10 %.
    """
    by_task: dict[object, list[float]] = {}
    for task, value in zip(tasks, values.tolist(), strict=True):
        if math.isfinite(value):
            by_task.setdefault(task, []).append(value)
    highest = max((max(found) for found in by_task.values()), default=0.0)
    if highest <= 1:
        return
    for task, found in by_task.items():
        guessing = (known_chance(str(task)) or 0.0) if by_chance else 0.0
        fraction = max((value for value in found if value <= 1), default=0.0)
        all_fractions = max(found) <= 1 and np.mean(found) >= LEAST_FRACTION
        if all_fractions or (fraction >= LEAST_FRACTION and guessing >= LEAST_FRACTION):
            raise InputError(
                f"{path}: column {name!r} is in per cent, up to {highest:g}, but {fraction:g} of {task!r} seems to be "
                "a fraction; write all of it in one unit"
            )


def _usable(
    path: Path, records: Sequence[Record], names: Mapping[str, str | None], found: Mapping[str, np.ndarray]
) -> tuple[list[_Row], list[DroppedRow]]:
    """Return the rows with all numbers, without exact duplicates."""
    rows: list[_Row] = []
    dropped: list[DroppedRow] = []
    seen: dict[tuple[object, ...], int] = {}
    missing = np.full(len(records), math.nan)
    texts = [(role, name) for role in _TEXT if (name := names[role]) is not None]
    marks = [truth(path, row, HELD_OUT, record.get(HELD_OUT)) for row, record in records]
    for i, (row, record) in enumerate(records):
        cells = {role: record.get(name) for role, name in texts}
        text = {role: "" if cell is None else str(cell).strip() for role, cell in cells.items()}
        bad = [
            role
            for role in _FITTED
            if not math.isfinite(found[role][i]) or (role != "accuracy" and found[role][i] <= 0)
        ]
        if bad or not text["task"]:
            kind = "a number" if bad == ["accuracy"] else "a positive number"
            what = f"{bad[0]} is not {kind}" if bad else "it names no task"
            dropped.append(DroppedRow(row, what.replace("proxy", "the loss of the gold answer")))
            continue
        key = TaskKey(text["task"], text.get("recipe") or None)
        run = _run_of(text, float(found["params"][i]), float(found["tokens"][i]), row)
        numbers = {role: float(found.get(role, missing)[i]) for role in _NUMBERS}
        same = (key, *map(text.get, ("run", "step", "seed")), *map(numbers.get, _FITTED))
        if (first := seen.setdefault(same, row)) != row:
            dropped.append(DroppedRow(row, f"exact duplicate of row {first}"))
            continue
        rows.append(_Row(row=row, task=key, run=run, held_out=marks[i], **numbers))
    return rows, dropped


def _run_of(text: Mapping[str, str], params: float, tokens: float, row: int) -> tuple[str, ...]:
    """Return what identifies a run: its name, or its size and seed; without steps every row is a run."""
    seed = text.get("seed", "")
    if "run" in text:
        return text["run"], seed
    return (f"{params:g}", seed) if "step" in text else (f"{params:g}", seed, f"{tokens:g}", str(row))


def _tasks(
    path: Path, rows: Sequence[_Row], chance: Mapping[str, float], ceiling: Mapping[str, float]
) -> dict[TaskKey, Task]:
    names = {row.task.task for row in rows}
    for option, given in (("--chance", chance), ("--ceiling", ceiling)):
        for task in given:
            if task not in names:
                raise InputError(f"{option} {task}: the table has no such task, only {', '.join(sorted(names))}")
    by_task: dict[TaskKey, dict[tuple[str, ...], list[_Row]]] = {}
    for row in rows:
        by_task.setdefault(row.task, {}).setdefault(row.run, []).append(row)
    return {key: _task(path, key, runs, chance, ceiling) for key, runs in by_task.items()}


def _task(
    path: Path,
    key: TaskKey,
    by_run: Mapping[tuple[str, ...], Sequence[_Row]],
    chance: Mapping[str, float],
    ceiling: Mapping[str, float],
) -> Task:
    runs: list[list[float]] = []
    targets: list[TargetRun] = []
    deviations: list[tuple[int, float]] = []
    checkpoints = 0
    for run, rows in by_run.items():
        _check_run(path, key, run, rows)
        final = max(row.tokens for row in rows)
        last = sorted((row for row in rows if row.tokens >= LAST_SHARE * final), key=lambda row: row.tokens)[-LAST:]
        checkpoints += len(last)
        params, held_out = rows[0].params, any(row.held_out for row in rows)
        proxy, accuracy = (float(np.mean([getattr(row, name) for row in last])) for name in ("proxy", "accuracy"))
        if held_out:
            targets.append(TargetRun(run[0], params, final, proxy, accuracy))
            continue
        runs.append([params, final, proxy, accuracy])
        if len(last) > 1:
            deviations.append((len(last) - 1, float(np.var([row.accuracy for row in last], ddof=1))))
    noise = math.sqrt(sum(n * v for n, v in deviations) / sum(n for n, _ in deviations)) if deviations else None
    every = [row for rows in by_run.values() for row in rows]
    known = _one(path, key, "chance", chance, [row.chance for row in every])
    highest = _one(path, key, "ceiling", ceiling, [row.ceiling for row in every])
    counts = [row.questions for row in every if math.isfinite(row.questions)]
    return Task(
        key=key,
        runs=TaskRuns(*np.array(sorted(runs)).reshape(-1, 4).T),
        chance=known if known is not None else known_chance(key.task),
        ceiling=1.0 if highest is None else highest,
        questions=float(np.median(counts)) if counts else None,
        checkpoint_noise=noise,
        checkpoints=checkpoints,
        targets=tuple(sorted(targets, key=lambda target: (target.params, target.tokens))),
    )


def _check_run(path: Path, key: TaskKey, run: Sequence[str], rows: Sequence[_Row]) -> None:
    """Raise InputError for rows that cannot be checkpoints of one run."""
    label = f"{path}, task {str(key)!r}, run {' '.join(part for part in run if part)!r}"
    if len({row.params for row in rows}) > 1:
        sizes = sorted({row.params for row in rows})
        raise InputError(
            f"{label} has {len(sizes)} sizes, such as {sizes[0]:g} and {sizes[-1]:g} parameters; name the column that "
            "identifies a run with --columns.run, or families of models with --columns.recipe"
        )
    tokens = [row.tokens for row in rows]
    if len(set(tokens)) < len(tokens):
        twice = next(row for row in rows if tokens.count(row.tokens) > 1)
        raise InputError(
            f"{label} has several results at {twice.tokens:g} tokens, such as in row {twice.row}; name the columns "
            "that tell them apart with --columns.run, --columns.seed or --columns.recipe"
        )


def _one(path: Path, key: TaskKey, name: str, given: Mapping[str, float], values: Sequence[float]) -> float | None:
    """Return the given value of a task, else the one that it has in a column; None if it has none."""
    if key.task in given:
        return given[key.task]
    found = sorted({value for value in values if math.isfinite(value)})
    if len(found) > 1:
        raise InputError(
            f"{path}: task {str(key)!r} has several values of {name}, {found[0]:g} and {found[-1]:g}; give one with "
            f"--{name} {key.task}={found[0]:g}"
        )
    return found[0] if found else None
