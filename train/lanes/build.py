"""Build the `Program` of a model and a shape: choose its form and number of lanes, and compile it ahead."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import Execution, ModelConfig, Params
from model import init as init_model
from model.ambient import pinned
from model.sharding import batch_shardings, check_batch, parts_of_lanes, replicated, shardings
from train.config import HParams, TrainConfig
from train.lanes.program import Program
from train.lanes.sequential import SequentialProgram
from train.lanes.vmapped import (
    Executables,
    VmappedProgram,
    evaluate_lane,
    init_lanes,
    pick,
    replace_lane,
    score_lane,
    step_lanes,
)
from train.loop.memory import Memory
from train.objectives import LanguageModeling, Objective
from train.objectives.objective import BatchSpec
from train.plan import Stage
from train.state import TrainState
from train.task_sets import packed_spec

# For programs that run once or rarely, compile time matters more than speed; the numbers are the same.
_RUN_ONCE: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}


def prefers_vmap() -> bool:
    """Return whether lanes run vmapped, where a lane that has ended still costs its work; else sequentially."""
    return jax.default_backend() != "cpu"


def _is_sequential(mesh: Mesh) -> bool:
    """Return whether several lanes run one after the other.

    Never on several devices: programs that run at the same time there could wait for each other's collectives forever.
    """
    return not prefers_vmap() and mesh.size == 1


def lanes_for(mesh: Mesh, lanes: int, members: int) -> int:
    """Return the number of lanes of a program for this many members: `lanes`, rounded up to what the mesh divides.

    There are as many sequential lanes as members, independent of `lanes`: their number is not compiled into a program,
    so padding would be useless. Example: 6 vmapped lanes on a mesh with population=4 become 8, two per device.
    """
    if _is_sequential(mesh):
        lanes = members
    parts = parts_of_lanes(mesh)
    lanes_per_part = math.ceil(lanes / parts)
    return lanes_per_part * parts


def compacts(wanted: bool | None) -> bool:
    """Return whether lanes move to a smaller program once enough have ended (`RunOptions.compact`)."""
    return prefers_vmap() if wanted is None else wanted


@functools.lru_cache(maxsize=64)
@pinned()  # compiled programs are shared by callers under any settings
def compile_program(
    config: ModelConfig,
    train_config: TrainConfig,
    lanes: int,
    mesh: Mesh,
    stage: Stage | None = None,
    execution: Execution = Execution(),
    objective: Objective = LanguageModeling(),
    scored: tuple[int, int] | None = None,
) -> Program:
    """Compile init, step and evaluation for `lanes` lanes, once per process, static shape and number of vmapped lanes.

    stage: for a run in phases, gives the step's batch shape and rotary base; evaluation keeps the TrainConfig's shapes.
    None: a run of one shape. scored: tokens and predictions of a row of packed tasks, of which a batch has as many rows
    as the TrainConfig's; None: no tasks are scored.
    """
    execution = execution.replace(mesh=None, lanes=None)  # both are arguments here
    if lanes > 1 and _is_sequential(mesh):
        one = compile_program(config, train_config, 1, mesh, stage, execution, objective, scored)
        return SequentialProgram.of(one, lanes)
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
        execution,
        objective,
    )
    shapes = TrainConfig(  # without schedule and phases, which only the step reads
        batch_size=train_config.batch_size,
        seq_len=train_config.seq_len,
        optimizer=train_config.optimizer,
        segment_documents=train_config.tells_documents_apart,
    )
    plain = execution.replace(accumulate=1, loss_chunks=1)
    lane, rest = _compile_rest(config, shapes, lanes, mesh, plain, objective)
    if scored is not None:
        rest = rest | {"score": _compile_score(config, shapes, lanes, mesh, plain, objective, scored)}
    return VmappedProgram(lanes, lane, memory, time.perf_counter() - start, mesh, Executables(step=step, **rest))


def compiled_scorers() -> int:
    """Return how many programs this process has compiled that score tasks."""
    return _compile_score.cache_info().misses


def compiled_programs() -> int:
    """Return how many training steps this process has compiled: one per static shape and number of vmapped lanes."""
    return _compile_step.cache_info().misses


@functools.lru_cache(maxsize=64)
def _compile_step(
    config: ModelConfig,
    train_config: TrainConfig,
    lanes: int,
    mesh: Mesh,
    batch_size: int,
    seq_len: int,
    execution: Execution,
    objective: Objective,
) -> tuple[Callable, Memory]:
    check_batch(mesh, batch_size // execution.accumulate, seq_len)
    state, split = _state(config, train_config, lanes, mesh, objective)
    batch = with_lanes(objective.batch_spec(config, train_config, batch_size, seq_len), lanes)
    everywhere, rows = replicated(mesh), batch_shardings(mesh, batch, lanes=True)
    active, frozen = jax.ShapeDtypeStruct((lanes,), bool), frozen_shapes(config, objective)
    # Metrics stay on their lanes' devices if this process can read them there.
    measured = everywhere if jax.process_count() > 1 else NamedSharding(mesh, PartitionSpec("population"))
    step = jax.jit(
        functools.partial(step_lanes, config, train_config, objective=objective, execution=execution),
        in_shardings=(split, rows, everywhere, everywhere, shardings(mesh, frozen)),
        out_shardings=(split, measured),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch, _hparams(lanes), active, frozen).compile()
    return compiled, Memory.of(compiled)


@functools.lru_cache(maxsize=64)
def _compile_rest(
    config: ModelConfig,
    train_config: TrainConfig,
    lanes: int,
    mesh: Mesh,
    execution: Execution,
    objective: Objective,
) -> tuple[TrainState, dict[str, Callable]]:
    """Return the shapes and shardings of one lane, and all executables but the step."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    state, split = _state(config, train_config, lanes, mesh, objective)
    lane = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    split_lane = shardings(mesh, lane)
    lane = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), lane, split_lane)
    shape = (train_config.batch_size, train_config.seq_len)
    batch = objective.batch_spec(config, train_config, *shape, evaluation=True)
    everywhere, rows = replicated(mesh), batch_shardings(mesh, batch)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    before, frozen = _sums(objective), frozen_shapes(config, objective)
    init = jax.jit(functools.partial(init_lanes, config, train_config, objective=objective), out_shardings=split)
    evaluate = jax.jit(
        functools.partial(evaluate_lane, config, objective=objective, execution=execution),
        in_shardings=(split, everywhere, rows, everywhere, shardings(mesh, frozen), everywhere),
        out_shardings=everywhere,
        keep_unused=True,
    )
    take = jax.jit(pick, in_shardings=(split, everywhere), out_shardings=split_lane)
    put = jax.jit(replace_lane, in_shardings=(split, everywhere, split_lane), out_shardings=split, donate_argnums=0)
    options = _RUN_ONCE if on_cpu and not jax.config.read("jax_disable_most_optimizations") else None
    with jax.set_mesh(mesh):
        return lane, {
            "init": init.lower(_hparams(lanes)).compile(compiler_options=options),
            "evaluate": evaluate.lower(state, index, batch, before, frozen, _hparams(lanes)).compile(),
            "take": take.lower(state, index).compile(compiler_options=options),
            "put": _under(mesh, put),
        }


