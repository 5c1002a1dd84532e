"""Define the objectives of a sweep: loss, training speed, and numbers of `isoflop bench decode`."""

import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.sweep.capacity import CAPACITY
from experiments.sweep.trial import Trial
from model.errors import InputError, UnknownNameError
from train.task_sets import ERROR, higher_is_better, is_task_metric, task_of

LOSS = "loss"
TRAINING_SPEED = "training_tokens_per_second"
FORGETTING = "forgetting"
DIRECTIONS = {
    LOSS: "minimize",
    TRAINING_SPEED: "maximize",
    "accuracy": "maximize",
    "margin": "maximize",
    "chosen_reward": "maximize",
    FORGETTING: "minimize",
    CAPACITY: "maximize",
    "tokens_per_second": "maximize",
    "prefill_tokens_per_second": "maximize",
    "decode_tokens_per_second_aggregate": "maximize",
    "decode_tokens_per_second_per_sequence": "maximize",
    "time_to_first_token_seconds": "minimize",
    "time_per_output_token_seconds": "minimize",
    "seconds_per_step": "minimize",
    "weight_bytes_read_per_step": "minimize",
    "kv_cache_bytes_filled": "minimize",
    "bytes_read_per_step_filled": "minimize",
}
"""Objectives and which way is better. tokens_per_second: of all sequences, as decode_tokens_per_second_aggregate.

TASK/METRIC is also one, a metric of a task (`train.task_sets.HIGHER_IS_BETTER`) at a run's last validation.
training_tokens_per_second: see `training_speed`. accuracy, margin, chosen_reward: of a run's last validation, where its
training objective measures them. forgetting: bits per byte of the sweep's plain text after training. capacity: requests
per second at the sweep's service level (`experiments.sweep.capacity`). All of these come from a trial's own run, the
names below them from a benchmark.
"""
_VALIDATED = ("accuracy", "margin", "chosen_reward")
_OF_THE_RUN = {LOSS, TRAINING_SPEED, FORGETTING, CAPACITY, *_VALIDATED}
_ALIASES = {"tokens_per_second": "decode_tokens_per_second_aggregate"}
_STEPS, _REPEATS = 16, 5


def direction(name: str) -> str:
    """Return "minimize" or "maximize". Raises UnknownNameError."""
    if is_task_metric(name):
        return "maximize" if higher_is_better(name) else "minimize"
    if name not in DIRECTIONS:
        raise UnknownNameError("objective", name, DIRECTIONS)
    return DIRECTIONS[name]


def has_error(name: str) -> bool:
    """Return whether one run's value of an objective comes with a standard error, in the field NAME_standard_error."""
    return is_task_metric(name) or name == CAPACITY


def tasks_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the tasks whose metrics are among the objectives."""
    return tuple(dict.fromkeys(task_of(name) for name in names if is_task_metric(name)))


def check_speed(trial: Trial, names: tuple[str, ...]) -> None:
    """Raise InputError if a model's speed of decoding cannot be measured, before it is trained."""
    if not all(map(_is_of_the_run, names)):
        from experiments.bench.decode.grid import check_grid

        check_grid(trial.recipe.model, [_cell(trial)], _STEPS, _REPEATS)


def measure_speed(trial: Trial, folder: Path) -> dict[str, float]:
    """Return the numbers of `isoflop bench decode` for a trial's shape, with random weights, which do not affect speed.

    They are measured once per shape and `Decode` and stored in `folder/speed`, so that all workers use the same value
    for a shape. Raises RuntimeError if the measurement fails.
    """
    import jax

    from experiments.bench.decode.grid import run_grid
    from model import init
    from train.checksums import read_sealed

    config = trial.recipe.model
    content = {"config": config.to_dict(), "decode": trial.decode.to_dict()}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / "speed" / f"{key}.json"
    if not path.exists():

        def build(_: int | None) -> tuple[Any, Any]:
            return (config, init(config, jax.random.key(0)))

        row = run_grid(build, config, [_cell(trial)], steps=_STEPS, repeats=_REPEATS)[0]
        if "error" in row:
            raise RuntimeError(f"the decode speed of {key} could not be measured: {row['error']}")
        _write_if_absent(
            path, {name: value for name, value in row.items() if isinstance(value, (int, float))} | content
        )
    measured = read_sealed(path)
    return measured | {name: measured[own] for name, own in _ALIASES.items()}


def training_speed(run: Path, lanes: int = 1) -> float | None:
    """Return the training tokens per second of a run, the median over its steps; None if its metrics have none.

    The first step, which touches fresh memory, and steps next to a validation take longer than others, and would
    dominate a short run. Compilation and checkpoints are in no step's time. lanes: how many trials its program trained
    at once; their tokens count too, for the time of a step is that of all lanes.
    """
    from train.run.metrics import open_metrics

    try:
        speeds = [line["tokens_per_second"] for line in open_metrics(run).lines if line.get("tokens_per_second")]
    except InputError:  # `train.run.metrics.troubles` says why
        return None
    return lanes * statistics.median(speeds) if speeds else None


def validated(run: Path, names: Iterable[str] = ()) -> dict[str, float]:
    """Return the means of a run's last validation that are objectives of sweeps, as far as it measured them.

    Metrics of tasks that are among the names are returned with their standard errors.
    """
    from train.run.metrics import open_metrics

    lines = open_metrics(run).lines
    last = lines[-1] if lines else {}
    found = {name: last.get(f"validation_{name}") for name in _VALIDATED}
    of_tasks = [name for name in names if is_task_metric(name)]
    found |= {name: last.get(name) for own in of_tasks for name in (own, f"{own}{ERROR}")}
    return {name: value for name, value in found.items() if value is not None}


def values(trial: Trial, names: tuple[str, ...], facts: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Return every objective by name, from the run's facts or from `measure_speed`.

    Raises InputError if neither gives an objective.
    """
    found = dict(facts) if all(map(_is_of_the_run, names)) else {**measure_speed(trial, folder), **facts}
    for name in names:
        if found.get(name) is None:
            if _is_of_the_run(name):
                raise InputError(f"the run {facts['run']} recorded no {name}; leave that objective out")
            raise InputError(f"the decode benchmark gives no {name} for this model; leave that objective out")
    return {name: float(found[name]) for name in names}


def _is_of_the_run(name: str) -> bool:
    return name in _OF_THE_RUN or is_task_metric(name)


def _cell(trial: Trial) -> Any:
    from experiments.bench.decode.cells import Cell

    decode = trial.decode
    return Cell(batch=decode.batch, prompt=decode.context, weights=decode.weights, cache=decode.cache)


def _write_if_absent(path: Path, content: dict[str, Any]) -> None:
    """Write the document unless another worker has written it already."""
    from train.checksums import write_sealed

    beside = path.with_name(f"{path.stem}.{os.getpid()}.part")
    write_sealed(beside, content)
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    finally:
        beside.unlink()
