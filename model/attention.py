"""Multi-head attention with grouped key/value heads, to a layer's own tokens or to an encoder's."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from model.cache import append, fill, slots_of, stored
from model.config import ModelConfig
from model.context import Context
from model.dropout import Dropout
from model.elementwise import softmax
from model.kernels import attend_fused, choose_kernel
from model.linear import Linear, side_by_side
from model.norm import Normalize
from model.parameterization import constant
from model.position import rotate
from model.sharding import constrain
from model.taps import NO_TAPS, Taps

Entry = tuple[Any, ...]
"""What a layer's cache holds of one attention: see `model.cache.LayerCache`."""
Mixed = tuple[Float[Array, "batch seq d_model"], Entry | None]
"""The mixed values, and the cache with this chunk in it."""


class Attention(nn.Module):
    """MHA (Vaswani et al. 2017), MQA (Shazeer 2019) or GQA (Ainslie et al. 2023), by `num_kv_heads`."""

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
        """Causal or not, windowed or not: as the context's mask says."""
        config = self.config
        heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
        made = side_by_side(x, *(projection(config, name, count) for name, count in heads.items()))
        query, key, value = (split_heads(x, count) for x, count in zip(made, heads.values(), strict=True))
        if config.qk_norm:
            query = Normalize(config, "rmsnorm", name="query_norm")(query)
            key = Normalize(config, "rmsnorm", name="key_norm")(key)
        if context.rotary is not None:
            query = rotate(query, context.rotary, config.rope_interleaved)
            key = rotate(key, context.rotary, config.rope_interleaved)
        keys, values = seen(cache, (key, value), context)
        sinks = None
        if config.attention_sinks:
            sinks = self.param("sinks", constant(0.0), (config.num_heads,))
        scale = config.attention_scale or config.head_dim**-0.5
        others = (cache, dropout, sinks, context.bias, config.attention_softcap)
        plain = not taps.touches("attention") and all(other is None for other in others)
        kernel = choose_kernel(context, query, plain)
        if kernel != "xla":
            return merge(config, attend_fused(kernel, query, key, value, context, scale), taps), None
        mixed = attend(
            query,
            keys,
            values,
            context.mask,
            scale=scale,
            bias=context.bias,
            softcap=config.attention_softcap,
            sinks=sinks,
            dropout=dropout,
            taps=taps,
        )
        if cache is not None:
            cache = remember(cache, (key, value), context, mixed)
        return merge(config, mixed, taps), cache


