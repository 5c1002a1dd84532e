"""What a sweep is: kept in `sweep.json` of its folder, so that any worker on any machine can go on with it."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.sweep.trial import Setting


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The definition of a sweep.

    folder: holds `sweep.json`, a copy of the space's file, `runs/ID` of every trial, and the ledger where that is a
    file. base: what the space varies. data: the prepared folder. axes: `NAME=VALUES` as on the command line; space_file:
    a Python file in `folder` whose `space` is multiplied with them. seeds: of the replicates of every point.
    objectives: "loss" and names of `isoflop bench decode`'s numbers. sampler: "all" for every point of the space, or a
    name of `experiments.sweep.samplers`; trials: how many points it draws (0: all). policy: "all", "halving",
    "hyperband" or "population", with its settings. storage: an Optuna storage URL; None: SQLite in the folder. lanes:
    at most so many trials side by side; None: as many as memory holds. evaluate_tokens: of the validation split.
    """

    folder: Path
    base: Setting
    data: Path
    axes: tuple[str, ...] = ()
    space_file: str | None = None
    seeds: tuple[int, ...] = (0,)
    objectives: tuple[str, ...] = ("loss",)
    sampler: str = "all"
    trials: int = 0
    sampler_seed: int = 0
    policy: str = "all"
    policy_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    storage: str | None = None
    lanes: int | None = None
    evaluate_tokens: int = 65_536
