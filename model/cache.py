"""The KV cache: an explicit pytree, passed in and handed back."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.errors import InputError
from model.layout import layer_kinds

LayerCache = dict[str, tuple[Array, ...]]
"""{"self": what the layer keeps of its own tokens, "cross": of the encoder's (encoder-decoder only)}.

Each is (keys, values), both [batch, kv_heads, slots, head_dim]; of latent attention it is one array
[batch, 1, slots, kv_rank + rope_dim] that serves as both.
"""


@struct.dataclass
class KVCache:
    """What attention has seen: row b holds `lengths[b]` tokens, at positions 0 … lengths[b] − 1.

    One entry per layer, each an array of its own: a stacked one would be copied whenever a layer is taken out of it.
    A sliding-window layer holds only its window, position p in slot p mod window. encoder_lengths: tokens of each
    row's encoder side, for an encoder-decoder. capacity: tokens that a row can hold, static. Leaves are Any because
    JAX also fills the tree with shapes and shardings.
    """

    layers: Any  # tuple[LayerCache, ...]
    lengths: Any  # int32 [batch]
    encoder_lengths: Any = None  # int32 [batch] or None
    capacity: int = struct.field(pytree_node=False, default=0)

    @property
    def encoder_capacity(self) -> int:
        """Encoder tokens that a row can hold."""
        return self.layers[0]["cross"][0].shape[2]


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: str | None = None, encoder_capacity: int | None = None
) -> KVCache:
    """An empty cache. dtype None: the compute dtype. encoder_capacity: of an encoder-decoder; None: `capacity`.

    Raises InputError where positions would run out, and for an encoder, which has nothing to remember.
    """
    if config.stack == "encoder":
        raise InputError("an encoder-only model has no cache: it does not generate; use apply or forward")
    if batch < 1 or capacity < 1:
        raise InputError(f"a cache needs at least one row and one position, not batch={batch}, capacity={capacity}")
    if config.position == "learned" and capacity > config.max_seq_len:
        raise InputError(
            f"capacity={capacity} exceeds max_seq_len={config.max_seq_len}, where the learned positions end"
        )
    empty = lambda heads, slots, features: jnp.zeros((batch, heads, slots, features), dtype or config.compute_dtype)

    def pair(slots: int) -> tuple[Array, ...]:
        if config.latent is not None:
            return (empty(1, slots, config.latent.kv_rank + config.latent.rope_dim),)
        return tuple(empty(config.num_kv_heads, slots, config.head_dim) for _ in range(2))

    layers = []
    for kind in layer_kinds(config):
        layer = {"self": pair(capacity if kind.window is None else min(kind.window, capacity))}
        layers.append(layer | {"cross": pair(encoder_capacity or capacity)} if kind.cross else layer)
    lengths = lambda: jnp.zeros(batch, jnp.int32)
    return KVCache(
        layers=tuple(layers),
        lengths=lengths(),
        encoder_lengths=lengths() if config.stack == "encoder-decoder" else None,
        capacity=capacity,
    )


def append(
    cache: Float[Array, "batch kv_heads slots features"],
    new: Float[Array, "batch kv_heads seq features"],
    slots: Int[Array, "batch seq"],
) -> Float[Array, "batch kv_heads slots features"]:
    """Write `new` at each row's own slots; a slot past the last is not written."""
    write_row = lambda row, update, slot: row.at[:, slot].set(update.astype(row.dtype), mode="drop")
    return jax.vmap(write_row)(cache, new, slots)
