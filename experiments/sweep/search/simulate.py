"""Play a policy on losses that are known beforehand: what it would have done, and what that would have cost."""

import dataclasses
from collections.abc import Callable, Sequence

from experiments.sweep.row import Policy, Row
from experiments.sweep.trial import Trial


def play(policy: Policy, trials: Sequence[Trial], loss: Callable[[Trial, int], float | None]) -> list[Row]:
    """The rows of a sweep that has ended. loss: of a trial after so many updates; None: it has diverged by then."""
    rows = [Row(number, trial, "planned", {}, None, {}) for number, trial in enumerate(trials)]
    while True:
        decision = policy.decide(rows)
        if not (decision.ready or decision.prune or decision.add):
            return rows
        for index, row in enumerate(rows):
            if row.trial.id in decision.prune:
                rows[index] = dataclasses.replace(row, state="pruned")
            elif row.trial.id in decision.ready:
                rows[index] = _advanced(row, decision.ready[row.trial.id], loss)
        rows += [Row(len(rows) + i, trial, "planned", {}, None, {}) for i, trial in enumerate(decision.add)]


def _advanced(row: Row, step: int, loss: Callable[[Trial, int], float | None]) -> Row:
    value = loss(row.trial, step)
    if value is None:
        return dataclasses.replace(row, state="diverged")
    rungs = {**row.rungs, step: value}
    if step < row.trial.steps:
        return dataclasses.replace(row, rungs=rungs)
    return dataclasses.replace(row, state="finished", rungs=rungs, values=(value,))


def tokens_used(row: Row) -> int:
    """Tokens that a trial has trained on: up to its last rung, from where it left its parent's run."""
    born = row.trial.parent[1] if row.trial.parent else 0
    return max(0, row.steps_done - born) * row.trial.recipe.train.tokens_per_step
