"""Compare settings at equal tokens: at each rung, those with a loss at it.

A setting that was stopped early has no loss at the end. It is compared at the last rung that it reached, with the
settings that were measured after the same number of tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from experiments.sweep.analysis.comparisons import best_of_many
from experiments.sweep.analysis.settings import MeasuredSetting, Setting, Stopped, Verdict, by_setting, pooled_noise

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SweepRung:
    """The losses of a sweep's trials after the same number of tokens."""

    tokens: int
    steps: int | list[int]
    """Updates; a list if batch sizes differ."""
    trials: int
    """The number of trials with a loss at this rung."""
    first: int
    """The number of them that are measured for the first time."""
    pruned: int
    """The number of them that were stopped here."""
    best: float
    """The lowest loss of a single trial."""
    settings: list[MeasuredSetting]
    noise: float | None
    noise_freedom: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return vars(self) | {"settings": [setting.to_dict() for setting in self.settings]}


@dataclass(frozen=True)
class Stretch:
    """A part of a run, with the setting that it was trained with."""

    steps: int
    """Updates up to which."""
    setting: dict[str, Any]


class Rungs:
    """A sweep's losses by tokens seen. Rungs of different batch sizes are equal within half a step."""

    def __init__(self, names: Sequence[str], rows: Rows):
        self._names, self._rows = list(names), [row for row in rows if row.get("rungs")]
        self._by_id = {row["id"]: row for row in rows if "id" in row}
        self._levels = _levels(self._rows)

    def table(self) -> list[SweepRung]:
        """Return every rung, from the first to the last."""
        table = []
        for level, tokens in enumerate(self._levels):
            here = [(row, found) for row in self._rows if (found := self._own_losses(row).get(level)) is not None]
            steps = sorted({_steps(row, tokens) for row, _ in here})
            settings = self.settings(level)
            noise, freedom = self._noise(settings)
            table.append(
                SweepRung(
                    tokens=tokens,
                    steps=steps[0] if len(steps) == 1 else steps,
                    trials=len(here),
                    first=sum(min(self._own_losses(row)) == level for row, _ in here),
                    pruned=sum(row["state"] == "pruned" and max(self._own_losses(row)) == level for row, _ in here),
                    best=min(loss for _, loss in here),
                    settings=settings,
                    noise=noise,
                    noise_freedom=freedom,
                )
            )
        return table

    def settings(self, level: int) -> list[MeasuredSetting]:
        """Return the settings with a loss at a rung."""
        found = []
        for key, members in by_setting(self._names, self._rows).items():
            losses = [loss for row in members if (loss := self._own_losses(row).get(level)) is not None]
            if losses:
                spread = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
                values = dict(zip(self._names, key[:-1], strict=True))
                found.append(MeasuredSetting(values, key[-1], float(np.mean(losses)), spread, len(losses)))
        return found

    def stopped(self, members: Rows, winning: Rows) -> Stopped | None:
        """Compare a setting that was stopped early with the winner, at the rung at which it was stopped.

        members, winning: the trials of both, winning empty if there is no winner. None if nothing of it was
        measured. The winner of a population is followed back through the runs that it left.
        """
        reached = [row for row in members if row["state"] == "pruned" and row.get("rungs")]
        if not reached:
            return None
        level = max(max(self._own_losses(row)) for row in reached)
        mine = [loss for row in members if row.get("rungs") and (loss := self._own_losses(row).get(level)) is not None]
        theirs = [loss for row in winning if (loss := self._losses_from_start(row).get(level)) is not None]
        mean, best = float(np.mean(mine)), float(np.mean(theirs)) if theirs else None
        return Stopped(
            steps=_steps(reached[0], self._levels[level]),
            tokens=self._levels[level],
            mean=mean,
            seeds=len(mine),
            winner_mean=best,
            verdict="not compared" if best is None else self._verdict(level, mean - best, len(mine), len(theirs)),
        )

    def _verdict(self, level: int, difference: float, mine: int, theirs: int) -> Verdict:
        settings = self.settings(level)
        noise, freedom = self._noise(settings)
        if noise is None:
            return "higher" if difference >= 0 else "lower"
        reach = best_of_many(max(1, len(settings) - 1), freedom) * noise * math.sqrt(1 / mine + 1 / theirs)
        return "equal" if abs(difference) <= reach else "worse" if difference > 0 else "better"

    def _noise(self, settings: Sequence[MeasuredSetting]) -> tuple[float | None, int]:
        return pooled_noise(settings, min(row.known_mean for row in settings))

    def _own_losses(self, row: Mapping[str, Any]) -> dict[int, float]:
        """Return losses by rung, for the steps that the trial trained itself."""
        return {_nearest(self._levels, _tokens(row, step)): loss for step, loss in row["rungs"].items()}

    def _losses_from_start(self, row: Mapping[str, Any] | None) -> dict[int, float]:
        """Return losses by rung from the start, including those before it branched off its parent."""
        found: dict[int, float] = {}
        limit = math.inf
        while row is not None:
            before = {_nearest(self._levels, _tokens(row, s)): x for s, x in row.get("rungs", {}).items() if s <= limit}
            found = before | found
            limit, row = row.get("parent_steps", 0), self._by_id.get(row.get("parent"))
        return found


def lineage(row: Mapping[str, Any], rows: Rows, names: Sequence[str]) -> list[Stretch]:
    """Return the settings that a member of a population was trained with, one after another."""
    by_id = {other["id"]: other for other in rows}
    found: list[Stretch] = []
    end, now = row["planned_steps"], row
    while True:
        found.insert(0, Stretch(end, {name: now[name] for name in names}))
        if now["parent"] is None:
            return found
        end, now = now["parent_steps"], by_id[now["parent"]]


def verdicts(settings: Iterable[Setting]) -> dict[Verdict, int]:
    """Count the verdicts on the settings that were stopped early, except those with a diverged run."""
    stopped = [row.stopped for row in settings if row.pruned and not row.lost]
    said = ["not compared" if found is None else found.verdict for found in stopped]
    return {verdict: said.count(verdict) for verdict in get_args(Verdict) if verdict in said}


def _tokens(row: Mapping[str, Any], steps: int) -> int:
    return steps * row["planned_tokens"] // row["planned_steps"]


def _steps(row: Mapping[str, Any], tokens: int) -> int:
    """Return the number of the trial's updates nearest to this number of tokens."""
    return round(tokens * row["planned_steps"] / row["planned_tokens"])


def _levels(rows: Rows) -> list[int]:
    """Return the tokens at each rung of the smallest batches; other rungs join the nearest within half a step.

    Rungs of one trial are never merged.
    """
    levels: list[tuple[int, float]] = []  # (tokens, tokens of a step)
    for row in sorted(rows, key=lambda row: row["planned_tokens"] / row["planned_steps"]):
        step = row["planned_tokens"] / row["planned_steps"]
        known = list(levels)
        for steps in row["rungs"]:
            tokens = _tokens(row, steps)
            near = min(known, key=lambda level: abs(level[0] - tokens), default=None)
            same = near is not None and (
                near[0] == tokens or (near[1] != step and abs(near[0] - tokens) <= (near[1] + step) / 2)
            )
            if not same:
                levels.append((tokens, step))
    return sorted({tokens for tokens, _ in levels})


def _nearest(levels: Sequence[int], tokens: int) -> int:
    return min(range(len(levels)), key=lambda level: abs(levels[level] - tokens))
