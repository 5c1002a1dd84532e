"""Define the ledger's row of a trial, and the interface of policies."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from experiments.sweep.trial import Trial

State = Literal["planned", "running", "finished", "pruned", "diverged", "failed"]
ENDED: tuple[State, ...] = ("finished", "pruned", "diverged")
"""States in which a trial has its result; a failed one may be tried again."""


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One trial in the ledger.

    number: in the order in which trials were planned. rungs: validation losses by updates made, up to now. values:
    of the objectives, once it is finished. facts: what is known of its run (run, steps, tokens, flops_6nd, flops_exact,
    seconds, loss …); empty before it has run.
    """

    number: int
    trial: Trial
    state: State
    rungs: Mapping[int, float]
    values: tuple[float, ...] | None
    facts: Mapping[str, Any]

    @property
    def steps_done(self) -> int:
        """Updates up to its last rung."""
        return max(self.rungs, default=0)


@dataclasses.dataclass(frozen=True)
class Decision:
    """The next actions. ready: ids of planned trials that may continue, with the number of updates to train up to.

    prune: ids of planned trials that end now. add: new trials. A planned trial in none of them waits for others.
    """

    ready: Mapping[str, int]
    prune: tuple[str, ...] = ()
    add: tuple[Trial, ...] = ()


class Policy(Protocol):
    """Decides from the ledger alone and deterministically, so that any worker may call it at any time."""

    def decide(self, rows: Sequence[LedgerRow]) -> Decision:
        """Return what is to be done next. rows: all trials, by number."""
        ...

    def rungs(self, trial: Trial) -> tuple[int, ...]:
        """Return the numbers of updates at which a trial may be stopped or left, its end last."""
        ...


class RunAll:
    """Train all trials to their end; a branch waits for its parent, and is pruned if that diverged."""

    def decide(self, rows: Sequence[LedgerRow]) -> Decision:
        """Return as ready all trials that are planned and wait for no other."""
        states = {row.trial.id: row.state for row in rows}
        ready, prune = {}, []
        for row in rows:
            base_run = "finished" if row.trial.parent is None else states[row.trial.parent[0]]
            if row.state == "planned" and base_run in ("diverged", "pruned"):
                prune.append(row.trial.id)
            elif row.state == "planned" and base_run == "finished":
                ready[row.trial.id] = row.trial.steps
        return Decision(ready, tuple(prune))

    def rungs(self, trial: Trial) -> tuple[int, ...]:
        """Return the end of the trial alone."""
        return (trial.steps,)
