"""Define early stopping: which trials of a sweep continue, decided at rungs of equal tokens."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from experiments.sweep.row import Decision, LedgerRow, Policy, RunAll
from experiments.sweep.trial import Trial
from model.errors import InputError, UnknownNameError, check_number

if TYPE_CHECKING:
    from experiments.sweep.record import Sweep

POLICIES = ("all", "halving", "hyperband", "population")
STEADY = ("constant", "inverse_sqrt")
"""Schedules whose rate at a step does not depend on where the run ends."""


def make_policy(sweep: "Sweep") -> Policy:
    """Return the policy that a sweep names, with its settings.

    Raises UnknownNameError on a policy or a setting that does not exist, InputError on a setting out of range.
    """
    from experiments.sweep.search.evolve import Population

    if sweep.policy not in POLICIES:
        raise UnknownNameError("policy", sweep.policy, POLICIES)
    searched = sweep.sampler != "all"
    if sweep.policy == "population" and searched:
        raise InputError(
            f"--policy population searches by itself and --sampler {sweep.sampler} would too; leave the sampler out, "
            "and give the first members as values, or by random(space, count) in a space file"
        )
    tokens = sweep.base.steps * sweep.base.recipe.train.tokens_per_step
    build, known, fixed = {
        "all": (RunAll, (), {}),
        "halving": (Halving, _SETTINGS, {"full_tokens": tokens, "waits": not searched}),
        "hyperband": (Hyperband, _SETTINGS, {"full_tokens": tokens, "waits": not searched}),
        "population": (Population, ("interval_fraction", "quantile", "resample"), {"seed": sweep.sampler_seed}),
    }[sweep.policy]
    for name in sweep.policy_settings:
        if name not in known:
            if not known:
                raise InputError(f"the policy {sweep.policy!r} has no settings; {name}={sweep.policy_settings[name]!r}")
            raise UnknownNameError(f"setting of the policy {sweep.policy!r}", name, known)
    return build(**fixed, **sweep.policy_settings)


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016; Li et al. 2018, section 3) on tokens seen.

    Rungs are at min_fraction · eta^k of full_tokens (of the trial's own tokens if its schedule has a horizon, or
    full_tokens is 0), so trials of different batch size meet at the same tokens. Points are ranked at a rung: the
    replicates of one point continue or stop together, by the mean over their seeds, so that the winner keeps its noise.
    A point with a diverged or failed replicate ranks behind all others; ties are broken by the hash of the point. Of n
    points that have ever reached a rung, or diverged before it, the best ⌈n/eta⌉ continue and the others are pruned.

    waits: decide the rung once every point on its way to it has reported; otherwise (for points that a sampler draws
    over time) decide on each as it arrives, against those that arrived before (Li et al. 2020, without waiting for a
    later promotion). The ledger is final: a pruned point stays pruned, with seeds that are added later; a point that
    has continued is not stopped; points that are added later are ranked among all that have reached the rung.
    """

    full_tokens: int
    eta: float = 3
    min_fraction: float = 1 / 9
    waits: bool = True

    def __post_init__(self) -> None:
        check_number("eta", self.eta, above=1)
        check_number("min_fraction", self.min_fraction, above=0, below=1)

    def gates(self, trial: Trial) -> tuple[int, ...]:
        """Return the numbers of updates at the trial's rungs before its end."""
        per_step = trial.recipe.train.tokens_per_step
        own = trial.steps * per_step
        full = self.full_tokens if _steady(trial) and self.full_tokens else own
        levels = (full * self.min_fraction * self.eta**k for k in itertools.count())
        before = itertools.takewhile(lambda tokens: tokens < own * (1 - 1e-9), levels)
        return tuple(min(max(1, round(tokens / per_step)), trial.steps) for tokens in before)

    def rungs(self, trial: Trial) -> tuple[int, ...]:
        """Return the numbers of updates at which the trial may be pruned, and its end."""
        return tuple(sorted({*self.gates(trial), trial.steps}))

    def decide(self, rows: Sequence[LedgerRow]) -> Decision:
        """Decide at each rung. Raises InputError if losses at equal tokens do not predict the final order."""
        check_comparable([row.trial for row in rows], self.full_tokens)
        points = [_Point(members, self.gates(members[0].trial)) for members in by_point(rows).values()]
        allowed = self._allowed(points)
        ready, prune = {}, []
        for point in points:
            for row in point.rows:
                if row.state != "planned":
                    continue
                if point.pruned or allowed[point.key] is None:
                    prune.append(row)
                elif (until := point.target(row, allowed[point.key] or 0)) is not None:
                    ready[row.trial.id] = until
        return Decision(ready, tuple(row.trial.id for row in prune))

    def _allowed(self, points: "list[_Point]") -> "dict[str, int | None]":
        """Return by point the number of rungs that it may pass; None: prune it."""
        allowed: dict[str, int | None] = {point.key: 0 for point in points}
        pool, unsettled = points, False
        for level in range(max((len(point.gates) for point in points), default=0)):
            pool = [point for point in pool if level < len(point.gates)]
            arrived = [point for point in pool if point.arrived(level)]
            ranked = sorted(arrived, key=lambda point: point.score(level))
            best = {point.key for point in ranked[: math.ceil(len(ranked) / self.eta)]}
            unsettled |= self.waits and any(not point.arrived(level) and not point.absent(level) for point in pool)
            going = []
            for point in pool:
                if point.passed(level) or (point.key in best and not point.pruned and not unsettled):
                    allowed[point.key] = level + 1
                    going.append(point)
                elif point.arrived(level) and not unsettled:
                    allowed[point.key] = None
            pool = going
        return allowed


