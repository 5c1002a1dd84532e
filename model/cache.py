"""The KV cache: an explicit pytree that every function takes and returns.

A layer stores position p in slot p mod slots. With full attention there are as many slots as positions, so that p is
its own slot; under a sliding window the slots are a ring in which a token overwrites the one that left the window.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.dtypes import DTypeLike, dtype_name
from model.errors import InputError, check_at_least_one
from model.layout import layer_kinds
from model.sharding import constrain

LayerCache = dict[str, tuple[Any, ...]]
"""{"self": keys and values of the layer's own tokens, "cross": of the encoder's (encoder-decoder only)}.

Each is (keys, values), both [batch, kv_heads, slots, head_dim]; for latent attention it is one array
[batch, 1, slots, kv_rank + rope_dim] that serves as both. In int8 each array is a `Quantised`.
"""
CACHE_DTYPES = ("float32", "bfloat16", "int8")


@struct.dataclass
class Quantised:
    """Vectors in int8 with one or several float32 scales per vector: |error| ≤ scale / 2.

    parts: the number of features under each scale; (head_dim,) for keys and values, (kv_rank, rope_dim) for a latent
    vector, whose two parts differ in magnitude.
    """

    values: Any  # int8 [batch, kv_heads, slots, features]
    scales: Any  # float32 [batch, kv_heads, slots, parts]
    parts: tuple[int, ...] = struct.field(pytree_node=False, default=())


@struct.dataclass
class KVCache:
    """Keys and values of the tokens so far: row b holds `lengths[b]` tokens, at positions 0 … lengths[b] − 1.

    layers: one entry per layer, each an array of its own: indexing a stacked array would copy the layer.
    encoder_lengths: the number of encoder tokens in each row of an encoder-decoder. capacity: the number of tokens that
    a row can hold. spare: how many of the newest tokens `rewind` can remove. Both are static. Leaves are Any because
    JAX also fills the tree with shapes and shardings.
    """

    layers: Any  # tuple[LayerCache, ...]
    lengths: Any  # int32 [batch]
    encoder_lengths: Any = None  # int32 [batch] or None
    capacity: int = struct.field(pytree_node=False, default=0)
    spare: int = struct.field(pytree_node=False, default=0)

    def slots_of(self, layer: int) -> int:
        """Return how many tokens a layer can hold: the capacity, or fewer under a sliding window."""
        return slots_of(self.layers[layer]["self"][0])

    @property
    def encoder_capacity(self) -> int:
        """The number of encoder tokens that a row can hold."""
        return slots_of(self.layers[0]["cross"][0])


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: DTypeLike | None = None,
    encoder_capacity: int | None = None,
    spare: int = 0,
) -> KVCache:
    """Return an empty cache for `batch` rows of up to `capacity` tokens.

    dtype: float32, bfloat16 or int8, as a name or a dtype; None: the compute dtype. encoder_capacity: the number of
    encoder tokens in a row of an encoder-decoder; None: `capacity`. spare: how many of the newest tokens `rewind` can
    remove; a layer with a window has as many more slots. Under a mesh (`model.sharding.under_mesh_of`) rows are split
    over the axes of a batch and heads over "tensor", each as far as its size divides them.
    Raises InputError for an encoder, which does not generate, and where learned positions end before the capacity.
    """
    if config.stack == "encoder":
        raise InputError("an encoder-only model has no cache: it does not generate; use apply or forward")
    check_at_least_one(batch=batch, capacity=capacity)
    if config.position == "learned" and capacity > config.max_seq_len:
        raise InputError(
            f"capacity={capacity} exceeds max_seq_len={config.max_seq_len}, where the learned positions end"
        )
    dtype = dtype_name(config.compute_dtype if dtype is None else dtype, CACHE_DTYPES, "cache dtype")

    def zeros(heads: int, slots: int, features: int, dtype: DTypeLike) -> Array:
        return constrain(jnp.zeros((batch, heads, slots, features), dtype), "batch", "kv_heads", None, None)

    def empty(heads: int, slots: int, parts: tuple[int, ...]) -> Any:
        if dtype != "int8":
            return zeros(heads, slots, sum(parts), dtype)
        values, scales = zeros(heads, slots, sum(parts), jnp.int8), zeros(heads, slots, len(parts), jnp.float32)
        return Quantised(values, scales, parts)

    def entry(slots: int) -> tuple[Any, ...]:
        if config.latent is not None:
            return (empty(1, slots, (config.latent.kv_rank, config.latent.rope_dim)),)
        return tuple(empty(config.num_kv_heads, slots, (config.head_dim,)) for _ in ("key", "value"))

    layers = []
    for kind in layer_kinds(config):
        slots = capacity if kind.window is None else min(kind.window + spare, capacity)
        layer = {"self": entry(slots)}
        if kind.cross:
            layer["cross"] = entry(encoder_capacity or capacity)
        layers.append(layer)
    return KVCache(
        layers=tuple(layers),
        lengths=jnp.zeros(batch, jnp.int32),
        encoder_lengths=jnp.zeros(batch, jnp.int32) if config.stack == "encoder-decoder" else None,
        capacity=capacity,
        spare=spare,
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def grow(config: ModelConfig, cache: KVCache, capacity: int) -> KVCache:
    """Return a copy of the cache with a larger capacity; doubling it makes copies rare.

    Raises InputError as `init_cache` does.
    """
    dtype = "int8" if isinstance(cache.layers[0]["self"][0], Quantised) else cache.layers[0]["self"][0].dtype.name
    sources = cache.encoder_capacity if config.stack == "encoder-decoder" else None
    larger = init_cache(config, cache.lengths.shape[0], capacity, dtype, sources, cache.spare)

    # A ring that grows had as many slots as the capacity, so that no position has wrapped around yet.
    def copy(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)

    return larger.replace(  # type: ignore[attr-defined]
        layers=jax.tree.map(copy, cache.layers, larger.layers),
        lengths=cache.lengths,
        encoder_lengths=cache.encoder_lengths,
    )


@jax.jit
def take(cache: KVCache, rows: Int[Array, " rows"]) -> KVCache:
    """Return a cache of these rows, in this order; a row may occur several times."""
    return jax.tree.map(lambda leaf: leaf[rows], cache)


def rewind(cache: KVCache, lengths: Int[Array, " batch"]) -> KVCache:
    """Return the rows shortened to `lengths` tokens, at most `spare` fewer than now where layers have windows."""
    return cache.replace(lengths=lengths)  # type: ignore[attr-defined]


def ring_positions(newest: Int[Array, "batch 1"], slots: int) -> Int[Array, "batch slots"]:
    """Return the position stored in each slot of a layer; negative: the slot is empty.

    newest: the position of each row's last token, −1 for an empty row. Slot i holds the last position p ≤ newest with
    p mod slots = i, which lies (newest − i) mod slots before the newest one.

    With 4 slots and newest = 5, the slots hold the positions 4, 5, 2, 3. With newest = 1 they hold 0, 1, −2, −1: the
    last two are empty.
    """
    return newest - (newest - jnp.arange(slots)[None]) % slots


def ring_slots(
    positions: Int[Array, "batch seq"], written: Bool[Array, "batch seq"], end: Int[Array, " batch"], slots: int
) -> Int[Array, "batch seq"]:
    """Return the slot of a layer into which each token of a chunk is written; `slots`: none.

    written: False for padding. end: each row's length after the chunk. Of a chunk longer than the ring only the last
    `slots` tokens are written, so that no two go to one slot.

    With 4 slots, a chunk at the positions 3 … 8 (end = 9) goes to the slots 4, 4, 1, 2, 3, 0: the positions 5 … 8 are
    written, 3 and 4 are not.
    """
    return jnp.where(written & (positions >= end[:, None] - slots), positions % slots, slots)


def append(cache: Any, new: Float[Array, "batch kv_heads seq features"], slots: Int[Array, "batch seq"]) -> Any:
    """Return an entry's array with `new` written at each row's slots; a slot past the last is not written."""
    if isinstance(cache, Quantised):
        return _quantised(cache, new, lambda old, x: append(old, x, slots))
    new = new.astype(cache.dtype)
    if new.shape[2] == 1 and cache.shape[0] <= _FEW_ROWS and jax.default_backend() == "cpu":
        return _append_row_by_row(cache, new, slots[:, 0])

    def write_row(row: Array, update: Array, slots: Array) -> Array:
        return row.at[:, slots].set(update, mode="drop")

    return jax.vmap(write_row)(cache, new, slots)


def fill(cache: Any, new: Float[Array, "batch kv_heads seq features"]) -> Any:
    """Return an entry's array with `new` written at the first slots of every row."""
    if isinstance(cache, Quantised):
        return _quantised(cache, new, fill)
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, 0, 0, 0))


