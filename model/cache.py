"""The KV cache: an explicit pytree, passed in and handed back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from model.checks import check_at_least_one
from model.config import ModelConfig
from model.dtypes import DTypeLike, dtype_name
from model.errors import InputError
from model.layout import layer_kinds
from model.sharding import constrain

LayerCache = dict[str, tuple[Any, ...]]
"""{"self": what the layer keeps of its own tokens, "cross": of the encoder's (encoder-decoder only)}.

Each is (keys, values), both [batch, kv_heads, slots, head_dim]; of latent attention it is one array
[batch, 1, slots, kv_rank + rope_dim] that serves as both. In int8 each is a `Quantised`.
"""
CACHE_DTYPES = ("float32", "bfloat16", "int8")


@struct.dataclass
class Quantised:
    """Vectors in int8, each with a scale for every part of its features: |error| ≤ scale / 2.

    parts: how many features share a scale; a latent vector's two halves differ in size.
    """

    values: Any  # int8 [batch, kv_heads, slots, features]
    scales: Any  # float32 [batch, kv_heads, slots, parts]
    parts: tuple[int, ...] = struct.field(pytree_node=False, default=())


@struct.dataclass
class KVCache:
    """What attention has seen: row b holds `lengths[b]` tokens, at positions 0 … lengths[b] − 1.

    One entry per layer, each an array of its own: a stacked one would be copied whenever a layer is taken out of it.
    A sliding-window layer holds only its window, position p in slot p mod its slots. encoder_lengths: tokens of each
    row's encoder side, for an encoder-decoder. capacity: tokens that a row can hold, spare: of them the newest that can
    be taken back (`rewind`), both static. Leaves are Any because JAX also fills the tree with shapes and shardings.
    """

    layers: Any  # tuple[LayerCache, ...]
    lengths: Any  # int32 [batch]
    encoder_lengths: Any = None  # int32 [batch] or None
    capacity: int = struct.field(pytree_node=False, default=0)
    spare: int = struct.field(pytree_node=False, default=0)

    def slots_of(self, layer: int) -> int:
        """Tokens that a layer can hold: the capacity, or fewer under a sliding window."""
        return slots_of(self.layers[layer]["self"][0])

    @property
    def encoder_capacity(self) -> int:
        """Encoder tokens that a row can hold."""
        return slots_of(self.layers[0]["cross"][0])


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: DTypeLike | None = None,
    encoder_capacity: int | None = None,
    spare: int = 0,
) -> KVCache:
    """An empty cache. dtype: float32, bfloat16 or int8, as a name or a dtype; None: the compute dtype.

    encoder_capacity: of an encoder-decoder; None: `capacity`. spare: so many of the newest tokens can be taken back
    (`rewind`); a window's layer keeps as many older ones for it. Under a mesh (`model.sharding.under_mesh_of`) rows are
    split over the axes of a batch and heads over "tensor", each as far as it divides them.
    Raises InputError where positions would run out, and for an encoder, which has nothing to remember.
    """
    if config.stack == "encoder":
        raise InputError("an encoder-only model has no cache: it does not generate; use apply or forward")
    check_at_least_one(batch=batch, capacity=capacity)
    if config.position == "learned" and capacity > config.max_seq_len:
        raise InputError(
            f"capacity={capacity} exceeds max_seq_len={config.max_seq_len}, where the learned positions end"
        )
    dtype = dtype_name(config.compute_dtype if dtype is None else dtype, CACHE_DTYPES, "cache dtype")

    def empty(heads: int, slots: int, parts: tuple[int, ...]) -> Any:
        shape = (batch, heads, slots)
        zeros = lambda features, dtype: constrain(jnp.zeros((*shape, features), dtype), "batch", "kv_heads", None, None)
        if dtype != "int8":
            return zeros(sum(parts), dtype)
        return Quantised(zeros(sum(parts), jnp.int8), zeros(len(parts), jnp.float32), parts)

    def entry(slots: int) -> tuple[Any, ...]:
        if config.latent is not None:
            return (empty(1, slots, (config.latent.kv_rank, config.latent.rope_dim)),)
        return tuple(empty(config.num_kv_heads, slots, (config.head_dim,)) for _ in range(2))

    layers = []
    for kind in layer_kinds(config):
        layer = {"self": entry(capacity if kind.window is None else min(kind.window + spare, capacity))}
        layers.append(layer | {"cross": entry(encoder_capacity or capacity)} if kind.cross else layer)
    lengths = lambda: jnp.zeros(batch, jnp.int32)
    return KVCache(
        layers=tuple(layers),
        lengths=lengths(),
        encoder_lengths=lengths() if config.stack == "encoder-decoder" else None,
        capacity=capacity,
        spare=spare,
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def grow(config: ModelConfig, cache: KVCache, capacity: int) -> KVCache:
    """The same rows with room for more. A copy, which doubling makes rare; raises InputError as `init_cache` does."""
    dtype = "int8" if isinstance(cache.layers[0]["self"][0], Quantised) else cache.layers[0]["self"][0].dtype.name
    sources = cache.encoder_capacity if config.stack == "encoder-decoder" else None
    larger = init_cache(config, cache.lengths.shape[0], capacity, dtype, sources, cache.spare)
    # A ring that grows was as long as the capacity, so that no position had wrapped around yet.
    copy = lambda old, new: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)
    return larger.replace(  # type: ignore[attr-defined]
        layers=jax.tree.map(copy, cache.layers, larger.layers),
        lengths=cache.lengths,
        encoder_lengths=cache.encoder_lengths,
    )


@jax.jit
def take(cache: KVCache, rows: Int[Array, " rows"]) -> KVCache:
    """These rows, in this order, any of them several times."""
    return jax.tree.map(lambda leaf: leaf[rows], cache)


def rewind(cache: KVCache, lengths: Int[Array, " batch"]) -> KVCache:
    """The rows as they were when they held `lengths` tokens: at most `spare` fewer where layers have windows."""
    return cache.replace(lengths=lengths)  # type: ignore[attr-defined]


def append(cache: Any, new: Float[Array, "batch kv_heads seq features"], slots: Int[Array, "batch seq"]) -> Any:
    """Write `new` at each row's own slots of an entry's array; a slot past the last is not written."""
    if isinstance(cache, Quantised):
        return _quantised(cache, new, lambda old, x: append(old, x, slots))
    new = new.astype(cache.dtype)
    if new.shape[2] == 1 and cache.shape[0] <= _FEW_ROWS and jax.default_backend() == "cpu":
        return _append_in_turn(cache, new, slots[:, 0])
    write_row = lambda row, update, slot: row.at[:, slot].set(update, mode="drop")
    return jax.vmap(write_row)(cache, new, slots)


def fill(cache: Any, new: Float[Array, "batch kv_heads seq features"]) -> Any:
    """Write `new` at the first slots of an entry's array, of every row."""
    if isinstance(cache, Quantised):
        return _quantised(cache, new, fill)
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, 0, 0, 0))


