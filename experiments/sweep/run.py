"""A sweep over traced hyperparameters: every trial a lane of one compiled program."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.sweep.reading.summary import summarize
from model import ModelConfig
from model.errors import InputError
from train import HParams, Shell, TrainConfig, population
from train.lanes import compiled_programs

Axes = Mapping[str, Sequence[float]]


def run_sweep(
    config: ModelConfig,
    train_config: TrainConfig,
    base: HParams,
    axes: Axes,
    *,
    seeds: Sequence[int],
    data: str | Path,
    folder: str | Path,
    steps: int,
    shell: Shell = Shell(description="sweep"),
) -> dict[str, Any]:
    """Train the product of `axes`, each setting once per seed, for `steps` steps; the summary of all trials.

    Every trial has its own run directory below `folder`, named by its content; the same call again resumes.
    Raises InputError on an unknown field, an empty axis or no seed, before anything is written.
    """
    trials = plan_trials(base, axes, seeds)
    before = compiled_programs()
    results = population(
        config,
        train_config,
        [base.replace(**trial) for trial in trials],
        data=data,
        runs=[Path(folder) / trial_name(trial) for trial in trials],
        steps=steps,
        shell=shell,
    )
    rows = [
        {**trial, "run": result.run.name, "status": result.status, "loss": result.validation_loss}
        for trial, result in zip(trials, results, strict=True)
    ]
    return summarize({name: list(values) for name, values in axes.items()}, rows) | {
        "steps": steps,
        "tokens_per_trial": steps * train_config.tokens_per_step,
        "config": config.to_dict(),
        "train_config": train_config.to_dict(),
        "compiles": compiled_programs() - before,
        "training_seconds": max(result.seconds for result in results),
        "flops_6nd": sum(result.flops_6nd for result in results),
    }


def plan_trials(base: HParams, axes: Axes, seeds: Sequence[int]) -> list[dict[str, float]]:
    """One dict of changed hyperparameters per trial; seeds vary fastest."""
    if not seeds:
        raise InputError("a sweep needs at least one seed")
    if "seed" in axes:
        raise InputError("seed is not an axis: give seeds, so that they count as replicates")
    for name, values in axes.items():
        if len(values) == 0:
            raise InputError(f"the axis {name} has no values")
        if len(set(values)) < len(values):
            raise InputError(f"the axis {name} has a value twice: {list(values)}")
        for value in values:
            base.replace(**{name: value})  # refuses an unknown field or a value out of range
    product = itertools.product(*axes.values(), seeds)
    return [dict(zip((*axes, "seed"), values, strict=True)) for values in product]


def trial_name(trial: dict[str, float]) -> str:
    """The folder of a trial: its content, readable."""
    return ",".join(f"{name}={value:g}" for name, value in trial.items())
