"""Read a fully run sweep as a table of losses, from which a search can be simulated without training."""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.sweep.analysis.executions import one_per_training
from experiments.sweep.analysis.results import BRANCH, CLAIM, FACTS, TRIAL, read_results
from experiments.sweep.analysis.scales import is_number
from experiments.sweep.analysis.settings import candidates_of, group, pooled_noise
from experiments.sweep.objectives import DIRECTIONS
from experiments.words import counted
from model.errors import InputError, UnknownNameError
from train.task_sets import is_task_metric

_RESULTS = {
    *TRIAL,
    *BRANCH,
    *FACTS,
    *CLAIM,
    *DIRECTIONS,
    "last_loss",
    "status",
    "data_seed",
    "seeds",
    "mean",
    "std",
    "lost",
}
"""Columns of a table of results, also of other programs, that are not axes."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The losses of every point of a grid. axes: name → values; losses: point (values in the axes' order) → one loss
    per seed, None if the run diverged. folder: of the sweep; None for a table.
    """

    axes: dict[str, list[Any]]
    losses: dict[tuple[Any, ...], list[float | None]]
    folder: Path | None = None

    def mean(self, point: tuple[Any, ...]) -> float:
        """Return the mean over the seeds, in nats per token; infinite if one diverged, so that the point cannot win."""
        losses = [math.inf if loss is None else loss for loss in self.losses[point]]
        return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf

    @property
    def best(self) -> tuple[Any, ...]:
        """The point of the smallest mean."""
        return min(self.losses, key=self.mean)

    @property
    def seed_noise(self) -> float:
        """Standard deviation of one run over seeds, pooled near the best as in the sweep's report; 0 with one seed."""
        rows = [
            self.named(point) | {"loss": loss, "state": "diverged" if loss is None else "finished"}
            for point, losses in self.losses.items()
            for loss in losses
        ]
        noise, _ = pooled_noise(candidates_of(group(list(self.axes), rows)), self.mean(self.best))
        return noise or 0.0

    @property
    def best_region(self) -> set[tuple[Any, ...]]:
        """The points whose mean is within one standard deviation of one run of the best mean."""
        limit = self.mean(self.best) + self.seed_noise
        return {point for point in self.losses if self.mean(point) <= limit}

    def named(self, point: tuple[Any, ...]) -> dict[str, Any]:
        """Return the point as a dict of the axes' names."""
        return dict(zip(self.axes, point, strict=True))

    def point_of(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the point in the order of the axes."""
        return tuple(_plain(values.get(name)) for name in self.axes)


def read_recorded(path: Path, axes: Sequence[str] = ()) -> Recorded:
    """Return the record of a sweep's folder, or of a table of its results (CSV, one run a row, with a column `loss`).

    axes: the columns that were varied; none: those that vary and are not results. Raises InputError if it is not a full
    grid, or a run did not finish.
    """
    if path.is_dir():
        return _read_folder(path, axes)
    return _read_table(path, axes)


def _read_folder(folder: Path, axes: Sequence[str]) -> Recorded:
    results = read_results(folder)
    if results.sampler != "all":
        raise InputError(f"{folder} was searched by {results.sampler}; a replay needs every point of a grid")
    left = sum(row["state"] not in ("finished", "diverged") for row in results.rows)
    if left:
        raise InputError(
            f"{left} of {counted(len(results.rows), 'trial')} of {folder} did not run to the "
            "end; a replay needs all of them, "
            "from a sweep with --policy all"
        )
    return dataclasses.replace(_grid(results.rows, axes or list(results.axes), str(folder)), folder=folder)


def _read_table(path: Path, axes: Sequence[str]) -> Recorded:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table of results: {error}") from None
    if not rows or "loss" not in rows[0]:
        raise InputError(f"{path} has no column 'loss' with results; give a sweep's folder or its results.csv")
    state = next((name for name in ("state", "status") if name in rows[0]), None)
    for row in rows:
        if state and row[state] not in ("finished", "diverged"):
            raise InputError(
                f"{path} has a run that is {row[state]}; a replay needs every point of a grid, run in full"
            )
        if not isinstance(row["loss"], (int, float)) or not math.isfinite(row["loss"]):
            row["loss"] = None
    return _grid(rows, axes, str(path))


def _grid(rows: list[dict[str, Any]], axes: Sequence[str], where: str) -> Recorded:
    if all("state" in row for row in rows):
        rows = one_per_training(rows)
    for name in axes:
        if name not in rows[0]:
            raise UnknownNameError(f"column of {where}", name, rows[0])
    rows = [{name: _plain(value) for name, value in row.items()} for row in rows]
    names = list(axes) or [
        name
        for name in rows[0]
        if name not in _RESULTS and not is_task_metric(name) and len({row.get(name) for row in rows}) > 1
    ]
    if not names:
        raise InputError(f"no column of {where} varies; name the axes with --axes")
    values: dict[str, list[Any]] = {}
    for name in names:
        found = list(dict.fromkeys(row.get(name) for row in rows))
        values[name] = sorted(found) if is_ordered(found) else found
    losses: dict[tuple[Any, ...], list[float | None]] = {}
    for row in rows:
        losses.setdefault(tuple(row.get(name) for name in names), []).append(row["loss"])
    whole = math.prod(map(len, values.values()))
    if len(losses) < whole:
        raise InputError(f"{where} has {len(losses)} of the {whole} points of its grid over {', '.join(names)}")
    if all(loss is None for point in losses.values() for loss in point):
        raise InputError(f"every run of {where} diverged: there is no best region to find")
    return Recorded(values, losses)


def is_ordered(values: Sequence[Any]) -> bool:
    """Return whether an axis is one of numbers, not of names."""
    return all(map(is_number, values))


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value


def _value(text: str | None) -> Any:
    if text in (None, ""):
        return None
    try:
        return json.loads(str(text))
    except ValueError:
        return text
