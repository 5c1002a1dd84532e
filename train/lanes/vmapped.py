"""Run lanes vmapped: one state with leaves stacked [lanes, …]. A solo run is the program with one lane.

A lane has its own hyperparameters, seed and data and shares only the compilation with the other lanes. The state of a
lane that is not active (past its horizon), or that skipped too many steps in a row, stays the same bit by bit. Lanes
use the time that an accelerator would idle with one small model.

With a "population" axis every device holds and runs some of the lanes. To read or write one lane, each device looks for
it among its own, so that one lane is moved instead of the whole state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from model import Execution, ModelConfig, Params
from model.sharding import parts_of_lanes, shardings
from train.config import HParams, TrainConfig
from train.lanes.program import LaneMetrics, Program
from train.objectives import LanguageModeling, Objective
from train.objectives.objective import Batch, Metrics
from train.state import TrainState, init_state
from train.step import eval_step, score_step, train_step

_OWN, _ALL = PartitionSpec("population"), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Executables:
    """Functions of this file, compiled for one static shape and number of lanes; `put` compiles when first called.

    score: None for programs that score no tasks.
    """

    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, LaneMetrics]]
    evaluate: Callable[..., Array]
    take: Callable[..., TrainState]
    put: Callable[..., TrainState]
    score: Callable[..., tuple[Array, Array]] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class VmappedProgram(Program):
    """Run all lanes in one program; hyperparameters, batches and the state have leaves [lanes, …]."""

    mesh: Mesh
    executables: Executables

    def place(self, tree: Any, shardings: Any = None) -> Any:
        """Return the tree itself, or put it onto the devices."""
        return tree if shardings is None else jax.device_put(tree, shardings)

    def init(self, hparams: HParams) -> TrainState:
        """Return a fresh state."""
        return self.executables.init(hparams)

    def step(
        self,
        state: TrainState,
        batch: Batch,
        hparams: HParams,
        active: Bool[np.ndarray, " lanes"],
        frozen: Params | None = None,
    ) -> tuple[TrainState, LaneMetrics]:
        """Run `step_lanes`: an inactive lane still costs its work."""
        return self.executables.step(state, batch, hparams, active, frozen or {})

    def evaluate(
        self,
        state: TrainState,
        lane: int,
        batch: Batch,
        before: Float[Array | np.ndarray, " sums"],
        hparams: Any,
        frozen: Params | None = None,
    ) -> Float[Array, " sums"]:
        """Run `evaluate_lane`."""
        return self.executables.evaluate(state, np.int32(lane), batch, before, frozen or {}, hparams)

    def score(
        self,
        state: TrainState,
        lane: int,
        batch: Batch,
        before: Float[Array | np.ndarray, " sums"],
        hparams: Any,
        frozen: Params | None = None,
    ) -> tuple[Float[Array, "batch scored"], Float[Array, " sums"]]:
        """Run `score_lane`."""
        assert self.executables.score is not None, "compiled without tasks"
        return self.executables.score(state, np.int32(lane), batch, before, frozen or {}, hparams)

    def take(self, state: TrainState, lane: int) -> TrainState:
        """Return a copy of one lane's state."""
        return self.executables.take(state, np.int32(lane))

    def put(self, state: TrainState, lane: int, new: TrainState) -> TrainState:
        """Run `replace_lane`."""
        return self.executables.put(state, np.int32(lane), new)

    def compact(self, state: TrainState, sources: Int[np.ndarray, " fewer"]) -> TrainState:
        """Gather these lanes on the devices; padding repeats a lane."""
        fewer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(sources), *leaf.shape[1:]), leaf.dtype), state)
        take = jax.jit(
            lambda state, sources: jax.tree.map(lambda leaf: leaf[sources], state),
            out_shardings=shardings(self.mesh, fewer, lanes=True),
        )
        with jax.set_mesh(self.mesh):
            return take(state, sources)


def init_lanes(
    config: ModelConfig, train_config: TrainConfig, hparams: HParams, *, objective: Objective = LanguageModeling()
) -> TrainState:
    """Return fresh lanes, stacked [lanes, …]; the leaves of `hparams` are [lanes]."""
    init = functools.partial(init_state, config, train_config, objective=objective)
    return _over_lanes(lambda _, hparams: init(hparams), hparams)


def step_lanes(
    config: ModelConfig,
    train_config: TrainConfig,
    state: TrainState,
    batch: Batch,
    hparams: HParams,
    active: Bool[Array, " lanes"],
    frozen: Params | None = None,
    *,
    objective: Objective = LanguageModeling(),
    execution: Execution = Execution(),
) -> tuple[TrainState, LaneMetrics]:
    """Run `train_step` for every lane that is active and has not diverged; every metric is [lanes].

    frozen: parameters that all lanes read; a single copy for all of them.
    """

    def one(
        frozen: Params | None, state: TrainState, batch: Batch, hparams: HParams, active: Array
    ) -> tuple[TrainState, Metrics]:
        alive = state.skipped_in_a_row < train_config.max_skipped
        return train_step(
            config,
            train_config,
            state,
            batch,
            hparams,
            objective=objective,
            frozen=frozen,
            execution=execution,
            active=active & alive,
        )

    return _over_lanes(one, state, batch, hparams, active, shared=frozen)


