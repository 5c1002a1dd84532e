"""The stack: tokens → vectors → the same Block, scanned or looped → logits. All functions are pure."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model.attention import Context
from model.block import Block
from model.cache import KVCache
from model.config import ModelConfig
from model.dropout import Dropout
from model.embedding import Embedding
from model.errors import InputError
from model.linear import Linear, matmul
from model.norm import Normalize
from model.position import rotary_tables

Params = dict[str, Any]
"""{"embedding": …, "layers": every leaf stacked [num_layers, …], "final_norm": …, "head": … unless tied}.

`infer.prepare` turns "layers" into a tuple with one tree per layer; every function here takes both.
"""


@struct.dataclass
class Output:
    """What a pass gives; a field that was not asked for is None.

    hidden: the residual stream before the first layer and after each one. attention: the weights of each
    layer. auxiliary: losses and counts of experts (none here yet).
    """

    logits: Float[Array, "batch seq vocab"] | None
    final_hidden: Float[Array, "batch seq d_model"] | None
    hidden: Float[Array, "layers_and_one batch seq d_model"] | None
    attention: Float[Array, "layers batch heads seq seq"] | None
    auxiliary: dict[str, Array]


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Fresh float32 parameters; `jax.eval_shape(partial(init, config), key)` makes no array."""
    keys = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, config.d_model), jnp.float32)
    context = _context(config, tokens, jnp.ones((1, 1, 1), bool))
    init_block = lambda key: Block(config).init(key, x, context)["params"]
    params = {
        "embedding": Embedding(config).init(keys[0], tokens, tokens)["params"],
        "layers": jax.vmap(init_block)(jax.random.split(keys[1], config.num_layers)),
        "final_norm": Normalize(config).init(keys[2], x)["params"],
    }
    if not config.tie_embeddings:
        params["head"] = Linear(config.vocab_size, "head").init(keys[2], x)["params"]
    return params


def apply(config: ModelConfig, params: Params, tokens: Int[Array, "batch seq"], **inputs: Any) -> Array:
    """Float32 logits [batch, seq, vocab]; takes `forward`'s inputs too."""
    return forward(config, params, tokens, **inputs).logits  # type: ignore[return-value]


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    *,
    positions: Int[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    dropout_rate: Float[Array, ""] | float | None = None,
    dropout_key: PRNGKeyArray | None = None,
    outputs: tuple[str, ...] = (),
) -> Output:
    """One causal pass over whole rows.

    segment_ids: tokens attend within their own segment; 0 is padding. positions: default 0, 1, … within
    each segment. dropout: on when a key is given. outputs: any of "hidden" and "attention" in addition to
    the logits; ("final_hidden",) alone skips the head (`head` makes the logits of it).
    Raises InputError when the row is longer than `max_seq_len`.
    """
    seq = tokens.shape[1]
    if seq > config.max_seq_len:
        raise InputError(f"the sequence of {seq} tokens is longer than the context, max_seq_len={config.max_seq_len}")
    unknown = set(outputs) - {"final_hidden", "hidden", "attention"}
    if unknown:
        raise InputError(f"outputs has {sorted(unknown)}; it takes 'final_hidden', 'hidden' and 'attention'")
    if positions is None:
        positions = _positions_within_segments(tokens, segment_ids)
    mask = jnp.tril(jnp.ones((seq, seq), bool))[None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = mask & same & (segment_ids > 0)[:, None, :]
    dropout = None
    if dropout_key is not None:
        dropout = Dropout(jnp.asarray(0.0 if dropout_rate is None else dropout_rate, jnp.float32), dropout_key)
    context = _context(config, positions, mask)
    x = Embedding(config).apply({"params": params["embedding"]}, tokens, positions)
    if dropout is not None:
        x = dropout.at(config.num_layers)(x)
    x, hidden, attention = _run_layers(config, params["layers"], x, context, dropout, outputs)
    final_hidden = Normalize(config).apply({"params": params["final_norm"]}, x)
    skip_head = outputs == ("final_hidden",)
    return Output(
        logits=None if skip_head else head(config, params, final_hidden),
        final_hidden=final_hidden if "final_hidden" in outputs else None,
        hidden=hidden,
        attention=attention,
        auxiliary={},
    )


def head(
    config: ModelConfig, params: Params, final_hidden: Float[Array, "*batch d_model"]
) -> Float[Array, "*batch vocab"]:
    """Float32 logits of normalised hidden states, through the embedding table where it is tied."""
    if config.tie_embeddings:
        logits = final_hidden @ params["embedding"]["tokens"].astype(final_hidden.dtype).T
    else:
        logits = matmul(final_hidden, params["head"]["weight"])
    return logits.astype(jnp.float32)


def forward_cached(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    cache: KVCache,
) -> tuple[Float[Array, "batch d_model"], KVCache]:
    """Append a chunk to the cache: the final hidden state of each row's last token, and the cache.

    tokens are right-padded, lengths count the real ones. A row that would run past the capacity is not
    written past it and its hidden state is NaN.
    """
    offsets = jnp.arange(tokens.shape[1])[None]
    positions = cache.lengths[:, None] + offsets
    slots = jnp.where(offsets < lengths[:, None], positions, cache.capacity)
    mask = jnp.arange(cache.capacity)[None, None] <= positions[:, :, None]
    context = _context(config, positions, mask, slots)
    x = Embedding(config).apply({"params": params["embedding"]}, tokens, positions)
    block, layers = Block(config), []
    for index, layer in enumerate(cache.layers):
        x, layer, _ = block.apply({"params": _layer(params["layers"], index)}, x, context, layer)
        layers.append(layer)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    final_hidden = Normalize(config).apply({"params": params["final_norm"]}, last)
    end = cache.lengths + lengths
    final_hidden = jnp.where((end > cache.capacity)[:, None], jnp.nan, final_hidden)
    return final_hidden, KVCache(layers=tuple(layers), lengths=jnp.minimum(end, cache.capacity))


def _run_layers(config, layers, x, context, dropout, outputs):
    """The residual stream after all layers, and what was asked for on the way, stacked over layers."""
    block = Block(config)

    def step(x, layer_and_index):
        layer, index = layer_and_index
        at_layer = None if dropout is None else dropout.at(index)
        y, _, weights = block.apply({"params": layer}, x, context, None, at_layer)
        return y, (y if "hidden" in outputs else None, weights if "attention" in outputs else None)

    if config.scan_layers and not isinstance(layers, tuple):
        final, (hidden, attention) = jax.lax.scan(step, x, (layers, jnp.arange(config.num_layers)))
    else:
        final, collected = x, []
        for index in range(config.num_layers):
            final, kept = step(final, (_layer(layers, index), index))
            collected.append(kept)
        hidden, attention = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
    if hidden is not None:
        hidden = jnp.concatenate([x[None], hidden])
    return final, hidden, attention


def _layer(layers: Any, index: int) -> Any:
    return layers[index] if isinstance(layers, tuple) else jax.tree.map(lambda leaf: leaf[index], layers)


def _context(config: ModelConfig, positions: Array, mask: Array, slots: Array | None = None) -> Context:
    rotary = None
    if config.position == "rotary":
        rotary = rotary_tables(positions, config.head_dim, config.rope_base)
    mask = jnp.broadcast_to(mask, (positions.shape[0], *mask.shape[1:]))
    return Context(mask=mask, rotary=rotary, slots=slots)


def _positions_within_segments(tokens: Array, segment_ids: Array | None) -> Array:
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
