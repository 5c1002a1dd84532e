"""Predict the cost of a design before training: its ladder with hours, memory and bytes of checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.models import read_config
from experiments.scaling.study.design import Design
from experiments.scaling.study.published import law_named
from experiments.scaling.study.rungs import Rung, StepSeconds, expected_optimum, plan_rungs, shapes
from experiments.sweep.cohort import lanes_for, memory_bytes, state_bytes
from experiments.sweep.speed import Speed, time_steps
from experiments.sweep.trial import Trial
from model import ModelConfig, accounting
from model.ambient import pinned
from model.checks import check_number, check_whole
from model.errors import InputError
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
    def speed(self) -> Speed:
        """Exact FLOPs over devices · peak · MFU, with nothing for compiling."""
        return Speed(0.0, self.devices * PEAKS[self.device].flops_per_second * self.mfu, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the peak of one device."""
        return dataclasses.asdict(self) | {"peak_flops_per_second": PEAKS[self.device].flops_per_second}


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
        """Return plain values: {design, law, optima, vocab_size, tokens_per_epoch, rungs, shapes, total,
        without_branches, hardware, probe}.

        law: {name, source, fitted} of the published law that places the optima, None if the design itself does. optima:
        {flops, params, tokens} expected at each budget. Without data tokens_per_epoch and epochs are None.
        memory_bytes: on this machine, None if the hardware is another; state_bytes: parameters and moments.

        A rung's flops are those of its law, from the first token on; total counts what is trained, so that a base run's
        part is in it once, with validation and compilation (compile_hours) in its hours (None without a probe).
        checkpoint_bytes: of every run's end, and of base runs where branches leave them. without_branches: the same
        runs, each from its start, and the share of FLOPs and hours that branches save (of the runs that are not held
        out, too); None without branches.
        """
        by_shape = [self._shape(members) for members in shapes(self.rungs).values()]
        needs = {name: row for row in by_shape for name in row["names"]}
        rows = []
        for rung in self.rungs:
            hours = None if rung.seconds is None else rung.seconds / 3600
            sizes = {key: needs[rung.name][key] for key in ("memory_bytes", "state_bytes")}
            rows.append(rung.to_dict() | {"hours": hours} | sizes)
        return {
            "design": self.design.to_dict(),
            "law": self._law(),
            "optima": [
                {"flops": C, "params": N, "tokens": C / 6 / N}
                for C in self.design.budgets
                for N in [expected_optimum(self.design, C)]
            ],
            "vocab_size": self.vocab_size,
            "tokens_per_epoch": self.tokens_per_epoch,
            "rungs": rows,
            "shapes": by_shape,
            "total": self._total(self.rungs)
            | {
                "compiles": len(by_shape),
                "repeated": sum(rung.repeated for rung in self.rungs),
                "checkpoint_bytes": sum(row["checkpoint_bytes"] for row in by_shape),
                "memory_bytes": None if self.hardware else max(row["memory_bytes"] for row in by_shape),
            },
            "without_branches": self._without_branches() if self.design.branches else None,
            "hardware": None if self.hardware is None else self.hardware.to_dict(),
            "probe": None if self.speed is None or self.hardware is not None else dataclasses.asdict(self.speed),
        }

    def _law(self) -> dict[str, Any] | None:
        if not self.design.law:
            return None
        law = law_named(self.design.law)
        return {"name": self.design.law, "source": law.source, "fitted": list(law.fitted)}

    def _shape(self, members: list[Rung]) -> dict[str, Any]:
        first = members[0]
        trial = _trial(self.design, first.config, first.batch_size)
        lanes = lanes_for(trial, len(members))
        state = state_bytes(trial)
        return {
            "names": [rung.name for rung in members],
            "d_model": first.d_model,
            "batch_size": first.batch_size,
            "lanes": lanes,
            "state_bytes": state,
            "checkpoint_bytes": state * sum(1 if rung.trunk is None else 2 for rung in members),
            "memory_bytes": None if self.hardware else memory_bytes(trial, lanes),
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