def slots_of(cache: Any) -> int:
    """Return how many tokens an entry's array can hold."""
    return (cache.values if isinstance(cache, Quantised) else cache).shape[2]


_FEW_ROWS = 32  # up to this many rows, updates one by one cost a CPU less than one scatter, which it runs as a loop


def _append_row_by_row(cache: Array, new: Array, slots: Int[Array, " batch"]) -> Array:
    last = cache.shape[2] - 1
    for row in range(cache.shape[0]):
        start = (row, 0, jnp.minimum(slots[row], last), 0)
        old = jax.lax.dynamic_slice(cache, start, (1, *new.shape[1:]))
        update = jnp.where(slots[row] <= last, new[row : row + 1], old)
        cache = jax.lax.dynamic_update_slice(cache, update, start)
    return cache


def stored(cache: Any, dtype: jnp.dtype) -> Float[Array, "batch kv_heads slots features"]:
    """Return the vectors of an entry's array in this precision."""
    if not isinstance(cache, Quantised):
        return cache.astype(dtype)
    scales = [jnp.repeat(cache.scales[..., i : i + 1], size, axis=-1) for i, size in enumerate(cache.parts)]
    return cache.values.astype(dtype) * jnp.concatenate(scales, axis=-1).astype(dtype)


def _quantised(cache: Quantised, new: Array, write: Callable[[Array, Array], Array]) -> Quantised:
    """Quantise `new` and write its values and scales; the largest entry of each part becomes ±127."""
    pieces = jnp.split(new.astype(jnp.float32), np.cumsum(cache.parts)[:-1], axis=-1)
    scales = [jnp.max(jnp.abs(piece), axis=-1, keepdims=True) / 127 for piece in pieces]
    values = [jnp.round(piece / jnp.where(scale > 0, scale, 1)) for piece, scale in zip(pieces, scales, strict=True)]
    return cache.replace(  # type: ignore[attr-defined]
        values=write(cache.values, jnp.concatenate(values, axis=-1)),
        scales=write(cache.scales, jnp.concatenate(scales, axis=-1)),
    )
