"""What a design costs before anything is trained: its ladder with hours, memory and bytes of checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.scaling.study.design import Design
from experiments.scaling.study.rungs import Rung, StepSeconds, plan_rungs, shapes
from experiments.sweep.cohort import lanes_for, memory_bytes, state_bytes
from experiments.sweep.speed import Speed, time_steps
from experiments.sweep.trial import Setting
from model import ModelConfig, accounting
from model.ambient import pinned
from train import HParams
from train.data import Loader, load_manifest


@dataclasses.dataclass(frozen=True)
class Plan:
    """A design with the ladder that it makes on some data, and the machine's speed, where it was timed.

    design: with budgets, also where hours were asked for.
    """

    design: Design
    rungs: list[Rung]
    vocab_size: int
    tokens_per_epoch: int
    speed: Speed | None

    def document(self) -> dict[str, Any]:
        """Plain values: {design, vocab_size, tokens_per_epoch, rungs, shapes, total, without_branches, probe}.

        A rung's flops are those of its law, from the first token on; total counts what is trained, so that a trunk's
        part is in it once, with validation and compilation (compile_hours) in its hours (None without a probe).
        checkpoint_bytes: of every run's end, and of trunks where they are left. without_branches: the same runs, each
        from its start, and the share of FLOPs and hours that branches save (of the runs that are not held out, too);
        None without branches.
        """
        by_shape = [self._shape(members) for members in shapes(self.rungs).values()]
        memory = {name: row["memory_bytes"] for row in by_shape for name in row["names"]}
        rows = []
        for rung in self.rungs:
            hours = None if rung.seconds is None else rung.seconds / 3600
            rows.append(rung.to_dict() | {"hours": hours, "memory_bytes": memory[rung.name]})
        return {
            "design": self.design.to_dict(),
            "vocab_size": self.vocab_size,
            "tokens_per_epoch": self.tokens_per_epoch,
            "rungs": rows,
            "shapes": by_shape,
            "total": self._total(self.rungs)
            | {
                "compiles": len(by_shape),
                "repeated": sum(rung.repeated for rung in self.rungs),
                "checkpoint_bytes": sum(row["checkpoint_bytes"] for row in by_shape),
                "memory_bytes": max(row["memory_bytes"] for row in by_shape),
            },
            "without_branches": self._without_branches() if self.design.branches else None,
            "probe": None if self.speed is None else dataclasses.asdict(self.speed),
        }

    def _shape(self, members: list[Rung]) -> dict[str, Any]:
        first = members[0]
        setting = _setting(self.design, first.config, first.batch_size)
        lanes = lanes_for(setting, len(members))
        state = state_bytes(setting)
        return {
            "names": [rung.name for rung in members],
            "d_model": first.d_model,
            "batch_size": first.batch_size,
            "lanes": lanes,
            "state_bytes": state,
            "checkpoint_bytes": state * sum(1 if rung.trunk is None else 2 for rung in members),
            "memory_bytes": memory_bytes(setting, lanes),
        }

    def _total(self, rungs: list[Rung]) -> dict[str, Any]:
        seconds = None
        if self.speed is not None:
            compiling = self.speed.compile_seconds * len(shapes(rungs))
            seconds = compiling + sum(rung.seconds for rung in rungs if rung.seconds is not None)
        return {
            "runs": len(rungs),
            "tokens": round(sum(rung.tokens * rung.share_trained for rung in rungs)),
            "flops_6nd": sum(rung.flops_6nd * rung.share_trained for rung in rungs),
            "flops_exact": sum(rung.flops_exact * rung.share_trained for rung in rungs),
            "hours": None if seconds is None else seconds / 3600,
            "compile_hours": None if self.speed is None else self.speed.compile_seconds * len(shapes(rungs)) / 3600,
        }

    def _without_branches(self) -> dict[str, Any]:
        alone = self.design.replace(branches=False, schedule="wsd")
        step = None if self.speed is None else _step_seconds(alone, self.speed)
        others = plan_rungs(alone, self.vocab_size, self.tokens_per_epoch, step)
        here, there = self._total(self.rungs), self._total(others)
        fitted = [self._total([r for r in rungs if not r.held_out])["flops_6nd"] for rungs in (self.rungs, others)]
        saved = {"flops_6nd": 1 - here["flops_6nd"] / there["flops_6nd"], "flops_6nd_fitted": 1 - fitted[0] / fitted[1]}
        saved["hours"] = None if there["hours"] is None else 1 - here["hours"] / there["hours"]
        return there | {"saved": saved}


@pinned()
def plan_study(design: Design, data: str | Path, *, probe: bool = True, probe_seconds: float = 1.0) -> Plan:
    """The plan of a design on prepared data; nothing is trained but steps on random tokens, which are timed.

    Raises InputError on a design that these data or this machine cannot carry, and where hours are asked for without
    `probe`.
    """
    manifest = load_manifest(data)
    epoch = Loader(data, batch_size=1, seq_len=design.seq_len, seed=0).tokens_per_epoch
    size = lambda given, speed: plan_rungs(
        given,
        manifest.vocab_size,
        epoch,
        None if speed is None else _step_seconds(design, speed),
        0.0 if speed is None else speed.compile_seconds,
    )
    speed = None
    if probe and design.hours:
        # The sizes follow from the speed, and the speed from the sizes: the first guess is the base and a smaller one.
        speed = time_steps(_first_guess(design, manifest.vocab_size), probe_seconds)
    if probe:
        speed = time_steps(_shapes(design, size(design, speed)), probe_seconds)
    rungs = size(design, speed)
    if design.hours:
        design = design.with_budgets(tuple(sorted({rung.budget_flops for rung in rungs})))
    return Plan(design, rungs, manifest.vocab_size, epoch, speed)


def _shapes(design: Design, rungs: list[Rung]) -> list[tuple[Setting, int]]:
    return [(_setting(design, config, rows), len(members)) for (config, rows), members in shapes(rungs).items()]


def _first_guess(design: Design, vocab_size: int) -> list[tuple[Setting, int]]:
    base = design.base_config(vocab_size)
    params = accounting.parameters(base).active
    rows = design.batch_size if isinstance(design.batch_size, int) else 1
    widths = [design.family.nearest(base, size) for size in (params / 4, params)]
    return [(_setting(design, design.family.member(base, width), rows), design.count) for width in widths]


def _step_seconds(design: Design, speed: Speed) -> StepSeconds:
    shape = design.train_config(1)
    return lambda config, rows: speed.step_seconds(config, shape.replace(batch_size=rows))


def _setting(design: Design, config: ModelConfig, rows: int) -> Setting:
    return Setting(config, design.train_config(rows), HParams(), 0)
