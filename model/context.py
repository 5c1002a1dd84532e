"""The inputs that all layers of one kind share in a pass: attention mask, position bias, rotary tables, cache slots."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from model.cache import KVCache, ring_positions, ring_slots
from model.config import ModelConfig
from model.execution import Execution
from model.layout import LayerKind
from model.position import RotaryTables, alibi_bias, relative_bias, rotary_tables


@struct.dataclass
class Context:
    """Inputs of attention that depend on the kind of a layer, not on the layer.

    The axes mask_rows and bias_rows are the batch, or 1 where all rows are the same. Over whole rows "key" is "seq".
    With a cache of `slots` slots per layer the keys are those slots as they were before this chunk, followed by the
    chunk's own tokens: key = slots + seq.

    mask: True where a query attends to a key. bias: added to the scores. rotary: (cos, sin) of this chunk's positions.
    real: False for padding. slots: the cache slot of each token's key and value, see `model.cache.ring_slots`; None:
    nothing is written. fresh: the cache was empty, so that keys are the chunk alone. encoder, encoder_mask: the
    encoder's output and which of it each row attends to; encoder is None if a cache holds its keys and values.
    segment_ids, causal, window: what the mask of a pass over whole rows was computed from, for fused kernels, which
    compute their own. execution: chooses the kernel.
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
    """Return {name of a kind: its context} for a pass over whole rows; tokens attend within their own segment.

    stack: its "relative_bias" is read. positions: [1, seq] where all rows are the same. segment_ids: 0 is padding.
    """
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
    """Return {name of a kind: its context} for a chunk that continues the rows of the cache.

    real: False for the chunk's padding. fresh: the cache is known to be empty. branches: the chunk has this many rows
    for each row of the cache, consecutive ones, all of which continue that row and none of which is written; 0: one row
    each, which is written.

    A cache row of 6 tokens in a ring of 4 slots, and a chunk of two real tokens and one of padding: the positions of
    the chunk are 6, 7, 8, those of the keys 4, 5, 2, 3 (the ring), 6, 7, −1 (the chunk). A key at −1 is masked.
    """
    seq = real.shape[1]
    lengths = jnp.repeat(cache.lengths, branches) if branches else cache.lengths
    positions = lengths[:, None] + jnp.arange(seq)[None]
    written = real if branches else real & (positions < cache.capacity)
    end = lengths + jnp.sum(written, axis=1)
    contexts = {}
    chunk_keys = jnp.where(written, positions, -1)
    for kind in dict.fromkeys(kinds):
        slots = cache.slots_of(kinds.index(kind))
        newest = lengths[:, None] - 1
        keys = chunk_keys if fresh else jnp.concatenate([ring_positions(newest, slots), chunk_keys], axis=1)
        contexts[kind.name] = Context(
            mask=(keys >= 0)[:, None, :] & _visible(positions, keys, kind.window),
            bias=_bias(config, stack, kind, positions, keys),
            rotary=_rotary(config, kind, positions),
            real=real,
            slots=None if branches else ring_slots(positions, written, end, slots),
            fresh=fresh,
            encoder=encoder,
            encoder_mask=encoder_mask,
        )
    return contexts


def packed_after_cache(
    config: ModelConfig,
    stack: dict[str, Any],
    kinds: Sequence[LayerKind],
    cache: KVCache,
    positions: Int[Array, "batch seq"],
    trees: Int[Array, "batch seq"],
    branches: Int[Array, "batch seq"],
) -> dict[str, Context]:
    """Return {name of a kind: its context} for rows of packed trees, all of which continue rows of the cache.

    The batch has a whole number of rows for each row of the cache, consecutive ones; nothing is written. trees: 0 is
    padding. branches: 0 is the prefix of a tree, which its branches see; they do not see one another.
    """
    lengths = jnp.repeat(cache.lengths, positions.shape[0] // cache.lengths.shape[0])
    same_tree = (trees[:, :, None] == trees[:, None, :]) & (trees > 0)[:, :, None]
    related = same_tree & ((branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :]))
    contexts = {}
    for kind in dict.fromkeys(kinds):
        stored = ring_positions(lengths[:, None] - 1, cache.slots_of(kinds.index(kind)))
        before = (stored >= 0)[:, None, :] & (trees > 0)[:, :, None]
        keys = jnp.concatenate([stored, positions], axis=1)
        contexts[kind.name] = Context(
            mask=jnp.concatenate([before, related], axis=2) & _visible(positions, keys, kind.window),
            bias=_bias(config, stack, kind, positions, keys),
            rotary=_rotary(config, kind, positions),
            real=trees > 0,
        )
    return contexts


def _visible(queries: Array, keys: Array, window: int | None) -> Bool[Array, "rows seq key"]:
    """Return whether the key at a position is neither after a query's position nor before its window."""
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
