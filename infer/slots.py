"""The programs that put requests into the rows of a batch: each compiles once per engine."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from infer.decode import STOPPED, DecodeState, Emitted, begin
from infer.sampling import GREEDY, History, SamplerState, row_keys
from model import KVCache, ModelConfig, init_cache

MOST_STOP_IDS = 32  # per request, so that all requests share one program


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(config: ModelConfig, capacity: int, dtype: str | None) -> KVCache:
    """Return the cache of one row."""
    return init_cache(config, 1, capacity, dtype, capacity)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(config: ModelConfig, slots: int, capacity: int, dtype: str | None, key: PRNGKeyArray) -> DecodeState:
    """Return stopped rows. They are greedy: one row that samples would make all rows pay for sampling."""
    samplings = [GREEDY] * slots
    zeros = jnp.zeros(slots, jnp.int32)
    return DecodeState(
        token=zeros,
        cache=init_cache(config, slots, capacity, dtype, capacity),
        history=History(jnp.zeros((slots, capacity), jnp.int32), zeros, zeros),
        sampler=SamplerState.create(
            samplings, row_keys(samplings, key), config.vocab_size, np.full((slots, MOST_STOP_IDS), -1, np.int32)
        ),
        stop_ids=jnp.full((slots, MOST_STOP_IDS), -1, jnp.int32),
        limits=zeros,
        status=zeros + STOPPED,
    )


@jax.jit
def choose_first(
    row: DecodeState,
    logits: Float[Array, "1 vocab"],
    masks: UInt32[Array, "1 words"],
    constrained: Bool[Array, " 1"],
) -> tuple[DecodeState, Emitted]:
    """Call `begin` without donation: requests with equal settings share the arrays of their sampler."""
    return begin(row, logits, masks, constrained)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
    block: int, state: DecodeState, row: DecodeState, cache: KVCache, slot: Int[Array, ""], blocks: Int[Array, ""]
) -> DecodeState:
    """Write a row into a slot, with the first `blocks` blocks of the row's cache.

    The rest of the slot keeps what it held, which is masked. The ring of a sliding-window layer is copied whole.
    """
    capacity, zero = state.cache.capacity, np.int32(0)
    length = min(block, capacity)

    def write(slots: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(slots, new, (slot, *[zero] * (slots.ndim - 1)))

    def write_ring(slots: Array, new: Array) -> Array:
        return slots if new.shape[2] == capacity else write(slots, new)

    def write_block(number: Array, layers: tuple) -> tuple:
        # The last block may end outside: JAX moves the slice back, in reading and writing.
        start = number * jnp.int32(block)

        def copy(slots: Array, new: Array) -> Array:
            if new.shape[2] != capacity:
                return slots
            part = jax.lax.dynamic_slice_in_dim(new, start, length, axis=2)
            return jax.lax.dynamic_update_slice(slots, part, (slot, zero, start, zero))

        return jax.tree.map(copy, layers, cache.layers)

    layers = jax.tree.map(write_ring, state.cache.layers, cache.layers)
    layers = jax.lax.fori_loop(jnp.int32(0), blocks, write_block, layers)
    cache_of_slots: Any = state.cache
    others = jax.tree.map(write, state.replace(cache=cache_of_slots.replace(layers=())), row)
    return others.replace(cache=others.cache.replace(layers=layers))
