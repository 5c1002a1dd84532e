"""The jitted programs of scoring: prefixes into a cache; rows, whole or after a prefix, to log-probabilities.

Neither donates its inputs: a cache serves every batch that branches from it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from infer.prompts import CHUNK
from model import Execution, KVCache, ModelConfig, Params, head, init_cache
from model.ambient import lenient
from model.cache import grow, take
from model.sharding import constrain
from model.transformer import forward, forward_branches, forward_cached, forward_packed

_MOST_LOGITS = 2**25  # in memory at a time


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capacity", "execution"))
@lenient()
def read_prefixes(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "prefixes width"],
    lengths: Int[Array, " prefixes"],
    stem: KVCache | None = None,
    *,
    capacity: int,
    execution: Execution,
) -> KVCache:
    """Return a cache of the prefixes, one row each; for an encoder-decoder the encoder reads them.

    stem: a cache of one row, which all prefixes follow. capacity: tokens of stem and prefix together.
    """
    prefixes, width = tokens.shape
    if config.stack == "encoder-decoder":
        cache = init_cache(config, prefixes, 1, encoder_capacity=width)
        start, no_tokens = jnp.zeros((prefixes, 1), jnp.int32), jnp.zeros(prefixes, jnp.int32)
        _, cache = forward_cached(
            config, params, start, no_tokens, cache, tokens, lengths, fresh=True, execution=execution
        )
        return cache
    if stem is None:
        cache = init_cache(config, prefixes, capacity)
    else:
        cache = grow(config, take(stem, jnp.zeros(prefixes, jnp.int32)), capacity)
    for begin in range(0, width, CHUNK):
        chunk_lengths = jnp.clip(lengths - begin, 0, CHUNK)
        chunk = tokens[:, begin : begin + CHUNK]
        fresh = stem is None and begin == 0
        _, cache = forward_cached(config, params, chunk, chunk_lengths, cache, fresh=fresh, execution=execution)
    return cache


@functools.partial(jax.jit, static_argnums=0, static_argnames=("top_k", "execution"))
@lenient()
def score_rows(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    targets: Int[Array, "batch scored"],
    first: Int[Array, " batch"],
    cache: KVCache | None = None,
    parents: Int[Array, " groups"] | None = None,
    *,
    top_k: int,
    execution: Execution,
) -> tuple[Array, ...]:
    """Score the targets of every row: see `scored_hidden`.

    With a cache, rows come in groups of equal size, and group i continues row `parents[i]` of the cache. Whole rows are
    not masked: the outputs of a causal model at a token do not depend on padding after it.
    """
    if cache is None:
        if config.experts is not None:
            config = config.replace(experts=config.experts.replace(dispatch="dropless"))
        hidden = forward(config, params, tokens, outputs=("final_hidden",), execution=execution).final_hidden
        assert hidden is not None
    else:
        assert parents is not None
        hidden = forward_branches(config, params, tokens, lengths, take(cache, parents))
    predicting = jnp.minimum(first[:, None] + jnp.arange(targets.shape[1]), hidden.shape[1] - 1)
    return scored_hidden(config, params, hidden, targets, predicting, top_k, execution)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("top_k", "execution"))
@lenient()
def score_packed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    trees: Int[Array, "batch seq"],
    branches: Int[Array, "batch seq"],
    targets: Int[Array, "parts scored"],
    predicting: Int[Array, "parts scored"],
    stem: KVCache | None = None,
    *,
    top_k: int,
    execution: Execution,
) -> tuple[Array, ...]:
    """Score the targets of packed rows, all of which follow one stem: see `scored_hidden`, `packing.PackedArrays`."""
    parts = targets.shape[0]
    cache = init_cache(config, parts, 1) if stem is None else take(stem, jnp.zeros(parts, jnp.int32))
    hidden = forward_packed(config, params, tokens, positions, trees, branches, cache)
    hidden = hidden.reshape(parts, -1, hidden.shape[-1])
    return scored_hidden(config, params, hidden, targets, predicting, top_k, execution)


def compiled_programs() -> int:
    """Return how many programs of scoring this process has compiled, or loaded from the cache of compiled programs."""
    return sum(program._cache_size() for program in (read_prefixes, score_rows, score_packed))  # type: ignore[attr-defined]


def scored_hidden(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "batch seq d_model"],
    targets: Int[Array, "batch scored"],
    predicting: Int[Array, "batch scored"],
    top_k: int,
    execution: Execution,
) -> tuple[Array, ...]:
    """Return each target's log-probability and whether it is the most likely token: [batch, scored] each.

    With top_k also the ids and log-probabilities of the most likely tokens: [batch, scored, top_k] each. predicting:
    index in its row of the token that predicts a target; logits are computed there only. On a mesh every process holds
    the results.
    """
    batch, scored = targets.shape
    hidden = jnp.take_along_axis(hidden, predicting[..., None], axis=1)

    def score_chunk(chunk: tuple[Array, Array]) -> tuple[Array, ...]:
        hidden, targets = chunk
        logits = head(config, params, hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        # Of equally likely tokens the first one counts: tokens with a smaller id must have smaller logits.
        has_smaller_id = jnp.arange(logits.shape[-1]) < targets[..., None]
        likeliest = jnp.all(jnp.where(has_smaller_id, logits < target, logits <= target), axis=-1)
        outputs = ((target - log_z)[..., 0], likeliest)
        if not top_k:
            return outputs
        top, ids = jax.lax.top_k(logits, top_k)
        return *outputs, ids, top - log_z

    # Chunks of target positions, so that not all logits are in memory at the same time.
    chunks = min(scored, max(execution.loss_chunks, -(-batch * scored * config.vocab_size // _MOST_LOGITS)))
    if chunks == 1:
        return _everywhere(score_chunk((hidden, targets)))
    padding = -scored % chunks

    def split(x: Array) -> Array:
        """[batch, scored, …] → [chunks, batch, positions, …], padded."""
        padded = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, chunks, -1, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        """[chunks, batch, positions, …] → [batch, scored, …]."""
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :scored]

    return _everywhere(jax.tree.map(join, jax.lax.map(score_chunk, (split(hidden), split(targets)))))


def _everywhere(scored: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the arrays, of which every device of a mesh has all."""
    return tuple(constrain(x, *[None] * x.ndim) for x in scored)