@functools.lru_cache(maxsize=64)
def _compile_score(
    config: ModelConfig,
    train_config: TrainConfig,
    lanes: int,
    mesh: Mesh,
    execution: Execution,
    objective: Objective,
    row: tuple[int, int],
) -> Callable:
    state, split = _state(config, train_config, lanes, mesh, objective)
    batch = packed_spec(train_config.batch_size, *row)
    everywhere, frozen = replicated(mesh), frozen_shapes(config, objective)
    index, before = jax.ShapeDtypeStruct((), jnp.int32), _sums(objective)
    score = jax.jit(
        functools.partial(score_lane, config, objective=objective, execution=execution),
        in_shardings=(split, everywhere, batch_shardings(mesh, batch), everywhere, shardings(mesh, frozen), everywhere),
        out_shardings=everywhere,
        keep_unused=True,
    )
    with jax.set_mesh(mesh):
        return score.lower(state, index, batch, before, frozen, _hparams(lanes)).compile()


def _sums(objective: Objective) -> jax.ShapeDtypeStruct:
    """Return the shape of the sums that evaluation passes from batch to batch."""
    return jax.ShapeDtypeStruct((len(objective.EVALUATED) + 1,), jnp.float32)


def _under(mesh: Mesh, function: Callable) -> Callable:
    """Return the function so that it is traced under the mesh, whenever it is called first."""

    def run(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*arguments)

    return run


def _hparams(lanes: int) -> HParams:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((lanes,), leaf.dtype), HParams())


def _state(
    config: ModelConfig, train_config: TrainConfig, lanes: int, mesh: Mesh, objective: Objective
) -> tuple[TrainState, Any]:
    """Return the shapes and the shardings of the stacked state."""
    init = functools.partial(init_lanes, config, train_config, objective=objective)
    state = jax.eval_shape(init, _hparams(lanes))
    return state, shardings(mesh, state, lanes=True)


def frozen_shapes(config: ModelConfig, objective: Objective) -> Params:
    """Return the shapes of the parameters that an objective does not train."""
    return jax.eval_shape(lambda key: objective.frozen(init_model(config, key)), jax.random.key(0))


def trained_shapes(config: ModelConfig, objective: Objective) -> Params:
    """Return the shapes of the parameters that an objective trains, those of its adapter among them."""
    return jax.eval_shape(lambda key: objective.trained(config, init_model(config, key), key), jax.random.key(0))


def with_lanes(spec: BatchSpec, lanes: int) -> BatchSpec:
    """Return the shapes of a batch with a leading axis of lanes."""
    return {name: jax.ShapeDtypeStruct((lanes, *array.shape), array.dtype) for name, array in spec.items()}
