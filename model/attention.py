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
"""The arrays of one attention in a layer's cache: see `model.cache.LayerCache`."""
Mixed = tuple[Float[Array, "batch seq d_model"], Entry | None]
"""The output of attention, and the cache entry with this chunk in it."""


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
        """Attend under the context's mask, and write the chunk's keys and values to the cache."""
        config = self.config
        heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
        projected = side_by_side(x, *(projection(config, name, count) for name, count in heads.items()))
        query, key, value = (split_heads(x, count) for x, count in zip(projected, heads.values(), strict=True))
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
        only_xla = (cache, dropout, sinks, context.bias, config.attention_softcap)
        fusible = not taps.touches("attention") and all(option is None for option in only_xla)
        kernel = choose_kernel(context, query, fusible)
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
    """Attention to an encoder's output (Vaswani et al. 2017, section 3.2.3), without positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: Entry | None = None,
        dropout: Dropout | None = None,
    ) -> Mixed:
        """Attend to `context.encoder`, whose keys and values go to the cache, or without one to the cache."""
        config = self.config
        query = split_heads(projection(config, "query", config.num_heads)(x), config.num_heads)
        if context.encoder is not None:
            kv_heads = config.num_kv_heads
            projections = (projection(config, name, kv_heads) for name in ("key", "value"))
            projected = [split_heads(x, kv_heads) for x in side_by_side(context.encoder, *projections)]
            if cache is None:
                key, value = projected
            else:
                cache = tuple(fill(old, new) for old, new in zip(cache, projected, strict=True))
        if cache is not None:
            key, value = (stored(entry, query.dtype) for entry in cache)
        assert context.encoder_mask is not None
        scale = config.attention_scale or config.head_dim**-0.5
        mixed = attend(query, (key,), (value,), context.encoder_mask, scale=scale, dropout=dropout)
        return merge(config, mixed), cache


def projection(config: ModelConfig, name: str, heads: int) -> Linear:
    """Return the projection `name` from the residual stream to the concatenated heads."""
    return Linear(config, heads * config.head_dim, "hidden", config.attention_bias, name=name)


def merge(
    config: ModelConfig, mixed: Float[Array, "batch heads seq head_dim"], taps: Taps = NO_TAPS
) -> Float[Array, "batch seq d_model"]:
    """Concatenate the heads and project them to the residual stream."""
    batch, heads, seq, head_dim = mixed.shape
    joined = taps("heads", mixed.transpose(0, 2, 1, 3)).reshape(batch, seq, heads * head_dim)
    return Linear(config, config.d_model, "residual", config.attention_output_bias, name="output")(joined)


def split_heads(x: Float[Array, "batch seq features"], heads: int) -> Float[Array, "batch heads seq head_dim"]:
    """Split the last axis into heads and move these before the sequence."""
    batch, seq, features = x.shape
    return x.reshape(batch, seq, heads, features // heads).transpose(0, 2, 1, 3)


def seen(cache: Entry | None, new: tuple[Array, ...], context: Context) -> tuple[tuple[Array, ...], ...]:
    """Return the parts that `attend` takes for each array of an entry: (cache before the chunk, chunk), or (chunk,)."""
    if cache is None or context.fresh:
        return tuple((x,) for x in new)
    return tuple((stored(old, x.dtype), x) for old, x in zip(cache, new, strict=True))


def remember(cache: Entry, new: tuple[Array, ...], context: Context, mixed: Float[Array, "batch heads seq _"]) -> Entry:
    """Return the cache entry with the chunk in it, at `context.slots`; unchanged if the context has no slots.

    A row whose attention gave an infinity is not written. This dependency makes the write wait for the attention, so
    that compilers see that nothing reads the old cache after it and write in place; a copy would cost as much as
    reading the cache.
    """
    if context.slots is None:
        return cache
    if context.fresh and new[0].shape[2] <= slots_of(cache[0]):
        return tuple(fill(old, x) for old, x in zip(cache, new, strict=True))
    not_written = slots_of(cache[0])
    slots = jnp.where(jnp.isinf(mixed[:, 0, :1, 0]), not_written, context.slots)
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
    """Return scaled dot-product attention, with softmax in float32; a query that sees no key gives zeros.

    keys, values: one or several parts, consecutive along the mask's "key" axis; concatenating them would copy them. A
    part may have fewer rows than the query: with batch = 6 and a part of 2 rows, the rows 0, 1, 2 of the query attend
    to the part's row 0 and the rows 3, 4, 5 to its row 1.
    softcap: scores become cap · tanh(scores / cap) (Gemma 2, section 2). sinks: a logit per head next to those of the
    keys, which takes weight and contributes no value (Xiao et al. 2023; as in gpt-oss).
    """
    query = constrain(query, "batch", "heads", "sequence", None)
    # Keys and values are not split over the sequence: every query sees the whole row.
    keys = tuple(constrain(key, "batch", "kv_heads", None, None) for key in keys)
    values = tuple(constrain(value, "batch", "kv_heads", None, None) for value in values)
    batch, heads, seq, head_dim = query.shape
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads

    def by_head(x: Array) -> Array:
        """Reshape [batch, kv_heads, group · seq, n] to [batch, heads, seq, n]."""
        return x.reshape(batch, heads, seq, -1)

    def by_kv_head(x: Array) -> Array:
        """Reshape [batch, heads, seq, n] to [batch, kv_heads, group · seq, n]."""
        return x.reshape(batch, kv_heads, group * seq, -1)

    # Folding the query heads of a group into the query axis makes MHA, MQA and GQA one batched product over KV heads.
    query = query.reshape(batch, kv_heads, group * seq, head_dim) * scale
    products = [_with_branches("bkqh,bkth->bkqt", query, key, preferred_element_type=jnp.float32) for key in keys]
    scores = by_head(jnp.concatenate(products, axis=-1) if len(products) > 1 else products[0])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None], scores, -1e30)
    if sinks is not None:
        sink_scores = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink_scores], axis=-1)
    # Softmax in the shape that the next product takes, so that the backward pass keeps its result once.
    weights = softmax(by_kv_head(scores))
    weights = weights if sinks is None else weights[..., :-1]
    weights = weights if dropout is None else by_kv_head(dropout(by_head(weights)))
    tapped = taps.touches("attention")
    if tapped:
        weights = by_kv_head(taps("attention", jnp.where(_sees_any(mask), by_head(weights), 0.0)))
    weights = weights.astype(values[0].dtype)
    ends = np.cumsum([value.shape[2] for value in values])[:-1]
    parts = jnp.split(weights, ends, axis=-1) if len(values) > 1 else [weights]
    products = [_with_branches("bkqt,bkth->bkqh", part, value) for part, value in zip(parts, values, strict=True)]
    mixed = by_head(functools.reduce(jnp.add, products))
    # Tapped weights are zero already where no key is seen, or an edit changed them on purpose.
    return mixed if tapped else jnp.where(_sees_any(mask), mixed, 0)


def _sees_any(mask: Bool[Array, "mask_rows seq_or_one key"]) -> Bool[Array, "mask_rows 1 seq_or_one 1"]:
    """Return which queries see any key: where all scores are masked, softmax gives even weights."""
    return mask.any(axis=-1)[:, None, :, None]


def _with_branches(product: str, x: Array, part: Array, **options: Any) -> Array:
    """Return the einsum of x [rows · branches, kv_heads, query, …] and a part [rows, kv_heads, …].

    Branches are folded into the query axis, so that the part is not copied for each of them. With 2 rows and 3
    branches: x [6, kv_heads, query, …] → [2, 3, kv_heads, query, …] → [2, kv_heads, 3 · query, …], and back.
    """
    rows, branches = part.shape[0], x.shape[0] // part.shape[0]
    if branches == 1:
        return jnp.einsum(product, x, part, **options)
    heads, queries = x.shape[1:3]
    folded = x.reshape(rows, branches, heads, queries, -1).swapaxes(1, 2).reshape(rows, heads, branches * queries, -1)
    y = jnp.einsum(product, folded, part, **options)
    return y.reshape(rows, heads, branches, queries, -1).swapaxes(1, 2).reshape(rows * branches, heads, queries, -1)
