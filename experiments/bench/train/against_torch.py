"""Compare our training step with the same step in PyTorch, in interleaved rounds on one machine."""

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.ceilings import cores
from experiments.bench.peers.twin import Twin, check_has_twin, require_torch, twin_spec, twin_weights
from experiments.bench.rounds import TrainSteps, loss_difference, median_and_range, tokens_per_second
from model import ModelConfig, Params, accounting
from model.errors import check_at_least_one
from model.sharding import make_mesh
from train import HParams, TrainConfig
from train.config import stack_hparams
from train.lanes.build import compile_program

MODES = ("eager", "compile")
WARM_UP_STEPS = 3
ROUND_SECONDS = 1.0
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class ContenderSpeed:
    """A contender's median, slowest and fastest round, and our speed over its own.

    The ratio is taken round by round, and of the fastest rounds, which other programs disturbed least.
    """

    name: str
    tokens_per_second: float
    tokens_per_second_slowest: float
    tokens_per_second_fastest: float
    tokens_per_second_by_round: list[float]
    isoflop_over_this: float
    isoflop_over_this_lowest: float
    isoflop_over_this_highest: float
    isoflop_over_this_at_best: float
    flops_6nd_per_second: float
    flops_exact_per_second: float

    @property
    def ratio_in_words(self) -> str:
        """Write our speed over this one's, with the range of the rounds; empty for our own."""
        if self.name == "isoflop":
            return ""
        ratios = self.isoflop_over_this, self.isoflop_over_this_lowest, self.isoflop_over_this_highest
        return "{:.2f} ({:.2f} … {:.2f})".format(*ratios)


@dataclasses.dataclass(frozen=True)
class TorchContender(ContenderSpeed):
    """A contender of `bench_against_torch`."""

    steps_per_round: int
    compile_seconds: float
    """Short if a library finds its compile cache filled."""


@dataclasses.dataclass(frozen=True)
class TorchComparison:
    """Our training step compared with PyTorch's."""

    parameters: int
    train_config: TrainConfig
    hparams: HParams
    loss_difference: float
    """The largest relative difference of the losses over the warm-up steps."""
    load_average: float
    """The load average of the minute before the benchmark. Beside other programs the medians say little, as PyTorch's
    threads wait for one another at every operation."""
    torch_version: str | None
    torch_threads: int | None
    contenders: list[TorchContender]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return vars(self) | {
            "train_config": self.train_config.to_dict(),
            "hparams": self.hparams.to_dict(),
            "contenders": [dataclasses.asdict(contender) for contender in self.contenders],
        }


def bench_against_torch(
    config: ModelConfig,
    train_config: TrainConfig,
    *,
    rounds: int = 7,
    steps_per_round: int | None = None,
    modes: tuple[str, ...] = MODES,
) -> TorchComparison:
    """Return the tokens per second of our step and of PyTorch's, measured in interleaved rounds that never overlap.

    Both start from our weights, see the same tokens and use the same optimizer at a constant rate; their losses over
    the warm-up steps must agree. On a CPU PyTorch has all cores, as XLA has. steps_per_round: of every contender; None:
    as many as fill about a second. Raises InputError if PyTorch is not installed or the model has no twin.
    """
    check_has_twin(config, train_config)
    check_at_least_one(rounds=rounds)
    require_torch()
    load_average = os.getloadavg()[0]
    train_config = train_config.replace(schedule="constant")
    threads = cores() if jax.default_backend() == "cpu" else None
    hparams = HParams()
    ours = IsoflopStep(config, train_config, hparams)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isoflop-twin-")))
        np.savez(folder / "weights.npz", **twin_weights(config, ours.params()))  # type: ignore[arg-type]
        contenders: dict[str, TrainSteps] = {"isoflop": ours.run}
        ready: dict[str, dict[str, Any]] = {}
        for mode in modes:  # sequentially: compiling in parallel would distort the times
            spec = twin_spec(config, train_config, hparams, mode, folder / "weights.npz", threads)
            twin = stack.enter_context(Twin(spec, folder / f"{mode}.log"))
            ready[mode], contenders[f"torch {mode}"] = twin.ready, twin.run
        parameters = {"isoflop": ours.parameters} | {f"torch {mode}": ready[mode]["parameters"] for mode in modes}
        if len(set(parameters.values())) > 1:
            raise RuntimeError(f"the models differ: parameters are {parameters}")
        steps, loss_difference = _warm_up(contenders, LOSS_TOLERANCE[config.compute_dtype])
        if steps_per_round is not None:
            steps = dict.fromkeys(steps, steps_per_round)
        speeds = tokens_per_second(contenders, steps, rounds, train_config.tokens_per_step)
    flops = {name: accounting.flops_per_token(config, train_config.seq_len, name) for name in ("6N", "exact")}
    compile_seconds = {"isoflop": ours.compile_seconds} | {f"torch {m}": ready[m]["compile_seconds"] for m in modes}
    return TorchComparison(
        parameters=ours.parameters,
        train_config=train_config,
        hparams=hparams,
        loss_difference=loss_difference,
        load_average=load_average,
        torch_version=ready[modes[0]]["torch"] if modes else None,
        torch_threads=ready[modes[0]]["threads"] if modes else None,
        contenders=[
            TorchContender(
                **vars(summarize(name, speeds, flops)),
                steps_per_round=steps[name],
                compile_seconds=compile_seconds[name],
            )
            for name in contenders
        ],
    )


