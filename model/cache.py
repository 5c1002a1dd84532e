"""The KV cache: an explicit pytree, passed in and handed back."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.errors import InputError

LayerCache = tuple[Float[Array, "batch kv_heads capacity head_dim"], Float[Array, "batch kv_heads capacity head_dim"]]


@struct.dataclass
class KVCache:
    """What attention has seen: row b holds `lengths[b]` tokens, at positions 0 … lengths[b] − 1.

    One (keys, values) pair per layer, each an array of its own: a stacked one would be copied whenever a
    layer is taken out of it.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " batch"]

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.layers[0][0].shape[2]


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: str | None = None) -> KVCache:
    """An empty cache. dtype None: the compute dtype. Raises InputError where positions would run out."""
    if batch < 1 or capacity < 1:
        raise InputError(f"a cache needs at least one row and one position, not batch={batch}, capacity={capacity}")
    if config.position == "learned" and capacity > config.max_seq_len:
        raise InputError(
            f"capacity={capacity} exceeds max_seq_len={config.max_seq_len}, where the learned positions end"
        )
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    empty = lambda: jnp.zeros(shape, dtype or config.compute_dtype)
    layers = tuple((empty(), empty()) for _ in range(config.num_layers))
    return KVCache(layers=layers, lengths=jnp.zeros(batch, jnp.int32))


def append(
    cache: Float[Array, "batch kv_heads capacity head_dim"],
    new: Float[Array, "batch kv_heads seq head_dim"],
    slots: Int[Array, "batch seq"],
) -> Float[Array, "batch kv_heads capacity head_dim"]:
    """Write `new` at each row's own slots; a slot at or past the capacity is not written."""
    write_row = lambda row, update, slot: row.at[:, slot].set(update.astype(row.dtype), mode="drop")
    return jax.vmap(write_row)(cache, new, slots)
