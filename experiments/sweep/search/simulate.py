"""Play a policy on losses that are known beforehand: what it would have done, and what that would have cost."""

from collections.abc import Callable, Sequence

from experiments.sweep.row import Policy, Row
from experiments.sweep.search.policies import hash_fraction
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
                rows[index] = Row(row.number, row.trial, "pruned", row.rungs, None, {})
            elif row.trial.id in decision.ready:
                rows[index] = _advanced(row, decision.ready[row.trial.id], loss)
        rows += [Row(len(rows) + i, trial, "planned", {}, None, {}) for i, trial in enumerate(decision.add)]


def _advanced(row: Row, step: int, loss: Callable[[Trial, int], float | None]) -> Row:
    value = loss(row.trial, step)
    if value is None:
        return Row(row.number, row.trial, "diverged", row.rungs, None, {})
    if step >= row.trial.setting.steps:
        return Row(row.number, row.trial, "finished", {**row.rungs, step: value}, (value,), {})
    return Row(row.number, row.trial, "planned", {**row.rungs, step: value}, None, {})


def tokens_used(row: Row) -> int:
    """Tokens that a trial has trained on: up to its last rung, from where it left its parent's run."""
    born = row.trial.parent[1] if row.trial.parent else 0
    return max(0, row.steps_done - born) * row.trial.setting.train_config.tokens_per_step


def expected_tokens(policy: Policy, trials: Sequence[Trial]) -> int:
    """Tokens of the whole sweep where no trial diverges and the order of the losses is by chance."""
    rows = play(policy, trials, lambda trial, step: hash_fraction(trial.id))
    return sum(map(tokens_used, rows))
