"""Predict the cost of a design before training: its ladder with hours, memory and bytes of checkpoints."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.models import read_config
from experiments.scaling.study.design import Design
from experiments.scaling.study.published import PublishedLaw, law_named
from experiments.scaling.study.rungs import Rung, StepSeconds, expected_optimum, plan_rungs, shapes
from experiments.scaling.study.totals import (
    ExpectedOptimum,
    PlannedRung,
    Saved,
    ShapePlan,
    StudyTotal,
    TrainingTotal,
    WithoutBranches,
)
from experiments.sweep.cohort import lanes_for, memory_bytes, state_bytes
from experiments.sweep.speed import Speed, time_steps
from experiments.sweep.trial import Trial
from model import ModelConfig, accounting
from model.ambient import pinned
from model.errors import InputError, check_number, check_whole
from train.data import Loader, load_manifest
from train.loop.memory import device_memory
from train.peak import PEAKS, device_named
from train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Hardware to plan for: a device of `train.peak.PEAKS`, their number, and the model FLOPs utilisation (MFU)."""

    device: str
    devices: int = 1
    mfu: float = 0.4

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_named(self.device))
        check_whole("--devices", self.devices, 1)
        check_number("--mfu", self.mfu, above=0, most=1, hint="0.4 is 40 %")

    @property
    def peak_flops_per_second(self) -> float:
        """The peak of one device."""
        return PEAKS[self.device].flops_per_second

    @property
    def speed(self) -> Speed:
        """Exact FLOPs over devices · peak · MFU, with nothing for compiling."""
        return Speed(0.0, self.devices * self.peak_flops_per_second * self.mfu, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the peak of one device."""
        return dataclasses.asdict(self) | {"peak_flops_per_second": self.peak_flops_per_second}


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """A design with its ladder on some data, and the machine's speed if it was timed.

    design: with budgets, also if hours were requested. tokens_per_epoch: None without data. hardware: the hardware that
    the hours are for; None: this machine.
    """

    design: Design
    rungs: list[Rung]
    vocab_size: int
    tokens_per_epoch: int | None
    speed: Speed | None
    hardware: Hardware | None = None

    def document(self) -> dict[str, Any]:
        """Return plain values for JSON: the design, and all that follows from it.

        A rung's flops are those of its law, from the first token on; total counts what is trained.
        """
        law, alone = self.law, self.without_branches
        return {
            "design": self.design.to_dict(),
            "law": None if law is None else {"name": self.design.law, "source": law.source, "fitted": list(law.fitted)},
            "optima": [dataclasses.asdict(best) for best in self.optima],
            "vocab_size": self.vocab_size,
            "tokens_per_epoch": self.tokens_per_epoch,
            "rungs": [row.to_dict() for row in self.rows],
            "shapes": [dataclasses.asdict(shape) for shape in self.shapes],
            "total": dataclasses.asdict(self.total),
            "without_branches": None if alone is None else dataclasses.asdict(alone),
            "hardware": None if self.hardware is None else self.hardware.to_dict(),
            "probe": None if self.speed is None or self.hardware is not None else dataclasses.asdict(self.speed),
        }

    @property
    def law(self) -> PublishedLaw | None:
        """The published law that places the optima; None if the design itself does."""
        return law_named(self.design.law) if self.design.law else None

    @property
    def optima(self) -> list[ExpectedOptimum]:
        """The optimum that is expected at each budget."""
        found = [(C, expected_optimum(self.design, C)) for C in self.design.budgets]
        return [ExpectedOptimum(C, N, C / 6 / N) for C, N in found]

    @property
    def rows(self) -> list[PlannedRung]:
        """The rungs, with what each needs."""
        needs = {name: shape for shape in self.shapes for name in shape.names}
        found = []
        for rung in self.rungs:
            hours = None if rung.seconds is None else rung.seconds / 3600
            found.append(PlannedRung(rung, hours, needs[rung.name].memory_bytes, needs[rung.name].state_bytes))
        return found

    @cached_property
    def shapes(self) -> list[ShapePlan]:
        """The static shapes of the ladder."""
        return [self._shape(members) for members in shapes(self.rungs).values()]

    @cached_property
    def total(self) -> StudyTotal:
        """The cost of the whole study."""
        memory = [shape.memory_bytes for shape in self.shapes if shape.memory_bytes is not None]
        return StudyTotal(
            **vars(self._total(self.rungs)),
            compiles=len(self.shapes),
            repeated=sum(rung.repeated for rung in self.rungs),
            checkpoint_bytes=sum(shape.checkpoint_bytes for shape in self.shapes),
            memory_bytes=None if self.hardware else max(memory),
        )

    @cached_property
    def without_branches(self) -> WithoutBranches | None:
        """The same runs, each from its start, and what branches save; None without branches."""
        return self._without_branches() if self.design.branches else None

    def _shape(self, members: list[Rung]) -> ShapePlan:
        first = members[0]
        trial = _trial(self.design, first.config, first.batch_size)
        lanes = lanes_for(trial, len(members))
        state = state_bytes(trial)
        return ShapePlan(
            names=[rung.name for rung in members],
            d_model=first.d_model,
            batch_size=first.batch_size,
            lanes=lanes,
            state_bytes=state,
            checkpoint_bytes=state * sum(1 if rung.trunk is None else 2 for rung in members),
            memory_bytes=None if self.hardware else memory_bytes(trial, lanes),
        )

    def _total(self, rungs: list[Rung]) -> TrainingTotal:
        seconds = None
        if self.speed is not None:
            compiling = self.speed.compile_seconds * len(shapes(rungs))
            seconds = compiling + sum(rung.seconds for rung in rungs if rung.seconds is not None)
        return TrainingTotal(
            runs=len(rungs),
            tokens=round(sum(rung.tokens * rung.share_trained for rung in rungs)),
            flops_6nd=sum(rung.flops_6nd * rung.share_trained for rung in rungs),
            flops_exact=sum(rung.flops_exact * rung.share_trained for rung in rungs),
            hours=None if seconds is None else seconds / 3600,
            compile_hours=None if self.speed is None else self.speed.compile_seconds * len(shapes(rungs)) / 3600,
        )

    def _without_branches(self) -> WithoutBranches:
        alone = self.design.replace(branches=False, schedule="wsd")
        step = None if self.speed is None else _step_seconds(alone, self.speed)
        others = plan_rungs(alone, self.vocab_size, self.tokens_per_epoch, step)
        here, there = self._total(self.rungs), self._total(others)
        fitted = [self._total([r for r in rungs if not r.held_out]).flops_6nd for rungs in (self.rungs, others)]
        hours = None if here.hours is None or there.hours is None else 1 - here.hours / there.hours
        saved = Saved(1 - here.flops_6nd / there.flops_6nd, 1 - fitted[0] / fitted[1], hours)
        return WithoutBranches(**vars(there), saved=saved)


@pinned()
def plan_study(
    design: Design,
    data: str | Path | None,
    *,
    probe: bool = True,
    probe_seconds: float = 1.0,
    hardware: Hardware | None = None,
) -> StudyPlan:
    """Return the plan of a design; nothing is trained but steps on random tokens, which are timed.

    data: a prepared folder; None: the vocabulary is the base's, and epochs are unknown. hardware: the hours are for
    these devices, and nothing is timed. Raises InputError if the design does not fit the data or this machine, or if
    hours are requested without `probe` and `hardware`.
    """
    vocabulary, epoch = _text(design, data)

    def size(given: Design, speed: Speed | None) -> list[Rung]:
        return plan_rungs(
            given,
            vocabulary,
            epoch,
            None if speed is None else _step_seconds(design, speed),
            0.0 if speed is None else speed.compile_seconds,
        )

    speed = None if hardware is None else hardware.speed
    if hardware is None and probe and design.hours:
        # The sizes follow from the speed, and the speed from the sizes: the first guess is the base and a smaller one.
        speed = time_steps(_first_guess(design, vocabulary), probe_seconds)
    if hardware is None and probe:
        steps = _shapes(design, size(design, speed))
        _check_fits(steps)
        speed = time_steps(steps, probe_seconds)
    rungs = size(design, speed)
    if design.hours:
        design = design.with_budgets(tuple(sorted({rung.budget_flops for rung in rungs})))
    return StudyPlan(design, rungs, vocabulary, epoch, speed, hardware)


def _text(design: Design, data: str | Path | None) -> tuple[int, int | None]:
    """Return (the vocabulary, tokens of an epoch) of the data, or of the base without any."""
    if data is None:
        return read_config(design.base).vocab_size, None
    return load_manifest(data).vocab_size, Loader(data, batch_size=1, seq_len=design.seq_len, seed=0).tokens_per_epoch


def _check_fits(steps: list[tuple[Trial, int]]) -> None:
    """Raise InputError if the largest step is predicted not to fit this machine, before it is timed."""
    largest = max((trial for trial, _ in steps), key=lambda trial: memory_bytes(trial, 1))
    needs, has, shape = memory_bytes(largest, 1), device_memory(), largest.recipe.train
    if needs > has:
        raise InputError(
            f"a step of the largest model (d_model={largest.recipe.model.d_model}, {shape.batch_size:,} × "
            f"{shape.seq_len:,} tokens) is predicted to take {needs / 2**30:,.1f} GiB and this machine has "
            f"{has / 2**30:,.1f}: name the hardware that the study is for, such as --device h100 --devices 8, or time "
            "nothing with --no-probe"
        )


def _shapes(design: Design, rungs: list[Rung]) -> list[tuple[Trial, int]]:
    return [(_trial(design, config, rows), len(members)) for (config, rows), members in shapes(rungs).items()]


def _first_guess(design: Design, vocab_size: int) -> list[tuple[Trial, int]]:
    base = design.base_config(vocab_size)
    params = accounting.parameters(base).active
    rows = design.batch_size if isinstance(design.batch_size, int) else 1
    widths = [design.family.nearest(base, size) for size in (params / 4, params)]
    return [(_trial(design, design.family.member(base, width), rows), design.count) for width in widths]


def _step_seconds(design: Design, speed: Speed) -> StepSeconds:
    shape = design.train_config(1)
    return lambda config, rows: speed.step_seconds(config, shape.replace(batch_size=rows), design.objective_of(config))


def _trial(design: Design, config: ModelConfig, rows: int) -> Trial:
    recipe = Recipe(config, design.train_config(rows), objective=design.objective_of(config))
    return Trial(recipe, execution=design.execution)
