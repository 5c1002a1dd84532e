"""Measure how fast this machine trains: real steps on random tokens, and a line through two shapes."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.sweep.cohort import lanes_for
from experiments.sweep.trial import Trial
from model import Execution, ModelConfig, Params
from model.sharding import default_axes, make_mesh
from train import HParams, TrainConfig
from train.config import stack_hparams
from train.lanes.build import compile_program, frozen_shapes, prefers_vmap
from train.lanes.program import Program
from train.objectives import LanguageModeling, Objective
from train.objectives.objective import Batch
from train.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Speed:
    """Model of a step's time: seconds = overhead + exact FLOPs / rate, from one or two measured shapes."""

    overhead_seconds: float
    flops_per_second: float
    compile_seconds: float
    measured: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def step_seconds(
        self, config: ModelConfig, train_config: TrainConfig, objective: Objective = LanguageModeling()
    ) -> float:
        """Return the predicted seconds of a step of that shape."""
        return self.overhead_seconds + flops_of_step(config, train_config, objective) / self.flops_per_second


def flops_of_step(config: ModelConfig, train_config: TrainConfig, objective: Objective) -> float:
    """Return the exact FLOPs of one training step of one run."""
    return train_config.tokens_per_step * objective.flops_per_token(config, train_config.seq_len, "exact")


def time_steps(shapes: Sequence[tuple[Trial, int]], seconds: float = 1.0) -> Speed:
    """Time the steps of the fewest and the most FLOPs for about `seconds` each; the others are in between.

    shapes: (trial, number of runs of its shape), which bounds the lanes of a program.
    """

    def size(shape: Any) -> float:
        return flops_of_step(shape[0].recipe.model, shape[0].recipe.train, shape[0].recipe.objective)

    ordered = sorted(shapes, key=size)
    chosen = ordered[:1] if len(ordered) == 1 else [ordered[0], ordered[-1]]
    measured = []
    with progress_bar("timing the step", len(chosen)) as advance:
        for trial, runs in chosen:
            lanes = lanes_for(trial, runs) if prefers_vmap() else 1
            recipe = trial.recipe
            found = measure_step(recipe.model, recipe.train, lanes, seconds, trial.execution, recipe.objective)
            measured.append(
                {
                    "d_model": trial.recipe.model.d_model,
                    "lanes": lanes,
                    "step_seconds": found["step_seconds"] / lanes,
                    "flops_exact_per_step": size((trial, runs)),
                    "compile_seconds": found["compile_seconds"],
                }
            )
            advance()
    return Speed(*_line(measured), max(row["compile_seconds"] for row in measured), measured)


def _line(measured: list[dict[str, Any]]) -> tuple[float, float]:
    """Return (overhead, rate); if no line fits both, without overhead, in proportion to the larger shape."""
    small, large = measured[0], measured[-1]
    work = large["flops_exact_per_step"] - small["flops_exact_per_step"]
    longer = large["step_seconds"] - small["step_seconds"]
    if work > 0 and longer > 0:
        overhead = small["step_seconds"] - small["flops_exact_per_step"] * longer / work
        if overhead > 0:
            return overhead, work / longer
    return 0.0, large["flops_exact_per_step"] / large["step_seconds"]


def measure_step(
    config: ModelConfig,
    train_config: TrainConfig,
    lanes: int,
    seconds: float,
    execution: Execution = Execution(),
    objective: Objective = LanguageModeling(),
) -> dict[str, Any]:
    """Measure the median time of the training step on random tokens, for about `seconds` after a warm-up.

    Tokens and FLOPs per second are those of all lanes together; slowest and fastest are over groups of four steps, as
    samples are.
    """
    axes = execution.mesh or default_axes(train_config.batch_size // execution.accumulate)
    mesh = make_mesh(axes, execution.platform)
    program = compile_program(config, train_config, lanes, mesh, execution=execution, objective=objective)
    frozen = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), frozen_shapes(config, objective))
    times = _step_times(program, random_batch(config, train_config, objective, lanes), frozen, seconds)
    tokens = lanes * train_config.tokens_per_step
    step = statistics.median(times)
    flops = {name: objective.flops_per_token(config, train_config.seq_len, name) for name in ("6N", "exact")}
    return {
        "lanes": lanes,
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "tokens_per_second_slowest": tokens / max(times),
        "tokens_per_second_fastest": tokens / min(times),
        "flops_6nd_per_second": flops["6N"] * tokens / step,
        "flops_exact_per_second": flops["exact"] * tokens / step,
        "compile_seconds": program.compile_seconds,
        "samples": {"step_seconds": times},
    }


def random_batch(config: ModelConfig, train_config: TrainConfig, objective: Objective, lanes: int) -> Batch:
    """Return a batch [lanes, batch, …] of random tokens, one document a row, all of them predicted."""
    random = np.random.default_rng(0)
    batch: Batch = {}
    spec = objective.batch_spec(config, train_config, train_config.batch_size, train_config.seq_len)
    for name, array in spec.items():
        shape = (lanes, *array.shape)
        if name.endswith("tokens") or name == "targets":
            batch[name] = random.integers(0, config.vocab_size, shape, dtype=np.int32)
        elif name == "positions":
            batch[name] = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        else:
            one = np.zeros if name == "labels" else np.ones
            batch[name] = one(shape, array.dtype)
    return batch


def _step_times(program: Program, batch: Batch, frozen: Params, seconds: float) -> list[float]:
    lanes = len(next(iter(batch.values())))
    hparams = stack_hparams([HParams(total_steps=1000, seed=seed) for seed in range(lanes)])
    hparams, batch = program.place(hparams), program.place(batch)
    active = np.ones(lanes, bool)
    state = program.init(hparams)
    times: list[float] = []
    for _ in range(2):  # the first steps allocate memory
        state, metrics = program.step(state, batch, hparams, active, frozen)
    jax.block_until_ready(metrics)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        for _ in range(4):
            state, metrics = program.step(state, batch, hparams, active, frozen)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start) / 4)
    return times
