"""Multi-head latent attention: keys and values of all heads come from one small vector per token, which is cached."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.attention import Entry, Mixed, attend, merge, remember, seen, split_heads
from model.config import ModelConfig
from model.context import Context
from model.dropout import Dropout
from model.linear import Linear
from model.norm import Normalize
from model.position import rotate, score_factor
from model.taps import NO_TAPS, Taps

_EPSILON = 1e-6  # of the norms between the down- and up-projections; the others have norm_epsilon


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1 and appendix C).

    Over whole rows keys and values are computed from the latent vectors. With a cache the up-projection is absorbed
    into query and output instead, so that all heads attend to the latent vectors themselves, as to one shared KV head:
    query · (latent @ key_up) = (query @ key_upᵀ) · latent.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: Entry | None = None,
        dropout: Dropout | None = None,
        taps: Taps = NO_TAPS,
    ) -> Mixed:
        """Attend as `Attention` does; the cache entry is one array [batch, 1, slots, kv_rank + rope_dim]."""
        config = self.config
        latent = config.latent
        assert latent is not None
        assert context.rotary is not None
        heads, dtype, tables = config.num_heads, x.dtype, context.rotary

        def linear(name: str, features: int, bias: bool = False) -> Linear:
            return Linear(config, features, "hidden", bias, name=name)

        def normalize(name: str, x: Array) -> Array:
            return Normalize(config, "rmsnorm", _EPSILON, name=name)(x)

        def rotated(x: Array) -> Array:
            return rotate(x, tables, config.rope_interleaved)

        if latent.q_rank is None:
            query = linear("query", heads * config.head_dim)(x)
        else:
            down = linear("query_down", latent.q_rank, config.attention_bias)(x)
            query = linear("query_up", heads * config.head_dim)(normalize("query_norm", down))
        query = split_heads(query, heads)
        query_nope, query_rope = query[..., : latent.nope_dim], rotated(query[..., latent.nope_dim :])

        down = linear("key_value_down", latent.kv_rank + latent.rope_dim, config.attention_bias)(x)
        compressed = normalize("key_value_norm", down[..., : latent.kv_rank])
        key_rope = rotated(down[:, None, :, latent.kv_rank :])
        up = linear("key_value_up", heads * (latent.nope_dim + latent.v_dim))
        scale = config.attention_scale or config.head_dim**-0.5 * score_factor(config.rope_scaling)
        score = functools.partial(
            attend, mask=context.mask, scale=scale, softcap=config.attention_softcap, dropout=dropout, taps=taps
        )
        if cache is None:
            key_nope, value = jnp.split(split_heads(up(compressed), heads), [latent.nope_dim], axis=-1)
            key_rope = jnp.broadcast_to(key_rope, (*key_nope.shape[:-1], latent.rope_dim))
            key = jnp.concatenate([key_nope, key_rope], axis=-1)
            query = jnp.concatenate([query_nope, query_rope], axis=-1)
            mixed = score(query, (key,), (value,))
        else:
            matrix = up.matrix().astype(dtype).reshape(latent.kv_rank, heads, -1)  # [kv_rank, heads, nope_dim + v_dim]
            key_up, value_up = matrix[..., : latent.nope_dim], matrix[..., latent.nope_dim :]
            new = jnp.concatenate([compressed[:, None], key_rope], axis=-1)
            (keys,) = seen(cache, (new,), context)
            query = jnp.concatenate([jnp.einsum("bhsn,rhn->bhsr", query_nope, key_up), query_rope], axis=-1)
            mixed = score(query, keys, keys)
            cache = remember(cache, (new,), context, mixed)
            mixed = jnp.einsum("bhsr,rhv->bhsv", mixed[..., : latent.kv_rank], value_up)
        return merge(config, mixed, taps), cache