class CrossAttention(nn.Module):
    """Attention to what an encoder made (Vaswani et al. 2017, section 3.2.3), without positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: Entry | None = None,
        dropout: Dropout | None = None,
    ) -> Mixed:
        """Keys and values come from `context.encoder`, and without one from the cache."""
        config = self.config
        query = split_heads(projection(config, "query", config.num_heads)(x), config.num_heads)
        if context.encoder is not None:
            kv_heads = config.num_kv_heads
            made = side_by_side(context.encoder, *(projection(config, name, kv_heads) for name in ("key", "value")))
            made = [split_heads(x, kv_heads) for x in made]
            if cache is None:
                key, value = made
            else:
                cache = tuple(fill(old, new) for old, new in zip(cache, made, strict=True))
        if cache is not None:
            key, value = (stored(entry, query.dtype) for entry in cache)
        assert context.encoder_mask is not None
        scale = config.attention_scale or config.head_dim**-0.5
        mixed = attend(query, (key,), (value,), context.encoder_mask, scale=scale, dropout=dropout)
        return merge(config, mixed), cache


def projection(config: ModelConfig, name: str, heads: int) -> Linear:
    """The matrix `name` from the residual stream to `heads` heads side by side."""
    return Linear(config, heads * config.head_dim, "hidden", config.attention_bias, name=name)


def merge(
    config: ModelConfig, mixed: Float[Array, "batch heads seq head_dim"], taps: Taps = NO_TAPS
) -> Float[Array, "batch seq d_model"]:
    """Heads side by side through the output matrix."""
    batch, heads, seq, head_dim = mixed.shape
    joined = taps("heads", mixed.transpose(0, 2, 1, 3)).reshape(batch, seq, heads * head_dim)
    return Linear(config, config.d_model, "residual", config.attention_output_bias, name="output")(joined)


def split_heads(x: Float[Array, "batch seq features"], heads: int) -> Float[Array, "batch heads seq head_dim"]:
    """The last axis as [heads, head_dim]."""
    batch, seq, features = x.shape
    return x.reshape(batch, seq, heads, features // heads).transpose(0, 2, 1, 3)


def seen(cache: Entry | None, new: tuple[Array, ...], context: Context) -> tuple[tuple[Array, ...], ...]:
    """What attention sees of every array of an entry: the cache as it was, where there is one, then the chunk."""
    if cache is None or context.fresh:
        return tuple((x,) for x in new)
    return tuple((stored(old, x.dtype), x) for old, x in zip(cache, new, strict=True))


def remember(cache: Entry, new: tuple[Array, ...], context: Context, mixed: Float[Array, "batch heads seq _"]) -> Entry:
    """The cache with the chunk in it. A row whose attention gave an infinity is not written.

    That makes the write wait for the attention, so that compilers see that nobody reads the cache after it and write
    in place; a copy of the cache would cost as much as reading it. A context without slots leaves the cache as it is.
    """
    if context.slots is None:
        return cache
    if context.fresh and new[0].shape[2] <= slots_of(cache[0]):
        return tuple(fill(old, x) for old, x in zip(cache, new, strict=True))
    slots = jnp.where(jnp.isinf(mixed[:, 0, :1, 0]), slots_of(cache[0]), context.slots)
    return tuple(append(old, x, slots) for old, x in zip(cache, new, strict=True))


def attend(
    query: Float[Array, "batch heads seq head_dim"],
    keys: tuple[Float[Array, "_ kv_heads _ head_dim"], ...],
    values: tuple[Float[Array, "_ kv_heads _ value_dim"], ...],
    mask: Bool[Array, "mask_rows seq_or_one key"],
    *,
    scale: float,
    bias: Float[Array, "bias_rows heads seq key"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    dropout: Dropout | None = None,
    taps: Taps = NO_TAPS,
) -> Float[Array, "batch heads seq value_dim"]:
    """Scaled dot-product attention; softmax in float32. A query that sees no key gives zeros.

    keys and values come in one or several parts, one after the other along the axis that the mask calls "key": to join
    them would copy them. A part may have a row for each n rows of the batch that stand side by side and branch from it.
    softcap: scores become cap · tanh(scores / cap) (Gemma 2, section 2). sinks: a logit per head beside the keys that
    takes weight and gives nothing (Xiao et al. 2023; as in gpt-oss).
    """
    query = constrain(query, "batch", "heads", "sequence", None)
    whole = lambda x: constrain(x, "batch", "kv_heads", None, None)  # every query sees the whole row
    keys, values = tuple(map(whole, keys)), tuple(map(whole, values))
    batch, heads, seq, head_dim = query.shape
    kv_heads = keys[0].shape[1]
    # Folding the group into the query axis makes every variant one batched product over KV heads.
    query = query.reshape(batch, kv_heads, heads // kv_heads * seq, head_dim) * scale
    product = lambda key: _with_branches("bkqh,bkth->bkqt", query, key, preferred_element_type=jnp.float32)
    scores = jnp.concatenate([product(key) for key in keys], axis=-1) if len(keys) > 1 else product(keys[0])
    scores = scores.reshape(batch, heads, seq, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None], scores, -1e30)
    if sinks is not None:
        beside = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, beside], axis=-1)
    by_head = lambda x: x.reshape(batch, heads, seq, -1)
    grouped = lambda x: x.reshape(batch, kv_heads, heads // kv_heads * seq, -1)
    # Softmax in the shape that the product takes: its result is kept for both gradients once.
    weights = softmax(grouped(scores))
    weights = weights if sinks is None else weights[..., :-1]
    weights = weights if dropout is None else grouped(dropout(by_head(weights)))
    if taps.touches("attention"):
        weights = grouped(taps("attention", jnp.where(_sees_any(mask), by_head(weights), 0.0)))
    weights = weights.astype(values[0].dtype)
    ends = np.cumsum([value.shape[2] for value in values])[:-1]
    parts = jnp.split(weights, ends, axis=-1) if len(values) > 1 else [weights]
    pieces = [_with_branches("bkqt,bkth->bkqh", part, value) for part, value in zip(parts, values, strict=True)]
    mixed = functools.reduce(jnp.add, pieces).reshape(batch, heads, seq, values[0].shape[-1])
    # Weights that were looked at are zero already where nothing is seen, or what an edit made of them.
    return mixed if taps.touches("attention") else jnp.where(_sees_any(mask), mixed, 0)


def _sees_any(mask: Bool[Array, "mask_rows seq_or_one key"]) -> Bool[Array, "mask_rows 1 seq_or_one 1"]:
    """Which query sees a key: the softmax of no scores at all is an even one."""
    return mask.any(axis=-1)[:, None, :, None]


def _with_branches(product: str, x: Array, part: Array, **options: Any) -> Array:
    """Return the einsum of x [batch, kv_heads, query, …] and a part, with fewer rows where x branches from them."""
    rows, branches = part.shape[0], x.shape[0] // part.shape[0]
    if branches == 1:
        return jnp.einsum(product, x, part, **options)
    # Branches go into the query axis, too: no copy of the part for each of them.
    heads, queries = x.shape[1:3]
    folded = x.reshape(rows, branches, heads, queries, -1).swapaxes(1, 2).reshape(rows, heads, branches * queries, -1)
    made = jnp.einsum(product, folded, part, **options)
    return made.reshape(rows, heads, branches, queries, -1).swapaxes(1, 2).reshape(rows * branches, heads, queries, -1)