@dataclasses.dataclass(frozen=True)
class Hyperband:
    """Hyperband (Li et al. 2018): brackets of successive halving that start at eta^s times the first rung.

    A hash of the point chooses its bracket, with the paper's shares (proportional to eta^rungs / (rungs + 1), so that
    every bracket costs about the same); the last bracket stops no trial.
    """

    full_tokens: int
    eta: float = 3
    min_fraction: float = 1 / 9
    waits: bool = True

    def __post_init__(self) -> None:
        self._brackets()

    def rungs(self, trial: Trial) -> tuple[int, ...]:
        """Return the numbers of updates at which the trial may be pruned, and its end."""
        return self._brackets()[self.bracket(trial)].rungs(trial)

    def decide(self, rows: Sequence[LedgerRow]) -> Decision:
        """Decide in every bracket separately. Raises InputError if the trials are not comparable."""
        check_comparable([row.trial for row in rows], self.full_tokens)
        brackets = self._brackets()
        members: list[list[LedgerRow]] = [[] for _ in brackets]
        for row in rows:
            members[self.bracket(row.trial)].append(row)
        decisions = [bracket.decide(part) for bracket, part in zip(brackets, members, strict=True)]
        ready = {name: until for decision in decisions for name, until in decision.ready.items()}
        return Decision(ready, tuple(name for decision in decisions for name in decision.prune))

    def bracket(self, trial: Trial) -> int:
        """Return the index of the trial's bracket; bracket 0 starts at min_fraction."""
        count = len(self._brackets())
        shares = [self.eta**rungs / (rungs + 1) for rungs in range(count - 1, -1, -1)]
        place = hash_fraction(trial.point_key) * sum(shares)
        reached = itertools.accumulate(shares)
        return next((index for index, limit in enumerate(reached) if place < limit), count - 1)

    def _brackets(self) -> list[Policy]:
        first = Halving(self.full_tokens, self.eta, self.min_fraction, self.waits)
        count = math.ceil(-math.log(self.min_fraction) / math.log(self.eta) - 1e-9)
        later = [dataclasses.replace(first, min_fraction=self.min_fraction * self.eta**s) for s in range(1, count)]
        return [first, *later, RunAll()]


class _Point:
    """The replicates of one point, for the decision at rungs."""

    def __init__(self, rows: list[LedgerRow], gates: tuple[int, ...]):
        self.rows, self.gates = rows, gates
        self.key = rows[0].trial.point_key
        self.pruned = any(row.state == "pruned" for row in rows)

    def arrived(self, level: int) -> bool:
        """Return whether it is ranked at the rung: no replicate is still on its way, and at least one has a loss."""
        if not self.pruned and not all(self._here(row, level) or self._beyond(row, level) for row in self.rows):
            return False
        return any(self._loss(row, level) is not None or _lost(row) for row in self.rows)

    def absent(self, level: int) -> bool:
        """Return whether the rung need not wait for it: it was pruned before, or passed without a loss."""
        return self.pruned or self.passed(level)

    def passed(self, level: int) -> bool:
        """Return whether a replicate has already passed the rung."""
        return any(self._beyond(row, level) for row in self.rows)

    def score(self, level: int) -> tuple[bool, float, str]:
        """Return the key by which trials are ranked; smaller is better."""
        losses = [self._loss(row, level) for row in self.rows]
        found = sorted(loss for loss in losses if loss is not None and math.isfinite(loss))
        lost = any(loss is None and _lost(row) for loss, row in zip(losses, self.rows, strict=True))
        lost |= any(loss is not None and not math.isfinite(loss) for loss in losses)
        mean = math.fsum(found) / len(found) if found else math.inf
        return lost, mean, hashlib.sha256(self.key.encode()).hexdigest()

    def target(self, row: LedgerRow, allowed: int) -> int | None:
        """Return the update up to which a planned replicate may train; None: it waits."""
        end = row.trial.steps
        goals = (*self.gates, end)[: allowed + 1]
        later = [goal for goal in goals if goal > row.steps_done]
        if later:
            return later[0]
        return end if allowed == len(self.gates) else None

    def _loss(self, row: LedgerRow, level: int) -> float | None:
        return row.rungs.get(self.gates[level])

    def _here(self, row: LedgerRow, level: int) -> bool:
        return self._loss(row, level) is not None or _lost(row)

    def _beyond(self, row: LedgerRow, level: int) -> bool:
        # A trial that is running at its rung has not passed it: it may just not have been planned again yet.
        return row.state == "finished" or row.steps_done > self.gates[level]


