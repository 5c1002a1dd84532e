"""Compare executions: axes that are fields of Execution change speed, and the loss by rounding only.

Trials that differ only in them train the same recipe. In comparisons of losses they count as one run with their mean
loss: counted as further seeds they would make the seed noise look small. In comparisons of speed they are separate.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from experiments.sweep.analysis.scales import text
from experiments.sweep.objectives import LOSS, TRAINING_SPEED
from experiments.sweep.row import State
from experiments.sweep.trial import Trial
from model import Execution
from model.execution import FIELDS

ROUNDING = 1e-4  # relative to the loss: float32 rounding stays below it, even if a run has amplified it for a while
UNEXPLAINED = 1e-2  # relative to the loss: rounding does not explain larger differences, however chaotic the run
_PRECEDENCE: tuple[State, ...] = ("diverged", "finished", "running", "planned", "pruned", "failed")
"""The state of one recipe under several executions: a divergence counts, and a result before one that is missing."""


@dataclass(frozen=True)
class ExecutionSpeed:
    """The trials of one execution, and their speed."""

    execution: dict[str, Any]
    trials: int
    finished: int
    tokens_per_second: float | None
    """The mean over the timed trials: those of the recipes that have a speed under all executions, or, where there are
    none, whatever this execution trained."""
    std: float | None
    """The standard deviation over the timed trials; None for fewer than two."""
    timed: int
    ratio: float | None
    """The mean speed over that of the fastest; None if no recipe was timed under all executions."""
    near: bool | None
    """True within two standard errors of the fastest; None if a spread is not known."""


@dataclass(frozen=True)
class ExecutionComparison:
    """The speed of every execution, and how far the losses of one recipe differ."""

    axes: dict[str, list[Any]]
    """The fields of Execution that vary, by the values tried."""
    executions: list[ExecutionSpeed]
    """Fastest first."""
    compared: int
    """The number of recipes that have a speed under all executions."""
    recipes: int
    """The number of recipes that finished under two executions or more."""
    difference: float | None
    """The largest between two losses of one recipe, in nats."""
    relative: float | None
    """The difference over that recipe's loss."""
    verdict: Literal["rounding", "noise", "open", "beyond"] | None
    """The verdict on the difference: see `compare_executions`."""
    limit: float | None
    """The difference from which on the verdict is "beyond"."""
    limit_by: str | None
    """The source of the limit."""
    split: int
    """The number of recipes that diverged under some executions and finished under others."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def execution_names(names: Iterable[str], trials: Iterable[Trial]) -> list[str]:
    """Return the varied fields that belong to Execution and do not change the recipes of these trials.

    With dropout or experts `accumulate` is part of the recipe, and so an axis like any other.
    """
    halved = Execution(accumulate=2)
    counts = any(trial.recipe.replace(former={}).under(halved).accumulate != 1 for trial in trials)
    return [name for name in names if name in FIELDS and not (name == "accumulate" and counts)]


def execution_value(trial: Trial, name: str) -> Any:
    """Return a field of a trial's execution as a table value: a mesh as its axes, such as data=2,fsdp=4."""
    value = getattr(trial.execution, name)
    return ",".join(f"{axis}={size}" for axis, size in value.items()) if isinstance(value, Mapping) else value


def execution_text(execution: Mapping[str, Any]) -> str:
    """Return an execution in one line, such as remat=dots, accumulate=2; an automatic choice is "auto"."""
    return ", ".join(f"{name}={'auto' if value is None else text(value)}" for name, value in execution.items())


def recipe_id(trial: Trial) -> str:
    """Return the id of a trial's recipe, independent of the execution and of the planning version."""
    return trial.recipe.replace(former={}).under(trial.execution).run_id


