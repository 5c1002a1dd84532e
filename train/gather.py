"""Lanes taken out of a stacked state and put into it, also where a "population" axis has them on several devices.

There each device looks for the lane among its own and all add up what they found, so that a lane moves and not the
whole state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from model.sharding import parts_of_lanes

_OWN, _ALL = PartitionSpec("population"), PartitionSpec()


def over_population(function: Callable, in_specs: Any = _OWN, out_specs: Any = _OWN) -> Callable:
    """The function as each device of the population axis runs it on its own lanes; other axes stay the compiler's.

    To be called while a program is traced under `jax.set_mesh`; without such an axis, the function itself.
    """
    if parts_of_lanes() == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={"population"}, check_vma=False)


def pick(stacked: Any, index: Int[Array, ""]) -> Any:
    """One lane of a tree whose leaves are [lanes, …]."""

    def own(stacked: Any, index: Array) -> Any:
        here, mine = _place(stacked, index)
        found = jax.tree.map(lambda leaf: jnp.where(mine, leaf[here], jnp.zeros((), leaf.dtype)), stacked)
        return jax.lax.psum(found, "population")

    if parts_of_lanes() == 1:
        return jax.tree.map(lambda leaf: leaf[index], stacked)
    return over_population(own, (_OWN, _ALL), _ALL)(stacked, index)


def replace_lane(stacked: Any, index: Int[Array, ""], lane: Any) -> Any:
    """The tree with one lane replaced."""

    def own(stacked: Any, index: Array, lane: Any) -> Any:
        here, mine = _place(stacked, index)
        return jax.tree.map(lambda leaf, new: leaf.at[here].set(jnp.where(mine, new, leaf[here])), stacked, lane)

    if parts_of_lanes() == 1:
        return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), stacked, lane)
    return over_population(own, (_OWN, _ALL, _ALL), _OWN)(stacked, index, lane)


def _place(stacked: Any, index: Array) -> tuple[Array, Array]:
    """(where the lane is among a device's own, whether it is one of them)."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    here = index - jax.lax.axis_index("population") * count
    return jnp.clip(here, 0, count - 1), (here >= 0) & (here < count)
