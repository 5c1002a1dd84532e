"""Compare our training step of a given model with Transformers, PEFT and TRL, in interleaved rounds."""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.bench.ceilings import cores
from experiments.bench.peers.child import Child, python_has
from experiments.bench.peers.twin import torch_python
from experiments.bench.rounds import TrainSteps, loss_difference, tokens_per_second
from experiments.bench.train.against_torch import WARM_UP_STEPS, ContenderSpeed, summarize
from model import Execution, ModelConfig, Params, accounting
from model.adapters import Adapter, init_adapter
from model.convert import save_hf, save_peft
from model.errors import InputError, check_at_least_one
from train import HParams, TrainConfig

_PEER = Path(__file__).parents[1] / "peers/hf_twin.py"
_OPTIMIZER = ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "clip_norm")
LOSS_TOLERANCE = 1e-4
Method = Literal["sft", "dpo"]
_REFERENCE = -2000.0  # the reference's log-probability of every answer, where a loss reads it


class Contender(Child):
    """A program that trains steps on request; peak_bytes: of its process so far."""

    def __init__(self, command: list[str], spec: dict[str, Any], name: str, log: Path):
        super().__init__([*command, json.dumps(spec)], name, log)
        self.peak_bytes = 0

    def run(self, count: int) -> tuple[float, list[float]]:
        """Train `count` steps; return (seconds in total, loss of each step)."""
        answer = self.ask(f"run {count}")
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"], answer["losses"]


@dataclasses.dataclass(frozen=True)
class TuningContender(ContenderSpeed):
    """A contender of `bench_against_transformers`."""

    peak_bytes: int
    """The largest resident memory of the process, its libraries and the loading of the weights included."""
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class TuningKind:
    """One kind of training, a contender per library."""

    trained: str
    """"all", or the adapter."""
    parameters: int
    trained_parameters: int
    loss_difference: float
    """The largest relative difference of the losses over the first steps."""
    contenders: list[TuningContender]


@dataclasses.dataclass(frozen=True)
class TuningComparison:
    """Our training of a given model compared with that of Transformers and PEFT."""

    load_average: float
    """The load average of the minute before the benchmark."""
    rounds: int
    kinds: list[TuningKind]
    versions: dict[str, Any]
    """The versions of the libraries."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def bench_against_transformers(
    config: ModelConfig,
    params: Params,
    train_config: TrainConfig,
    *,
    rank: int,
    rounds: int = 5,
    steps_per_round: int = 2,
    modes: tuple[str, ...] = ("eager",),
    method: Method | None = None,
    full: bool = True,
    execution: Execution = Execution(),
) -> TuningComparison:
    """Return tokens per second and peak memory of training, all parameters or an adapter's, of both libraries.

    Every contender is a process of its own that sleeps while another runs. All start from the same weights and the same
    adapter of rank `rank` (0: none), see the same random tokens and use AdamW with clipping at a constant rate, in
    float32, on as many threads as there are cores, without gradient checkpointing. Their losses over the first steps
    must agree. modes: of PyTorch, "eager" or "compile". method: compare with the step of TRL's trainer for it, on rows
    whose first quarter is a prompt, with a given reference; None: language modelling. full: also train all parameters.
    Raises InputError if Transformers, PEFT or TRL is not installed, or the model has no form there.
    """
    check_at_least_one(rounds=rounds, steps_per_round=steps_per_round)
    if not rank and not full:
        raise InputError("nothing to compare: give a rank, or full=True")
    python = torch_python()
    for module in ("transformers", *(["peft"] if rank else []), *(["trl"] if method else [])):
        if not python_has(python, module):
            raise InputError(
                f"{python} has no {module}: install isoflop[peers], or name a Python that has it in "
                "ISOFLOP_TORCH_PYTHON"
            )
    load_average = os.getloadavg()[0]
    values = HParams(learning_rate=1e-4).to_dict()
    shape: dict[str, Any] = {
        "batch_size": train_config.batch_size,
        "seq_len": train_config.seq_len,
        "threads": cores(),
        "seed": 0,
    }
    shape |= {"method": method, "reference": _REFERENCE}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isoflop-tune-")))
        save_hf(config, params, folder / "model")
        spec: dict[str, Any] = {"folder": str(folder / "model"), "execution": execution.to_dict(), **shape}
        spec["optimizer"] = {name: values[name] for name in _OPTIMIZER}
        kinds: dict[str, str | None] = {"all": None} if full else {}
        if rank:
            adapter = Adapter(rank=rank, alpha=float(rank))
            save_peft(config, adapter, init_adapter(config, adapter, params, jax.random.key(0)), folder / "adapter")
            kinds[f"LoRA {rank}"] = str(folder / "adapter")
        commands = {"isoflop": [sys.executable, "-m", "experiments.bench.peers.own_twin"]}
        peer = "trl" if method else "transformers"
        commands |= {f"{peer} {mode}": [python, str(_PEER)] for mode in modes}
        measured: list[TuningKind] = []
        versions: dict[str, Any] = {}
        for kind, place in kinds.items():
            with contextlib.ExitStack() as children:
                contenders: dict[str, Contender] = {}
                for name, command in commands.items():  # sequentially: compiling in parallel would distort the times
                    own = spec | {"adapter": place, "mode": name.split()[-1]}
                    contender = Contender(command, own, f"{name}, {kind}", folder / f"{name}.log")
                    contenders[name] = children.enter_context(contender)
                versions = contenders[f"{peer} {modes[0]}"].ready["versions"]
                measured.append(_measured(kind, config, contenders, rounds, steps_per_round, shape))
    return TuningComparison(load_average, rounds, measured, versions)


def _measured(
    kind: str, config: ModelConfig, contenders: dict[str, Contender], rounds: int, steps: int, shape: dict[str, Any]
) -> TuningKind:
    """Return the numbers of one kind of training, a row per contender. Raises RuntimeError if their losses differ."""
    losses = {name: contender.run(WARM_UP_STEPS)[1] for name, contender in contenders.items()}
    difference = loss_difference(losses, LOSS_TOLERANCE)
    runs: dict[str, TrainSteps] = {name: contender.run for name, contender in contenders.items()}
    tokens = shape["batch_size"] * shape["seq_len"] * (2 if shape["method"] == "dpo" else 1)
    speeds = tokens_per_second(runs, dict.fromkeys(runs, steps), rounds, tokens)
    flops = {name: accounting.flops_per_token(config, shape["seq_len"], name) for name in ("6N", "exact")}
    ready = {name: contender.ready for name, contender in contenders.items()}
    return TuningKind(
        trained=kind,
        parameters=ready["isoflop"]["parameters"],
        trained_parameters=ready["isoflop"]["trained"],
        loss_difference=difference,
        contenders=[
            TuningContender(
                **vars(summarize(name, speeds, flops)),
                peak_bytes=contenders[name].peak_bytes,
                compile_seconds=ready[name]["compile_seconds"],
            )
            for name in contenders
        ],
    )
