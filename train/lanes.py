"""K trials as lanes of one compiled program. A solo run is the program with one lane.

A lane has its own hyperparameters, seed and data; all it shares with its neighbours is the compilation. A lane
that is not active (past its horizon), or that skipped too many steps in a row, is handed on without touching a bit.

An accelerator that small models leave idle runs lanes side by side, stacked and vmapped. The cores of a CPU are busy
with one: there lanes lie apart, and the program of one lane runs for each in turn (`train/apart.py`).
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from model import ModelConfig
from model.sharding import batch_sharding, check_batch, replicated, shardings
from train.apart import apart, gather, split
from train.config import HParams, TrainConfig
from train.gather import over_population, pick, replace_lane
from train.memory import Memory
from train.objective import Batch
from train.phases import Stage
from train.state import TrainState, init_state
from train.step import Metrics, eval_step, keep_if, train_step

Lanes = Any
"""A TrainState with leaves [lanes, …], or a list of TrainStates of one lane each."""
LaneMetrics = dict[str, Any]
"""By name: of every lane its value, an array [lanes] or a list."""


def init_lanes(config: ModelConfig, train_config: TrainConfig, hparams: HParams) -> TrainState:
    """Fresh lanes, stacked [lanes, …]; the leaves of `hparams` are [lanes]."""
    return _over_lanes(functools.partial(init_state, config, train_config), hparams)


def step_lanes(
    config: ModelConfig,
    train_config: TrainConfig,
    state: TrainState,
    batch: Batch,
    hparams: HParams,
    active: Bool[Array, " lanes"],
) -> tuple[TrainState, LaneMetrics]:
    """One `train_step` of every lane that is active and has not diverged; every metric is [lanes]."""

    def one(state: TrainState, batch: Batch, hparams: HParams, active: Array) -> tuple[TrainState, Metrics]:
        new, metrics = train_step(config, train_config, state, batch, hparams)
        alive = state.skipped_in_a_row < train_config.max_skipped
        return keep_if(active & alive, new, state), metrics

    return _over_lanes(one, state, batch, hparams, active)


def evaluate_lane(
    config: ModelConfig, state: TrainState, index: Int[Array, ""], batch: Batch, before: Float[Array, "2"]
) -> Float[Array, "2"]:
    """(summed nats, unmasked tokens) of one lane on one batch.

    before: what the batch before gave. It is not read, but makes the batches wait for one another: collectives of
    several programs at once can block all threads of a CPU's devices, each waiting for its own partners.
    """
    del before
    metrics = eval_step(config, pick(state.params, index), batch)
    return jnp.stack([metrics["loss"] * metrics["loss_tokens"], metrics["loss_tokens"]])


def _over_lanes(function: Callable, *arguments: Any) -> Any:
    """The function on every lane, over the leading axis of all arguments.

    One lane alone runs as written: a solo run pays nothing for lanes. Devices of a population axis do so with their
    own lanes, each for itself.
    """
    return over_population(functools.partial(_over_own_lanes, function))(*arguments)


def _over_own_lanes(function: Callable, *arguments: Any) -> Any:
    if jax.tree.leaves(arguments)[0].shape[0] > 1:
        return jax.vmap(function)(*arguments)
    result = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
    return jax.tree.map(lambda leaf: leaf[None], result)


def side_by_side() -> bool:
    """Whether lanes run by vmap, so that one that has ended still costs its work; else in turn, and it is skipped."""
    return jax.default_backend() != "cpu"


def lie_apart(mesh: Mesh) -> bool:
    """Whether several lanes are states of their own. Not over several devices, where programs that are under way at
    once may wait for one another's collectives for ever."""
    return not side_by_side() and mesh.size == 1


def as_lanes(mesh: Mesh, stacked: Any) -> Any:
    """A tree with leaves [lanes, …] as a program takes it: itself, or where lanes lie apart a list of their own."""
    lanes = jax.tree.leaves(stacked)[0].shape[0]
    return split(stacked, lanes) if lanes > 1 and lie_apart(mesh) else stacked


def compacts(wanted: bool | None) -> bool:
    """Whether lanes move to a smaller program once enough have ended (`Shell.compact`)."""
    return side_by_side() if wanted is None else wanted


@dataclasses.dataclass(frozen=True)
class Program:
    """Executables for one static shape; being compiled ahead, they can never recompile unseen.

    step(lanes, batches, hyperparameters, active): as `as_lanes` makes them; active is bool [lanes]. take(lanes, index)
    is a copy of one lane, put(lanes, index, lane) the lanes with one replaced. lane: its shapes and shardings.
    """

    init: Callable[[HParams], Lanes]
    step: Callable[[Lanes, Any, Any, Any], tuple[Lanes, LaneMetrics]]
    evaluate: Callable[[Lanes, Any, Batch, Any], Any]
    take: Callable[[Lanes, Any], TrainState]
    put: Callable[[Lanes, Any, TrainState], Lanes]
    lane: TrainState
    compile_seconds: float
    memory: Memory


# What runs once or rarely: compile time counts for more than speed; the numbers are the same.
_RUN_ONCE: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}


