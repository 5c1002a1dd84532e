"""How fast this machine trains: a few seconds of the real step at two sizes."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from experiments.scaling.plan import Recipe
from model import accounting
from model.sharding import make_mesh
from train import HParams, TrainConfig
from train.config import stack_hparams
from train.lanes import compile_program
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


def probe(recipe: Recipe, train_config: TrainConfig, widths: tuple[int, int], seconds: float = 3.0) -> Probe:
    """Measure at two widths: the median step of about `seconds` each, on random tokens."""
    measured = []
    with progress_bar("probing this machine", len(widths)) as advance:
        for width in widths:
            config = recipe.config(width)
            program = compile_program(config, train_config, 1, make_mesh())
            flops = accounting.flops_per_token(config, train_config.seq_len) * train_config.tokens_per_step
            measured.append(
                {
                    "d_model": width,
                    "flops_exact": flops,
                    "step_seconds": _median_step(program, train_config, recipe.vocab_size, seconds),
                    "compile_seconds": program.compile_seconds,
                }
            )
            advance()
    small, large = measured
    rate = (large["flops_exact"] - small["flops_exact"]) / max(large["step_seconds"] - small["step_seconds"], 1e-9)
    return Probe(
        overhead_seconds=max(0.0, small["step_seconds"] - small["flops_exact"] / rate),
        flops_per_second=rate,
        compile_seconds=max(row["compile_seconds"] for row in measured),
        measured=measured,
    )


def _median_step(program: Any, train_config: TrainConfig, vocab_size: int, seconds: float) -> float:
    hparams = stack_hparams([HParams(total_steps=1000)])
    shape = (1, train_config.batch_size, train_config.seq_len)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32)
    batch, active = {"tokens": tokens, "targets": tokens}, np.ones(1, bool)
    lanes, times = program.init(hparams), []
    for _ in range(2):  # the first steps touch fresh memory
        lanes, metrics = program.step(lanes, batch, hparams, active)
    jax.block_until_ready(metrics)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        for _ in range(4):
            lanes, metrics = program.step(lanes, batch, hparams, active)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start) / 4)
    return statistics.median(times)