def by_point(rows: Iterable[LedgerRow]) -> dict[str, list[LedgerRow]]:
    """Return the replicates of every point, in an order that does not depend on that of the rows."""
    points: dict[str, list[LedgerRow]] = {}
    for row in sorted(rows, key=lambda row: row.trial.id):
        points.setdefault(row.trial.point_key, []).append(row)
    return points


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that is a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def check_comparable(trials: Sequence[Trial], full_tokens: int) -> None:
    """Raise InputError if losses at equal tokens do not predict the final order of the trials.

    A schedule that decays towards the trial's end makes a shorter trial look better at the same tokens; so the horizons
    must agree (to a batch), or the rates must not depend on them. full_tokens: 0 where the sweep has no length.
    """
    per_step = [trial.recipe.train.tokens_per_step for trial in trials]
    ends = [trial.steps * tokens for trial, tokens in zip(trials, per_step, strict=True)]
    if not trials or max(ends) - min(ends) <= max(per_step):
        return
    between = f"trials that end after {min(ends):,} to {max(ends):,} tokens"
    if not all(map(_steady, trials)):
        schedules = {trial.recipe.train.schedule for trial in trials if not _steady(trial)}
        raise InputError(
            f"{between} with schedule={','.join(sorted(schedules))} cannot be compared at rungs in between; give all "
            "the same number of tokens, or schedule=constant, or --policy all"
        )
    if not full_tokens:
        raise InputError(f"{between} have no common rungs; give --steps: rungs are at fractions of it")


def _steady(trial: Trial) -> bool:
    train_config = trial.recipe.train
    return train_config.schedule in STEADY and not train_config.phases


def _lost(row: LedgerRow) -> bool:
    return row.state in ("diverged", "failed")


_SETTINGS = ("eta", "min_fraction")


def play(policy: Policy, trials: Sequence[Trial], loss: Callable[[Trial, int], float | None]) -> list[LedgerRow]:
    """Simulate a policy on known losses, and return the rows of the finished sweep.

    loss: returns the loss of a trial after a number of updates; None: it has diverged by then.
    """
    rows = [LedgerRow(number, trial, "planned", {}, None, {}) for number, trial in enumerate(trials)]
    while True:
        decision = policy.decide(rows)
        if not (decision.ready or decision.prune or decision.add):
            return rows
        for index, row in enumerate(rows):
            if row.trial.id in decision.prune:
                rows[index] = dataclasses.replace(row, state="pruned")
            elif row.trial.id in decision.ready:
                rows[index] = _advanced(row, decision.ready[row.trial.id], loss)
        rows += [LedgerRow(len(rows) + i, trial, "planned", {}, None, {}) for i, trial in enumerate(decision.add)]


def _advanced(row: LedgerRow, step: int, loss: Callable[[Trial, int], float | None]) -> LedgerRow:
    value = loss(row.trial, step)
    if value is None:
        return dataclasses.replace(row, state="diverged")
    rungs = {**row.rungs, step: value}
    if step < row.trial.steps:
        return dataclasses.replace(row, rungs=rungs)
    return dataclasses.replace(row, state="finished", rungs=rungs, values=(value,))


def tokens_used(row: LedgerRow) -> int:
    """Return the tokens that a trial has trained on: up to its last rung, without those of its parent's run."""
    born = row.trial.parent[1] if row.trial.parent else 0
    return max(0, row.steps_done - born) * row.trial.recipe.train.tokens_per_step
