"""K trials as lanes of one compiled program. A solo run is the program with one lane.

A lane has its own hyperparameters, seed and data; all it shares with its neighbours is the compilation. A lane
that is not active (past its horizon), or that went non-finite once, is handed on without touching a bit.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from model import ModelConfig
from model.sharding import over_rows, replicated
from train.config import HParams, TrainConfig
from train.objective import Batch
from train.state import TrainState, init_state
from train.step import Metrics, eval_step, keep_if, metric_names, train_step

LaneMetrics = dict[str, Float[Array, " lanes"]]


@struct.dataclass
class Lanes:
    """Stacked states [lanes, …]. alive, bool [lanes]: whether a lane's every step so far was finite."""

    state: TrainState
    alive: Any


def init_lanes(config: ModelConfig, train_config: TrainConfig, hparams: HParams) -> Lanes:
    """Fresh lanes; the leaves of `hparams` are [lanes]."""
    state = _over_lanes(functools.partial(init_state, config, train_config), hparams)
    return Lanes(state=state, alive=jnp.ones(hparams.seed.shape, bool))


def step_lanes(
    config: ModelConfig,
    train_config: TrainConfig,
    lanes: Lanes,
    batch: Batch,
    hparams: HParams,
    active: Bool[Array, " lanes"],
) -> tuple[Lanes, LaneMetrics]:
    """One `train_step` of every lane that is active and alive; every metric is [lanes]."""

    def one(lane: Lanes, batch: Batch, hparams: HParams, active: Array) -> tuple[Lanes, Metrics]:
        new, metrics = train_step(config, train_config, lane.state, batch, hparams)
        still_alive = lane.alive & (~active | (metrics["finite"] > 0))
        return Lanes(state=keep_if(active & lane.alive, new, lane.state), alive=still_alive), metrics

    def one_if_active(lane: Lanes, batch: Batch, hparams: HParams, active: Array) -> tuple[Lanes, Metrics]:
        nothing = {name: jnp.zeros(()) for name in metric_names(config)}
        skip = lambda lane, *_: (lane, nothing)
        return jax.lax.cond(active & lane.alive, one, skip, lane, batch, hparams, active)

    return _over_lanes(one, lanes, batch, hparams, active, in_turn=one_if_active)


def evaluate_lane(config: ModelConfig, lanes: Lanes, index: Int[Array, ""], batch: Batch) -> Float[Array, "2"]:
    """(summed nats, unmasked tokens) of one lane on one batch."""
    params = jax.tree.map(lambda leaf: leaf[index], lanes.state.params)
    metrics = eval_step(config, params, batch)
    return jnp.stack([metrics["loss"] * metrics["loss_tokens"], metrics["loss_tokens"]])


def _over_lanes(function: Callable, *arguments: Any, in_turn: Callable | None = None) -> Any:
    """The function on every lane, over the leading axis of all arguments.

    An accelerator that small models leave idle runs lanes side by side (vmap). Two CPU cores are busy with one: there
    lanes run in turn within the one program (`in_turn` may then skip a lane that has nothing to do), which at width 24
    is 1.5 times as fast as vmap. One lane alone runs as written: a solo run pays nothing for lanes.
    """
    count = jax.tree.leaves(arguments)[0].shape[0]
    if count == 1:
        result = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
        return jax.tree.map(lambda leaf: leaf[None], result)
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda lane: (in_turn or function)(*lane), arguments)
    return jax.vmap(function)(*arguments)


@dataclasses.dataclass(frozen=True)
class Program:
    """Executables for one static shape; being compiled ahead, they can never recompile unseen."""

    init: Callable[[HParams], Lanes]
    step: Callable[[Lanes, Batch, HParams, Any], tuple[Lanes, LaneMetrics]]
    evaluate: Callable[[Lanes, Any, Batch], Any]
    compile_seconds: float


# Initialisation runs once, so its compile time counts for more than its speed; the numbers are the same.
_RUN_ONCE: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}


@functools.lru_cache(maxsize=64)
def compile_program(config: ModelConfig, train_config: TrainConfig, lanes: int, mesh: Mesh) -> Program:
    """Compile init, step and evaluation for `lanes` lanes: once per static shape and process."""
    start = time.perf_counter()
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    everywhere, rows = replicated(mesh), over_rows(mesh, axis=1)
    batch = {name: jax.ShapeDtypeStruct((lanes, *shape), dtype) for name, shape, dtype in _batch_spec(train_config)}
    one_batch = {name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for name, leaf in batch.items()}
    one_batch["loss_mask"] = jax.ShapeDtypeStruct(one_batch["tokens"].shape, jnp.float32)
    hparams = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((lanes,), leaf.dtype), HParams())
    active = jax.ShapeDtypeStruct((lanes,), bool)
    index = jax.ShapeDtypeStruct((), jnp.int32)

    init = jax.jit(functools.partial(init_lanes, config, train_config), out_shardings=everywhere)
    step = jax.jit(
        functools.partial(step_lanes, config, train_config),
        in_shardings=(everywhere, rows, everywhere, everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )
    evaluate = jax.jit(
        functools.partial(evaluate_lane, config),
        in_shardings=(everywhere, everywhere, over_rows(mesh)),
        out_shardings=everywhere,
    )
    state = jax.eval_shape(init, hparams)
    return Program(
        init=init.lower(hparams).compile(compiler_options=_RUN_ONCE if on_cpu else None),
        step=step.lower(state, batch, hparams, active).compile(),
        evaluate=evaluate.lower(state, index, one_batch).compile(),
        compile_seconds=time.perf_counter() - start,
    )


def compiled_programs() -> int:
    """How many programs this process has compiled: one per static shape and lane count."""
    return compile_program.cache_info().misses


def _batch_spec(train_config: TrainConfig) -> list[tuple[str, tuple[int, int], Any]]:
    shape = (train_config.batch_size, train_config.seq_len)
    spec: list[tuple[str, tuple[int, int], Any]] = [("tokens", shape, np.int32), ("targets", shape, np.int32)]
    if train_config.segment_documents:
        spec += [
            ("segment_ids", shape, np.int32),
            ("positions", shape, np.int32),
            ("loss_mask", shape, np.float32),
        ]
    return spec