def slots_of(cache: Any) -> int:
    """Tokens that an entry's array can hold."""
    return (cache.values if isinstance(cache, Quantised) else cache).shape[2]


_FEW_ROWS = 32  # as many updates in turn cost a CPU less than one scatter, which it runs as a loop


def _append_in_turn(cache: Array, new: Array, slots: Int[Array, " batch"]) -> Array:
    last = cache.shape[2] - 1
    for row in range(cache.shape[0]):
        at = (row, 0, jnp.minimum(slots[row], last), 0)
        old = jax.lax.dynamic_slice(cache, at, (1, *new.shape[1:]))
        cache = jax.lax.dynamic_update_slice(cache, jnp.where(slots[row] <= last, new[row : row + 1], old), at)
    return cache


def stored(cache: Any, dtype: jnp.dtype) -> Float[Array, "batch kv_heads slots features"]:
    """The vectors of an entry's array, in this precision."""
    if not isinstance(cache, Quantised):
        return cache.astype(dtype)
    scales = [jnp.repeat(cache.scales[..., i : i + 1], size, axis=-1) for i, size in enumerate(cache.parts)]
    return cache.values.astype(dtype) * jnp.concatenate(scales, axis=-1).astype(dtype)


def _quantised(cache: Quantised, new: Array, write: Any) -> Quantised:
    """`write` of the values and of the scales: symmetric, the largest of each part becomes 127."""
    pieces = jnp.split(new.astype(jnp.float32), np.cumsum(cache.parts)[:-1], axis=-1)
    scales = [jnp.max(jnp.abs(piece), axis=-1, keepdims=True) / 127 for piece in pieces]
    values = [jnp.round(piece / jnp.where(scale > 0, scale, 1)) for piece, scale in zip(pieces, scales, strict=True)]
    return cache.replace(  # type: ignore[attr-defined]
        values=write(cache.values, jnp.concatenate(values, axis=-1)),
        scales=write(cache.scales, jnp.concatenate(scales, axis=-1)),
    )
