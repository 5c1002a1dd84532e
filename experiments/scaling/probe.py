"""How fast this machine trains: the real loop at two sizes, and the step alone for the benchmark."""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.scaling.plan import Recipe
from model import ModelConfig, accounting
from model.sharding import default_axes, make_mesh
from train import HParams, Shell, TrainConfig, train
from train.config import stack_hparams
from train.lanes import Program, compile_program
from train.metrics import read_metrics
from train.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Probe:
    """Step time as overhead + FLOPs / rate, through two measured sizes (exact FLOPs, seconds)."""

    overhead_seconds: float
    flops_per_second: float
    compile_seconds: float
    measured: list[dict[str, Any]]

    def step_seconds(self, flops_exact: float) -> float:
        """Predicted seconds of a step of that many exact FLOPs."""
        return self.overhead_seconds + flops_exact / self.flops_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def probe(
    recipe: Recipe, train_config: TrainConfig, widths: tuple[int, int], *, data: Path, folder: Path, steps: int = 300
) -> Probe:
    """Measure the real training loop, logs and data order included, at two widths for `steps` steps each."""
    measured = []
    with progress_bar("probing this machine", len(widths)) as advance:
        for width in widths:
            config = recipe.config(width)
            shell = Shell(evaluate_tokens=train_config.tokens_per_step, description=f"probe, d_model {width}")
            run = folder / f"d{width}"
            result = train(config, train_config, HParams(), data=data, run=run, steps=steps, shell=shell)
            clock = [record["seconds"] for record in read_metrics(run)]
            warm = len(clock) // 3  # the first steps touch fresh memory
            measured.append(
                {
                    "d_model": width,
                    "step_seconds": (clock[-1] - clock[warm - 1]) / (len(clock) - warm),
                    "flops_exact_per_step": result.flops_exact / result.steps,
                    "compile_seconds": result.compile_seconds,
                }
            )
            advance()
    small, large = measured
    work = large["flops_exact_per_step"] - small["flops_exact_per_step"]
    rate = work / max(large["step_seconds"] - small["step_seconds"], 1e-9)
    return Probe(
        overhead_seconds=max(0.0, small["step_seconds"] - small["flops_exact_per_step"] / rate),
        flops_per_second=rate,
        compile_seconds=max(row["compile_seconds"] for row in measured),
        measured=measured,
    )


def measure_step(config: ModelConfig, train_config: TrainConfig, lanes: int, seconds: float) -> dict[str, Any]:
    """Median time of the real training step on random tokens, measured for about `seconds` after two warm-up steps.

    Tokens and FLOPs per second are those of all lanes together; slowest and fastest are over groups of four steps.
    """
    program = compile_program(config, train_config, lanes, make_mesh(default_axes(train_config.batch_size)))
    times = _step_times(program, config, train_config, lanes, seconds)
    tokens = lanes * train_config.tokens_per_step
    step = statistics.median(times)
    flops = {name: accounting.flops_per_token(config, train_config.seq_len, name) for name in ("6N", "exact")}
    return {
        "lanes": lanes,
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "tokens_per_second_slowest": tokens / max(times),
        "tokens_per_second_fastest": tokens / min(times),
        "flops_6nd_per_second": flops["6N"] * tokens / step,
        "flops_exact_per_second": flops["exact"] * tokens / step,
        "compile_seconds": program.compile_seconds,
    }


def _step_times(
    program: Program, config: ModelConfig, train_config: TrainConfig, lanes: int, seconds: float
) -> list[float]:
    hparams = stack_hparams([HParams(total_steps=1000, seed=seed) for seed in range(lanes)])
    shape = (lanes, train_config.batch_size, train_config.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    batch, active = {"tokens": tokens, "targets": tokens}, np.ones(lanes, bool)
    state = program.init(hparams)
    times: list[float] = []
    for _ in range(2):  # the first steps touch fresh memory
        state, metrics = program.step(state, batch, hparams, active)
    jax.block_until_ready(metrics)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        for _ in range(4):
            state, metrics = program.step(state, batch, hparams, active)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start) / 4)
    return times
