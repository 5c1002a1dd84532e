"""Replay successive halving on the recorded curves of a full sweep: its tokens, and whether it keeps the winner."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.sweep.search.policies import Halving, play, tokens_used
from experiments.sweep.search.recorded import Recorded
from experiments.sweep.trial import Trial
from model.errors import InputError
from train.run.metrics import read_metrics

NEAR = 0.1
"""A validation at most so far from a rung, relative to it, counts as the rung's."""


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
) -> dict[str, Any]:
    """Replay `--policy halving` on this sweep, with all seeds and with one seed per point.

    tokens_fraction: of the full sweep's. chosen: the point with the best mean among those trained to the end;
    within_noise: whether it is in the full sweep's best region, excess: by how much its mean over all seeds, in nats
    per token, is above the best. one_seed: over `replays` halvings, each with one random seed per point. rungs:
    "validation", or "training" if a training loss had to replace the validation loss of a rung. Raises InputError.
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
    return {
        "eta": eta,
        "min_fraction": min_fraction,
        "rungs": "validation" if exact else "training",
        **_halve(recorded, policy, curves),
        "one_seed": {
            "replays": replays,
            "tokens_fraction": float(np.median([one["tokens_fraction"] for one in once])),
            "within_noise": float(np.mean([one["within_noise"] for one in once])),
            "excess": [one["excess"] for one in once],
        },
    }


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


def _halve(recorded: Recorded, policy: Halving, curves: Sequence[RecordedRun]) -> dict[str, Any]:
    known = {curve.trial.id: curve for curve in curves}
    rows = play(policy, [curve.trial for curve in curves], lambda trial, step: known[trial.id].at(step))
    full = sum(row.trial.steps * row.trial.recipe.train.tokens_per_step for row in rows)
    ended: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row.state == "finished" and row.values:
            ended.setdefault(recorded.point_of(row.trial.point), []).append(row.values[0])
    result = {"tokens_fraction": sum(map(tokens_used, rows)) / full, "finished": len(ended)}
    if not ended:
        return result | {"chosen": None, "within_noise": False, "excess": None}
    chosen = min(ended, key=lambda point: math.fsum(ended[point]) / len(ended[point]))
    excess = recorded.mean(chosen) - recorded.mean(recorded.best)
    return result | {
        "chosen": recorded.named(chosen),
        "within_noise": chosen in recorded.best_region,
        "excess": excess if math.isfinite(excess) else None,
    }


def _is_validated(curve: RecordedRun, step: int) -> bool:
    end = curve.trial.steps
    return any(known < end and abs(known - step) <= NEAR * step for known in curve.validation)
