"""Multi-head attention with grouped key/value heads, with and without a cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from model.cache import LayerCache, append
from model.config import ModelConfig
from model.dropout import Dropout
from model.linear import Linear
from model.position import rotate


@struct.dataclass
class Context:
    """What every layer of one pass shares.

    mask: which key each query sees. rotary: (cos, sin) tables or None. slots: with a cache, the position
    at which each token's key and value are written (the capacity or more: not written).
    """

    mask: Bool[Array, "batch query key"]
    rotary: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]] | None
    slots: Int[Array, "batch seq"] | None = None


class Attention(nn.Module):
    """MHA (Vaswani et al. 2017), MQA (Shazeer 2019) or GQA (Ainslie et al. 2023), by `num_kv_heads`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: LayerCache | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache | None, Float[Array, "batch heads seq key"]]:
        """The mixed values, the cache with this chunk in it, and the attention weights (float32)."""
        config = self.config
        project = lambda heads, name: _split_heads(
            Linear(heads * config.head_dim, "hidden", use_bias=config.use_bias, name=name)(x), heads
        )
        query = project(config.num_heads, "query")
        key = project(config.num_kv_heads, "key")
        value = project(config.num_kv_heads, "value")
        if context.rotary is not None:
            query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        if cache is not None:
            assert context.slots is not None
            cache = (append(cache[0], key, context.slots), append(cache[1], value, context.slots))
            key, value = (array.astype(query.dtype) for array in cache)
        mixed, weights = attend(query, key, value, context.mask, dropout)
        output = Linear(config.d_model, "residual", config.num_layers, config.use_bias, name="output")
        return output(_merge_heads(mixed)), cache, weights


def attend(
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch kv_heads key head_dim"],
    value: Float[Array, "batch kv_heads key head_dim"],
    mask: Bool[Array, "batch seq key"],
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "batch heads seq head_dim"], Float[Array, "batch heads seq key"]]:
    """Scaled dot-product attention; softmax in float32. A query that sees no key gives zeros."""
    batch, heads, seq, head_dim = query.shape
    kv_heads = key.shape[1]
    # Folding the group into the query axis makes every variant one batched product over KV heads.
    query = query.reshape(batch, kv_heads, heads // kv_heads * seq, head_dim) * head_dim**-0.5
    scores = jnp.einsum("bkqh,bkth->bkqt", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, seq, -1)
    scores = jnp.where(mask[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(mask.any(axis=-1)[:, None, :, None], weights, 0.0)
    if dropout is not None:
        weights = dropout(weights)
    grouped = weights.astype(value.dtype).reshape(batch, kv_heads, -1, weights.shape[-1])
    mixed = jnp.einsum("bkqt,bkth->bkqh", grouped, value)
    return mixed.reshape(batch, heads, seq, head_dim), weights


def _split_heads(x: Float[Array, "batch seq features"], heads: int) -> Float[Array, "batch heads seq head_dim"]:
    batch, seq, features = x.shape
    return x.reshape(batch, seq, heads, features // heads).transpose(0, 2, 1, 3)


def _merge_heads(x: Float[Array, "batch heads seq head_dim"]) -> Float[Array, "batch seq features"]:
    batch, heads, seq, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, seq, heads * head_dim)