@functools.lru_cache(maxsize=64)
def compile_program(
    config: ModelConfig, train_config: TrainConfig, lanes: int, mesh: Mesh, stage: Stage | None = None
) -> Program:
    """Compile init, step and evaluation for `lanes` lanes: once per static shape and process, and, where lanes are
    stacked, lane count.

    stage: of a run in phases, whose batches and rotary base the step then has; evaluation keeps the TrainConfig's
    shapes. None: a run of one shape.
    """
    if lanes > 1 and lie_apart(mesh):
        return apart(compile_program(config, train_config, 1, mesh, stage), lanes)
    start = time.perf_counter()
    if stage is not None and stage.rope_base is not None:
        config = config.replace(rope_base=stage.rope_base)
    step, memory = _compile_step(
        config,
        train_config,
        lanes,
        mesh,
        stage.batch_size if stage else train_config.batch_size,
        stage.seq_len if stage else train_config.seq_len,
    )
    rest = _compile_rest(config, train_config.replace(accumulate=1), lanes, mesh)  # cuts are the step's alone
    return Program(step=step, memory=memory, compile_seconds=time.perf_counter() - start, **rest)


def compiled_programs() -> int:
    """How many training steps this process has compiled: one per static shape and number of stacked lanes."""
    return _compile_step.cache_info().misses


@functools.lru_cache(maxsize=64)
def _compile_step(
    config: ModelConfig, train_config: TrainConfig, lanes: int, mesh: Mesh, batch_size: int, seq_len: int
) -> tuple[Callable, Memory]:
    check_batch(mesh, batch_size // train_config.accumulate, seq_len)
    state, split = _state(config, train_config, lanes, mesh)
    everywhere, rows = replicated(mesh), batch_sharding(mesh, lanes=True)
    shape = (lanes, batch_size, seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in batch_spec(train_config).items()}
    active = jax.ShapeDtypeStruct((lanes,), bool)
    # Metrics stay where their lanes are, if this process can read them there.
    measured = everywhere if jax.process_count() > 1 else NamedSharding(mesh, PartitionSpec("population"))
    step = jax.jit(
        functools.partial(step_lanes, config, train_config),
        in_shardings=(split, rows, everywhere, everywhere),
        out_shardings=(split, measured),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch, _hparams(lanes), active).compile()
    return compiled, Memory.of(compiled)


@functools.lru_cache(maxsize=64)
def _compile_rest(config: ModelConfig, train_config: TrainConfig, lanes: int, mesh: Mesh) -> dict[str, Any]:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    state, split = _state(config, train_config, lanes, mesh)
    lane = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    split_lane = shardings(mesh, lane)
    lane = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), lane, split_lane)
    everywhere, rows = replicated(mesh), batch_sharding(mesh)
    shape = (train_config.batch_size, train_config.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in batch_spec(train_config).items()}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    init = jax.jit(functools.partial(init_lanes, config, train_config), out_shardings=split)
    evaluate = jax.jit(
        functools.partial(evaluate_lane, config),
        in_shardings=(split, everywhere, rows, everywhere),
        out_shardings=everywhere,
        keep_unused=True,
    )
    take = jax.jit(
        pick,
        in_shardings=(split, everywhere),
        out_shardings=split_lane,
    )
    put = jax.jit(
        replace_lane,
        in_shardings=(split, everywhere, split_lane),
        out_shardings=split,
        donate_argnums=0,
    )
    options = _RUN_ONCE if on_cpu and not jax.config.read("jax_disable_most_optimizations") else None
    with jax.set_mesh(mesh):
        return {
            "init": init.lower(_hparams(lanes)).compile(compiler_options=options),
            "evaluate": evaluate.lower(state, index, batch, jax.ShapeDtypeStruct((2,), jnp.float32)).compile(),
            "take": take.lower(state, index).compile(compiler_options=options),
            "put": _under(mesh, put),
            "lane": lane,
        }


def gather_lanes(mesh: Mesh, state: Lanes, sources: Int[np.ndarray, " fewer"]) -> Lanes:
    """A state of fewer lanes: those of these numbers, in this order; one that comes twice is padding."""
    if isinstance(state, list):
        return gather(state, sources)
    fewer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(sources), *leaf.shape[1:]), leaf.dtype), state)
    take = jax.jit(
        lambda state, sources: jax.tree.map(lambda leaf: leaf[sources], state),
        out_shardings=shardings(mesh, fewer, lanes=True),
    )
    with jax.set_mesh(mesh):
        return take(state, sources)


def _under(mesh: Mesh, function: Callable) -> Callable:
    """The function as traced for a mesh, whenever that is."""

    def run(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*arguments)

    return run


def _hparams(lanes: int) -> HParams:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((lanes,), leaf.dtype), HParams())


def _state(config: ModelConfig, train_config: TrainConfig, lanes: int, mesh: Mesh) -> tuple[TrainState, Any]:
    """Shapes of the stacked state, and how it is split."""
    state = jax.eval_shape(functools.partial(init_lanes, config, train_config), _hparams(lanes))
    return state, shardings(mesh, state, lanes=True)


def batch_spec(train_config: TrainConfig) -> dict[str, Any]:
    """What a batch of text holds, each [batch, seq], and its dtype."""
    spec: dict[str, Any] = {"tokens": np.int32, "targets": np.int32}
    if train_config.segment_documents:
        spec |= {"segment_ids": np.int32, "positions": np.int32, "loss_mask": np.float32}
    return spec
