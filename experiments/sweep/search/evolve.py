"""Population-based training: the worst members leave, and perturbed copies of the best take their places."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.sweep.row import Decision, LedgerRow
from experiments.sweep.trial import Trial
from model.errors import InputError, check_number
from train import HParams

NOT_PERTURBED = ("seed", "data_seed", "total_steps", "warmup_steps", "warmup_fraction", "decay_steps", "init_scale")
"""Hyperparameters that do not act at each step: they name a run, plan its horizon, or act before its first step."""
NEAR_ONE = ("beta1", "beta2")
"""Fields of which 1 − value is scaled: its inverse is the number of steps that they average over."""


@dataclasses.dataclass(frozen=True)
class Population:
    """Population-based training (Jaderberg et al. 2017, section 4) with truncation selection.

    All trials of one static shape are a population; with a shape axis there are several, each evolving separately.
    Every `interval_fraction` of the steps, once all its members have reported or failed, the worst `quantile` (rounded
    up, at least the failed ones, at most as many as there are others) is pruned. Each is replaced by a child of a
    random one of the best `quantile`: a trial that branches off its parent's run after that update, with the swept
    hyperparameters times 0.8 or 1.25, or, with probability `resample`, as some member had it at the start, and with a
    new seed. A member that is added after a generation joins at the next one.

    All random choices are drawn from a hash of (seed, shape, generation, place), so an interrupted decision is repeated
    identically. For that, pruned trials must be in the ledger before new ones.
    """

    interval_fraction: float = 0.1
    quantile: float = 0.2
    resample: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("interval_fraction", self.interval_fraction, above=0, most=1)
        check_number("quantile", self.quantile, above=0, most=0.5)
        check_number("resample", self.resample, least=0, most=1)

    def generations(self, steps: int) -> tuple[int, ...]:
        """Return the updates after which members are exchanged, in a run of `steps` updates."""
        interval = max(1, round(steps * self.interval_fraction))
        return tuple(range(interval, steps, interval))

    def rungs(self, trial: Trial) -> tuple[int, ...]:
        """Return the exchanges after the trial branched off, and its end."""
        steps, born = trial.steps, trial.parent[1] if trial.parent else 0
        return (*(step for step in self.generations(steps) if step > born), steps)

    def decide(self, rows: Sequence[LedgerRow]) -> Decision:
        """Decide at each generation. Raises InputError if members of one population differ in their number of steps."""
        populations: dict[str, list[LedgerRow]] = {}
        for row in sorted(rows, key=lambda row: row.trial.id):
            populations.setdefault(row.trial.shape, []).append(row)
        ready: dict[str, int] = {}
        prune: list[str] = []
        add: list[Trial] = []
        for shape, members in populations.items():
            self._decide_one(shape, members, ready, prune, add)
        return Decision(ready, tuple(prune), tuple(add))

    def _decide_one(
        self, shape: str, rows: list[LedgerRow], ready: dict[str, int], prune: list[str], add: list[Trial]
    ) -> None:
        steps = {row.trial.steps for row in rows}
        if len(steps) > 1:
            raise InputError(
                f"members of one population must make the same number of steps, not {min(steps)} to {max(steps)}"
            )
        end = steps.pop()
        start = [row for row in rows if row.trial.parent is None]
        members = start
        for generation, step in enumerate(self.generations(end)):
            children = [row for row in rows if row.trial.parent is not None and row.trial.parent[1] == step]
            arrived = [row for row in members if step in row.rungs or _lost(row)]
            going = [row for row in members if row not in arrived]
            for row in going:
                if row.state == "planned":
                    ready.setdefault(row.trial.id, step)
            if going and not children:
                return  # the others wait here
            ranked = sorted(arrived, key=lambda row: _score(row, step))
            if children:  # this generation is complete: members that arrive now are too late for it
                leaving = [row for row in ranked if row.steps_done <= step and _lost(row)]
            else:
                leaving = ranked[len(ranked) - self._exchanged(ranked, step) :]
                prune += [row.trial.id for row in leaving if row.state == "planned"]
            missing = len(leaving) - len(children)
            if missing > 0:
                planned = self._children(shape, generation, step, ranked, len(leaving), start)
                known = {row.trial.id for row in rows}
                new = [child for child in planned if child.id not in known][:missing]
                add += new
                if new:
                    return  # they take part in the next generation
            members = [row for row in ranked if row not in leaving] + going + children
        for row in members:
            if row.state == "planned":
                ready.setdefault(row.trial.id, end)

    def _exchanged(self, ranked: list[LedgerRow], step: int) -> int:
        lost = sum(not math.isfinite(_loss(row, step)) for row in ranked)
        return min(max(lost, math.ceil(self.quantile * len(ranked))), len(ranked) - 1 if lost < len(ranked) else 0)

    def _children(
        self, shape: str, generation: int, step: int, ranked: list[LedgerRow], count: int, start: list[LedgerRow]
    ) -> list[Trial]:
        best = ranked[: max(1, min(len(ranked) - count, math.ceil(self.quantile * len(ranked))))]
        children = []
        for place in range(count):
            random = _generator([self.seed, shape, generation, place])
            children.append(self._child(best[random.integers(len(best))].trial, step, start, random))
        return children

    def _child(self, parent: Trial, step: int, start: list[LedgerRow], random: np.random.Generator) -> Trial:
        changes: dict[str, Any] = {"seed": int(random.integers(2**31))}
        hparams = parent.recipe.hparams
        for name in sorted(parent.point):
            if name not in HParams.NAMES or name in NOT_PERTURBED:
                continue
            value = parent.point[name]
            if random.random() < self.resample:
                donor = start[random.integers(len(start))].trial
                changes[name] = donor.point.get(name, value)
            else:
                changes[name] = _perturbed(hparams, name, value, (0.8, 1.25)[random.integers(2)])
        recipe = parent.recipe.replace(hparams=hparams.replace(**changes))
        return parent.replace(recipe=recipe, point={**parent.point, **changes}, parent=(parent.id, step))


def _perturbed(hparams: HParams, name: str, value: float, factor: float) -> float:
    """Scale the value, or 1 − value for fields in NEAR_ONE, to six digits; out of range it is unchanged."""
    moved = 1 - (1 - value) * factor if name in NEAR_ONE else value * factor
    moved = float(f"{moved:.6g}")
    try:
        hparams.replace(**{name: moved})
    except InputError:
        return value
    return moved


def _loss(row: LedgerRow, step: int) -> float:
    loss = row.rungs.get(step, math.inf)
    return loss if math.isfinite(loss) else math.inf


def _score(row: LedgerRow, step: int) -> tuple[float, str]:
    return _loss(row, step), row.trial.id


def _lost(row: LedgerRow) -> bool:
    return row.state in ("diverged", "failed", "pruned")


def _generator(key: list[Any]) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