class IsoflopStep:
    """Our step as the training loop drives it: donated state, batches from the host, no wait between steps."""

    def __init__(self, config: ModelConfig, train_config: TrainConfig, hparams: HParams):
        self.config, self.train_config, self.hparams = config, train_config, stack_hparams([hparams])
        self.program = compile_program(config, train_config, 1, make_mesh({"data": 1}))  # the twin has one device
        self.compile_seconds = self.program.compile_seconds
        self.parameters = accounting.parameters(config).total
        self.random = np.random.default_rng(int(hparams.seed))
        self.state = self.program.init(self.hparams)

    def params(self) -> Params:
        """Return the parameters as they are now, on the host."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[0], self.state.params)

    def run(self, count: int) -> tuple[float, list[float]]:
        """Train `count` steps; return (seconds in total, loss of each step)."""
        shape = (count, 1, self.train_config.batch_size, self.train_config.seq_len + 1)
        rows = self.random.integers(0, self.config.vocab_size, shape)
        tokens, targets = (np.ascontiguousarray(part, np.int32) for part in (rows[..., :-1], rows[..., 1:]))
        active, losses = np.ones(1, bool), []
        start = time.perf_counter()
        for index in range(count):
            batch = {"tokens": tokens[index], "targets": targets[index]}
            self.state, metrics = self.program.step(self.state, batch, self.hparams, active)
            losses.append(metrics["loss"])
        jax.block_until_ready((self.state, losses))
        return time.perf_counter() - start, [float(loss[0]) for loss in losses]


def _warm_up(contenders: Mapping[str, TrainSteps], tolerance: float) -> tuple[dict[str, int], float]:
    """Return (steps that fill about a second, the relative difference between the losses of the first steps)."""
    losses = {name: train(WARM_UP_STEPS)[1] for name, train in contenders.items()}
    difference = loss_difference(losses, tolerance)
    return {name: _steps_in_a_round(train) for name, train in contenders.items()}, difference


def _steps_in_a_round(train: TrainSteps) -> int:
    count = WARM_UP_STEPS
    while (seconds := train(count)[0]) < ROUND_SECONDS / 4:  # fast steps need more repeats
        count *= 2
    return max(1, round(ROUND_SECONDS * count / seconds))


def summarize(name: str, speeds: Mapping[str, list[float]], flops_per_token: Mapping[str, float]) -> ContenderSpeed:
    """Return the speed of a contender, and the ratio of our speed to its speed."""
    own = speeds[name]
    ratios = [ours / theirs for ours, theirs in zip(speeds["isoflop"], own, strict=True)]
    median = statistics.median(own)
    return ContenderSpeed(
        name=name,
        tokens_per_second=median,
        tokens_per_second_slowest=min(own),
        tokens_per_second_fastest=max(own),
        tokens_per_second_by_round=own,
        **median_and_range("isoflop_over_this", ratios),
        isoflop_over_this_at_best=max(speeds["isoflop"]) / max(own),
        flops_6nd_per_second=flops_per_token["6N"] * median,
        flops_exact_per_second=flops_per_token["exact"] * median,
    )