def group_trainings(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the indices of the rows that are one training under several executions, in order of appearance.

    They have the same recipe, planned steps, parent and decode benchmark. A row without `recipe` is a group of its own.
    """

    def belongs(row: Mapping[str, Any]) -> bool:
        return row.get("recipe") is not None and {"id", "planned_steps"} <= row.keys()

    by_id = {row["id"]: row for row in rows if belongs(row)}
    numbers: dict[Any, int] = {}
    known: dict[str, int] = {}

    def number(name: str) -> int:
        """Return the index of a row's training; a parent without a row gets a new one."""
        if name not in known:
            key: Any = name
            if name in by_id:
                row = by_id[name]
                parent = None if row.get("parent") is None else number(row["parent"])
                decode = tuple(value for field, value in row.items() if field.startswith("decode."))
                key = (row["recipe"], row["planned_steps"], parent, row.get("parent_steps"), decode)
            known[name] = numbers.setdefault(key, len(numbers))
        return known[name]

    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        key = number(row["id"]) if belongs(row) else ("alone", index)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def one_per_training(rows: Sequence[dict[str, Any]], objective: str = LOSS) -> list[dict[str, Any]]:
    """Return one row for all executions of a training, with the mean of their losses, at the end and at every rung.

    objective: another one that is averaged too.
    The other columns are those of the first row in the state that counts: diverged if any execution diverged, else
    finished if any finished.
    """
    groups = [[rows[index] for index in group] for group in group_trainings(rows)]
    if all(len(members) == 1 for members in groups):
        return list(rows)
    merged = [_merge(members, objective) for members in groups]
    names = {
        row["id"]: one["id"] for members, one in zip(groups, merged, strict=True) for row in members if "id" in row
    }
    return [row | {"parent": names.get(row["parent"], row["parent"])} if row.get("parent") else row for row in merged]


def _merge(members: Sequence[dict[str, Any]], objective: str) -> dict[str, Any]:
    first = min(members, key=lambda row: _PRECEDENCE.index(row["state"]))
    if len(members) == 1:
        return first
    ended = [row for row in members if row["state"] == "finished"] if first["state"] == "finished" else []
    merged = first | {
        name: float(np.mean(found)) if (found := [row[name] for row in ended if row[name] is not None]) else None
        for name in dict.fromkeys((LOSS, objective))
    }
    if "rungs" in first:
        steps = sorted({step for row in members for step in row["rungs"]})
        merged["rungs"] = {
            step: float(np.mean([row["rungs"][step] for row in members if step in row["rungs"]])) for step in steps
        }
        merged["last_loss"] = merged["loss"] if merged["loss"] is not None else first["last_loss"]
    return merged


def _mean_loss(members: Iterable[Mapping[str, Any]]) -> float:
    return float(np.mean([row["loss"] for row in members if row["state"] == "finished"]))


def with_shared_losses(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every row, the finished ones with the mean loss of their recipe under all executions.

    A recipe that diverged under any execution counts as diverged. So rounding does not rank rows.
    """
    found = list(rows)
    for group in group_trainings(rows):
        members = [rows[index] for index in group]
        ended = [index for index in group if rows[index]["state"] == "finished"]
        lost = any(row["state"] == "diverged" for row in members)
        for index in ended:
            found[index] = rows[index] | ({"state": "diverged"} if lost else {"loss": _mean_loss(members)})
    return found


def compare_executions(
    names: Sequence[str], rows: Sequence[dict[str, Any]], noise: float | None = None, freedom: int = 0
) -> ExecutionComparison | None:
    """Return the speed of every execution and how far the losses of one recipe differ; None if none varies.

    names: the fields of Execution that vary. noise, freedom: the seed noise of one run, if it is known. The verdict:

    - "rounding": below 1e-4 of the loss.
    - "noise": more than that, and within what other seeds change.
    - "open": more than that, and what other seeds change is not known without a second seed.
    - "beyond": above 1e-2 of the loss, or above the seed noise where that is known.
    """
    if not names:
        return None
    trainings = [[rows[index] for index in group] for group in group_trainings(rows)]
    listed, compared = _speeds(names, trainings)
    ended = [[row["loss"] for row in members if row["state"] == "finished"] for members in trainings]
    ended = [losses for losses in ended if len(losses) > 1]
    apart = max(ended, key=np.ptp, default=None)
    states = [{row["state"] for row in members} for members in trainings]
    found = ExecutionComparison(
        axes={name: list(dict.fromkeys(row[name] for row in rows)) for name in names},
        executions=listed,
        compared=compared,
        recipes=len(ended),
        difference=None,
        relative=None,
        verdict=None,
        limit=None,
        limit_by=None,
        split=sum({"diverged", "finished"} <= own for own in states),
    )
    if apart is None:
        return found
    difference, typical = float(np.ptp(apart)), abs(float(np.mean(apart)))
    limit, limit_by = UNEXPLAINED * typical, "1 % of the loss"
    if noise is not None:
        from experiments.sweep.analysis.comparisons import largest_of_many  # here, as it imports SciPy

        pairs = sum(math.comb(len(losses), 2) for losses in ended)
        reach = largest_of_many(pairs, freedom) * noise * math.sqrt(2)
        limit, limit_by = min((limit, limit_by), (reach, "the seed noise"))
    verdict: Literal["rounding", "noise", "open", "beyond"]
    if difference <= ROUNDING * typical:
        verdict = "rounding"
    elif difference > limit:
        verdict = "beyond"
    else:
        verdict = "open" if noise is None else "noise"
    return replace(
        found,
        difference=difference,
        relative=difference / typical if typical else 0.0,
        verdict=verdict,
        limit=limit,
        limit_by=limit_by,
    )


def _speeds(names: Sequence[str], trainings: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[ExecutionSpeed], int]:
    """Return the executions, fastest first, and how many recipes were timed under all of them."""
    found: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}
    for number, members in enumerate(trainings):
        for row in members:
            found.setdefault(tuple(row[name] for name in names), {}).setdefault(number, []).append(row)

    def speed(row: Mapping[str, Any]) -> Any:
        return row.get(TRAINING_SPEED)

    timed = {key: {number for number, members in own.items() if any(map(speed, members))} for key, own in found.items()}
    known = [numbers for numbers in timed.values() if numbers]
    shared = set.intersection(*known) if known else set()
    listed = []
    for key, own in found.items():
        members = list(itertools.chain.from_iterable(own.values()))
        counted = [row for number, rows in own.items() for row in rows if not shared or number in shared]
        speeds = [speed(row) for row in counted if speed(row)]
        listed.append(
            ExecutionSpeed(
                execution=dict(zip(names, key, strict=True)),
                trials=len(members),
                finished=sum(row["state"] == "finished" for row in members),
                tokens_per_second=float(np.mean(speeds)) if speeds else None,
                std=float(np.std(speeds, ddof=1)) if len(speeds) > 1 else None,
                timed=len(speeds),
                ratio=None,
                near=None,
            )
        )
    listed.sort(key=lambda row: -(row.tokens_per_second or 0.0))
    if len(known) > 1 and shared:
        listed = [_with_ratio(row, listed[0]) for row in listed]
    return listed, len(shared)


def _with_ratio(row: ExecutionSpeed, fastest: ExecutionSpeed) -> ExecutionSpeed:
    """Return a speed with its ratio to the fastest; one that is not known as it is."""
    if not row.tokens_per_second or not fastest.tokens_per_second:
        return row
    near = None
    if row.std is not None and fastest.std is not None:
        error = math.hypot(row.std / math.sqrt(row.timed), fastest.std / math.sqrt(fastest.timed))
        near = fastest.tokens_per_second - row.tokens_per_second <= 2 * error
    return replace(row, ratio=row.tokens_per_second / fastest.tokens_per_second, near=near)