def evaluate_lane(
    config: ModelConfig,
    state: TrainState,
    index: Int[Array, ""],
    batch: Batch,
    before: Float[Array, " means_and_weight"],
    frozen: Params | None = None,
    hparams: HParams | None = None,
    *,
    objective: Objective = LanguageModeling(),
    execution: Execution = Execution(),
) -> Float[Array, " means_and_weight"]:
    """Return the sums from which one lane's means are computed, for one batch, and last the batch's weight.

    For `LanguageModeling` these are (summed nats, unmasked tokens); see `Objective.evaluate`.
    before: the result of the previous batch. It is not read, but makes the batches run one after the other: collectives
    of several programs at the same time can block all threads of a CPU's devices, each waiting for its partners.
    """
    del before
    params, own = pick((state.params, hparams), index)
    metrics = eval_step(config, params, batch, objective=objective, frozen=frozen, hparams=own, execution=execution)
    weight = metrics[objective.WEIGHT]
    return jnp.stack([*(metrics[name] * weight for name in objective.EVALUATED), weight])


def score_lane(
    config: ModelConfig,
    state: TrainState,
    index: Int[Array, ""],
    batch: Batch,
    before: Float[Array, " sums"],
    frozen: Params | None = None,
    hparams: HParams | None = None,
    *,
    objective: Objective = LanguageModeling(),
    execution: Execution = Execution(),
) -> tuple[Float[Array, "batch scored"], Float[Array, " sums"]]:
    """Return the nats of each target of one lane for one batch of packed choices, and the `before` of the next batch.

    before: orders the batches as in `evaluate_lane`, whose last result the first batch gets.
    """
    params, own = pick((state.params, hparams), index)
    nats = score_step(config, params, batch, objective=objective, frozen=frozen, hparams=own, execution=execution)
    return nats, jnp.full_like(before, jnp.sum(nats))


def _over_lanes(function: Callable, *arguments: Any, shared: Any = None) -> Any:
    """Call `function(shared, …)` for every lane, over the leading axis of all arguments but `shared`.

    A single lane runs without vmap, so that a solo run pays nothing for lanes. On a mesh with a population axis each
    device does this with its own lanes.
    """
    run = functools.partial(_over_own_lanes, function)
    return _over_population(run, (_ALL, *[_OWN] * len(arguments)))(shared, *arguments)


def _over_own_lanes(function: Callable, shared: Any, *arguments: Any) -> Any:
    own = functools.partial(function, shared)
    if jax.tree.leaves(arguments)[0].shape[0] > 1:
        return jax.vmap(own)(*arguments)
    result = own(*jax.tree.map(lambda leaf: leaf[0], arguments))
    return jax.tree.map(lambda leaf: leaf[None], result)


def _over_population(function: Callable, in_specs: Any = _OWN, out_specs: Any = _OWN) -> Callable:
    """Return the function mapped over the population axis, each device with its own lanes; other axes stay automatic.

    Call this while a program is traced under `jax.set_mesh`. Without a population axis it returns the function itself.
    """
    if parts_of_lanes() == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={"population"}, check_vma=False)


def pick(stacked: Any, index: Int[Array, ""]) -> Any:
    """Return one lane of a tree whose leaves are [lanes, …]."""

    def own(stacked: Any, index: Array) -> Any:
        here, mine = _place(stacked, index)
        found = jax.tree.map(lambda leaf: jnp.where(mine, leaf[here], jnp.zeros((), leaf.dtype)), stacked)
        return jax.lax.psum(found, "population")

    if parts_of_lanes() == 1:
        return jax.tree.map(lambda leaf: leaf[index], stacked)
    return _over_population(own, (_OWN, _ALL), _ALL)(stacked, index)


def replace_lane(stacked: Any, index: Int[Array, ""], lane: Any) -> Any:
    """Return the tree with one lane replaced."""

    def own(stacked: Any, index: Array, lane: Any) -> Any:
        here, mine = _place(stacked, index)
        return jax.tree.map(lambda leaf, new: leaf.at[here].set(jnp.where(mine, new, leaf[here])), stacked, lane)

    if parts_of_lanes() == 1:
        return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), stacked, lane)
    return _over_population(own, (_OWN, _ALL, _ALL), _OWN)(stacked, index, lane)


def _place(stacked: Any, index: Array) -> tuple[Array, Array]:
    """Return (the lane's index among this device's lanes, whether it is one of them).

    Example: with 2 lanes per device, lane 5 has index 1 on the third device, which holds the lanes 4 and 5; on the
    other devices the index is clipped to a valid one and the second value is False.
    """
    count = jax.tree.leaves(stacked)[0].shape[0]
    here = index - jax.lax.axis_index("population") * count
    return jnp.clip(here, 0, count - 1), (here >= 0) & (here < count)
