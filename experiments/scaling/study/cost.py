"""What a design costs before anything is trained: its ladder with hours, memory and bytes of checkpoints."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from experiments.scaling.probe import Probe, measure_step
from experiments.scaling.study.design import Design
from experiments.scaling.study.rungs import Rung, plan_rungs, shapes
from experiments.sweep.cohort import in_turn, lanes_for, state_bytes, temporary_bytes
from experiments.sweep.trial import Setting
from model import ModelConfig, accounting
from train import HParams
from train.data import Loader, load_manifest
from train.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Plan:
    """A design with the ladder that it makes on some data, and the machine's speed, where it was timed.

    design: with budgets, also where hours were asked for.
    """

    design: Design
    rungs: list[Rung]
    vocab_size: int
    tokens_per_epoch: int
    speed: Probe | None

    def document(self) -> dict[str, Any]:
        """Plain values: {design, vocab_size, tokens_per_epoch, rungs, shapes, total, without_branches, probe}.

        A rung's flops are those of its law, from the first token on; total counts what is trained, so that a trunk's
        part is in it once, with validation and compilation in its hours (None without a probe). checkpoint_bytes: of
        every run's end, and of trunks where they are left. without_branches: the same runs, each from its start, and
        the share of FLOPs and hours that branches save (of the runs that are not held out, too); None without branches.
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
            "probe": None if self.speed is None else self.speed.to_dict(),
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
            "memory_bytes": lanes * state + (1 if in_turn() else lanes) * temporary_bytes(setting),
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
    if not probe:
        rungs, speed = size(design, None), None
    elif design.hours:
        # The sizes follow from the speed, and the speed from the sizes: the first guess is the base and a smaller one.
        speed = _probe(design, _first_guess(design, manifest.vocab_size), probe_seconds)
        speed = _probe(design, _extremes(size(design, speed)), probe_seconds)
        rungs = size(design, speed)
    else:
        speed = _probe(design, _extremes(size(design, None)), probe_seconds)
        rungs = size(design, speed)
    if design.hours:
        design = design.with_budgets(tuple(sorted({rung.budget_flops for rung in rungs})))
    return Plan(design, rungs, manifest.vocab_size, epoch, speed)


Shape = tuple[ModelConfig, int, int]
"""(config, batch size, runs of that shape)."""


def _extremes(rungs: list[Rung]) -> list[Shape]:
    """The shapes of the fewest and the most FLOPs a step; the others lie between them."""
    found = [(config, rows, len(members)) for (config, rows), members in shapes(rungs).items()]
    ordered = sorted(found, key=lambda shape: _flops_of_step(shape[0], shape[1], rungs[0].seq_len))
    return [ordered[0], ordered[-1]]


def _first_guess(design: Design, vocab_size: int) -> list[Shape]:
    base = design.base_config(vocab_size)
    params = accounting.parameters(base).active
    rows = design.batch_size if isinstance(design.batch_size, int) else 1
    widths = [design.family.nearest(base, size) for size in (params / 4, params)]
    return [(design.family.member(base, width), rows, design.count) for width in widths]


def _probe(design: Design, chosen: list[Shape], seconds: float) -> Probe:
    """Step time of one run as overhead + exact FLOPs / rate, through two shapes, each in the lanes of its runs."""
    measured = []
    with progress_bar("timing the step", len(chosen)) as advance:
        for config, rows, runs in chosen:
            setting = _setting(design, config, rows)
            lanes = 1 if in_turn() else lanes_for(setting, runs)
            found = measure_step(config, setting.train_config, lanes, seconds)
            flops = _flops_of_step(config, rows, design.seq_len)
            own = {"d_model": config.d_model, "step_seconds": found["step_seconds"] / lanes}
            own |= {"flops_exact_per_step": flops, "compile_seconds": found["compile_seconds"], "lanes": lanes}
            measured.append(own)
            advance()
    small, large = measured
    work = large["flops_exact_per_step"] - small["flops_exact_per_step"]
    longer = large["step_seconds"] - small["step_seconds"]
    rate = work / longer if work > 0 and longer > 0 else math.inf
    overhead = small["step_seconds"] - small["flops_exact_per_step"] / rate
    if not 0 < overhead < small["step_seconds"]:  # no line through these two: in proportion to the larger one
        overhead, rate = 0.0, large["flops_exact_per_step"] / large["step_seconds"]
    return Probe(overhead, rate, max(row["compile_seconds"] for row in measured), measured)


def _step_seconds(design: Design, speed: Probe) -> Any:
    return lambda config, rows: speed.step_seconds(_flops_of_step(config, rows, design.seq_len))


def _flops_of_step(config: ModelConfig, rows: int, seq_len: int) -> float:
    return rows * seq_len * accounting.flops_per_token(config, seq_len, "exact")


def _setting(design: Design, config: ModelConfig, rows: int) -> Setting:
    return Setting(config, design.train_config(rows), HParams(), 0)
