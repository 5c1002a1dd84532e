"""What the layers of one pass share: who sees whom, and where everybody stands."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from model.cache import KVCache
from model.config import ModelConfig
from model.execution import Execution
from model.layout import LayerKind
from model.position import RotaryTables, alibi_bias, relative_bias, rotary_tables


@struct.dataclass
class Context:
    """One per kind of layer. Where all rows are alike, an axis of rows is 1, else it is the batch.

    mask: which key each query sees. bias: added to the scores, or None. rotary: tables for this pass's tokens, or
    None. real: False for padding. slots: with a cache, where each token's key and value are written (the cache's
    size or more: not written; None: none of them is); keys are then the cache's slots as they were before this chunk,
    followed by the chunk.
    fresh: the cache was empty, so that the chunk alone is seen.
    encoder, encoder_mask: what an encoder-decoder's encoder made, or None where a cache holds its keys and values.
    segment_ids, causal, window: what the mask of a pass over whole rows was made of, for kernels that make their own.
    execution: chooses the kernel.
    """

    mask: Bool[Array, "mask_rows seq key"]
    bias: Float[Array, "bias_rows heads seq key"] | None = None
    rotary: RotaryTables | None = None
    real: Bool[Array, "batch seq"] | None = None
    slots: Int[Array, "batch seq"] | None = None
    fresh: bool = struct.field(pytree_node=False, default=False)
    encoder: Float[Array, "batch source d_model"] | None = None
    encoder_mask: Bool[Array, "batch any source_slots"] | None = None
    segment_ids: Int[Array, "batch seq"] | None = None
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    execution: Execution = struct.field(pytree_node=False, default=Execution())


def whole_rows(
    config: ModelConfig,
    stack: dict[str, Any],
    kinds: Iterable[LayerKind],
    positions: Int[Array, "rows seq"],
    segment_ids: Int[Array, "batch seq"] | None,
    encoder: Float[Array, "batch source d_model"] | None = None,
    encoder_mask: Bool[Array, "batch any source_slots"] | None = None,
    execution: Execution = Execution(),
) -> dict[str, Context]:
    """The context of every kind for a pass over whole rows; tokens attend within their own segment."""
    seq = positions.shape[1]
    index = jnp.arange(seq)
    contexts = {}
    for kind in dict.fromkeys(kinds):
        mask = jnp.ones((1, seq, seq), bool)
        if kind.causal:
            mask = mask & _visible(index[None], index[None], kind.window)
        if segment_ids is not None:
            mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
        contexts[kind.name] = Context(
            mask=mask,
            bias=_bias(config, stack, kind, positions, positions),
            rotary=_rotary(config, kind, positions),
            real=None if segment_ids is None else segment_ids > 0,
            encoder=encoder,
            encoder_mask=encoder_mask,
            segment_ids=segment_ids,
            causal=kind.causal,
            window=kind.window,
            execution=execution,
        )
    return contexts


def with_cache(
    config: ModelConfig,
    stack: dict[str, Any],
    kinds: Sequence[LayerKind],
    cache: KVCache,
    real: Bool[Array, "batch seq"],
    encoder: Float[Array, "batch source d_model"] | None = None,
    encoder_mask: Bool[Array, "batch any source_slots"] | None = None,
    fresh: bool = False,
    branches: int = 0,
) -> dict[str, Context]:
    """The context of every kind for a chunk that is appended at `cache.lengths`; `real` is False for its padding.

    fresh: the cache is known to be empty. branches: so many rows of the chunk, one after the other, follow each row of
    the cache, and none is written to it; 0: one does, and is.
    """
    seq = real.shape[1]
    lengths = jnp.repeat(cache.lengths, branches) if branches else cache.lengths
    positions = lengths[:, None] + jnp.arange(seq)[None]
    written = real if branches else real & (positions < cache.capacity)
    end = lengths + jnp.sum(written, axis=1)
    contexts = {}
    chunk = jnp.where(written, positions, -1)
    for kind in dict.fromkeys(kinds):
        size = cache.slots_of(kinds.index(kind))
        # The window of a local layer is a ring: position p stands in slot p mod size.
        newest = lengths[:, None] - 1
        keys = chunk if fresh else jnp.concatenate([newest - (newest - jnp.arange(size)[None]) % size, chunk], axis=1)
        contexts[kind.name] = Context(
            mask=(keys >= 0)[:, None, :] & _visible(positions, keys, kind.window),
            bias=_bias(config, stack, kind, positions, keys),
            rotary=_rotary(config, kind, positions),
            real=real,
            slots=None if branches else jnp.where(written & (positions >= end[:, None] - size), positions % size, size),
            fresh=fresh,
            encoder=encoder,
            encoder_mask=encoder_mask,
        )
    return contexts


def _visible(queries: Array, keys: Array, window: int | None) -> Bool[Array, "rows seq key"]:
    distance = queries[:, :, None] - keys[:, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _bias(config: ModelConfig, stack: dict[str, Any], kind: LayerKind, queries: Array, keys: Array) -> Array | None:
    if config.position == "alibi":
        return alibi_bias(queries, keys, config.num_heads)
    if config.position == "relative":
        table = jnp.asarray(stack["relative_bias"]["table"], jnp.float32)
        return relative_bias(table, queries, keys, config.relative_max_distance, kind.causal)
    return None


def _rotary(config: ModelConfig, kind: LayerKind, positions: Array) -> RotaryTables | None:
    if config.position != "rotary":
        return None
    return rotary_tables(positions, config.rotary_dim, kind.rope_base, kind.rope_scaling)
