"""Replay successive halving on the recorded curves of a full sweep: its tokens, and whether it keeps the winner."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.sweep.search.policies import Halving, play, tokens_used
from experiments.sweep.search.recorded import Recorded
from experiments.sweep.trial import Trial
from model.errors import InputError
from train.run.metrics import read_metrics

NEAR = 0.1
"""A validation at most so far from a rung, relative to it, counts as the rung's."""


@dataclasses.dataclass(frozen=True)
class Halved:
    """One successive halving of a recorded sweep."""

    tokens_fraction: float
    """The share of the full sweep's tokens."""
    finished: int
    """The number of points that were trained to the end."""
    chosen: dict[str, Any] | None
    """The point of the best mean among those; None if there is none."""
    within_noise: bool
    """True if the chosen point is in the best region of the full sweep."""
    excess: float | None
    """The mean of the chosen point over all seeds less that of the best point, in nats per token."""


@dataclasses.dataclass(frozen=True)
class HalvedOnce:
    """Halvings that have one random seed of every point."""

    replays: int
    tokens_fraction: float
    """The median."""
    within_noise: float
    """The share of the replays."""
    excess: list[float | None]


@dataclasses.dataclass(frozen=True)
class HalvingReplay:
    """Successive halving of a recorded sweep: with all seeds, and with one seed a point."""

    eta: float
    min_fraction: float
    rungs: Literal["validation", "training"]
    """training: if a training loss had to replace the validation loss of a rung."""
    all_seeds: Halved
    one_seed: HalvedOnce

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        policy = {"eta": self.eta, "min_fraction": self.min_fraction, "rungs": self.rungs}
        return policy | dataclasses.asdict(self.all_seeds) | {"one_seed": dataclasses.asdict(self.one_seed)}


class RecordedRun(NamedTuple):
    """A recorded run. validation: losses by updates, including the end; training: one per step."""

    trial: Trial
    validation: dict[int, float]
    training: dict[int, float]

    def at(self, step: int) -> float | None:
        """Return the loss after `step` updates, by validation or else by the training loss of the last 10 %.

        None if the run had diverged by then.
        """
        end = self.trial.steps
        if step >= end:
            return self.validation.get(end)
        near = min(self.validation, key=lambda known: abs(known - step), default=None)
        if near is not None and near < end and abs(near - step) <= NEAR * step:
            return self.validation[near]
        before = [loss for known, loss in self.training.items() if 0.9 * step < known <= step or known == step]
        return math.fsum(before) / len(before) if before else None


def replay_halving(
    recorded: Recorded, curves: Sequence[RecordedRun], *, eta: float = 3, min_fraction: float = 1 / 9, replays: int = 20
) -> HalvingReplay:
    """Replay `--policy halving` on this sweep, with all seeds and with one seed per point.

    replays: of one seed a point. Raises InputError.
    """
    if not curves:
        raise InputError("successive halving is replayed on the learning curves of a sweep's folder, not on a table")
    full = max(curve.trial.steps * curve.trial.recipe.train.tokens_per_step for curve in curves)
    policy = Halving(full, eta, min_fraction)
    exact = all(_is_validated(curve, step) for curve in curves for step in policy.gates(curve.trial))
    points: dict[str, list[RecordedRun]] = {}
    for curve in curves:
        points.setdefault(curve.trial.point_key, []).append(curve)
    drawn = []
    for replay in range(replays):
        random = np.random.default_rng([replay, 2])
        drawn.append([members[random.integers(len(members))] for members in points.values()])
    once = [_halve(recorded, policy, some) for some in drawn]
    return HalvingReplay(
        eta=eta,
        min_fraction=min_fraction,
        rungs="validation" if exact else "training",
        all_seeds=_halve(recorded, policy, curves),
        one_seed=HalvedOnce(
            replays=replays,
            tokens_fraction=float(np.median([one.tokens_fraction for one in once])),
            within_noise=float(np.mean([one.within_noise for one in once])),
            excess=[one.excess for one in once],
        ),
    )


def read_curves(recorded: Recorded) -> list[RecordedRun]:
    """Return the curves of all runs of a sweep's folder; none of a table."""
    if recorded.folder is None:
        return []
    from experiments.sweep.record import Sweep
    from experiments.sweep.trials import plan_trials

    sweep = Sweep.read(recorded.folder)
    curves = []
    for trial in plan_trials(sweep):
        validation: dict[int, float] = {}
        training: dict[int, float] = {}
        for record in read_metrics(sweep.run_folder(trial)):
            for found, name in ((validation, "validation_loss"), (training, "loss")):
                if isinstance(record.get(name), (int, float)) and math.isfinite(record[name]):
                    found[record["step"]] = record[name]
        curves.append(RecordedRun(trial, validation, training))
    return curves


def _halve(recorded: Recorded, policy: Halving, curves: Sequence[RecordedRun]) -> Halved:
    known = {curve.trial.id: curve for curve in curves}
    rows = play(policy, [curve.trial for curve in curves], lambda trial, step: known[trial.id].at(step))
    full = sum(row.trial.steps * row.trial.recipe.train.tokens_per_step for row in rows)
    ended: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row.state == "finished" and row.values:
            ended.setdefault(recorded.point_of(row.trial.point), []).append(row.values[0])
    spent = sum(map(tokens_used, rows)) / full
    if not ended:
        return Halved(spent, 0, None, False, None)
    chosen = min(ended, key=lambda point: math.fsum(ended[point]) / len(ended[point]))
    excess = recorded.mean(chosen) - recorded.mean(recorded.best)
    return Halved(
        tokens_fraction=spent,
        finished=len(ended),
        chosen=recorded.named(chosen),
        within_noise=chosen in recorded.best_region,
        excess=excess if math.isfinite(excess) else None,
    )


def _is_validated(curve: RecordedRun, step: int) -> bool:
    end = curve.trial.steps
    return any(known < end and abs(known - step) <= NEAR * step for known in curve.validation)
