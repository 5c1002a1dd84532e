"""The jitted programs of `infer.score`: prefixes into a cache; rows, whole or after a prefix, to log-probabilities.

They donate nothing: a cache serves every batch that branches from it.
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
from model.transformer import forward, forward_branches, forward_cached

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
    """A cache of prefixes, after the stem if there is one; an encoder-decoder's encoder reads them.

    capacity: tokens of stem and prefix together.
    """
    prefixes, width = tokens.shape
    if config.stack == "encoder-decoder":
        cache = init_cache(config, prefixes, 1, encoder_capacity=width)
        start, none = jnp.zeros((prefixes, 1), jnp.int32), jnp.zeros(prefixes, jnp.int32)
        return forward_cached(config, params, start, none, cache, tokens, lengths, fresh=True, execution=execution)[1]
    if stem is None:
        cache = init_cache(config, prefixes, capacity)
    else:
        cache = grow(config, take(stem, jnp.zeros(prefixes, jnp.int32)), capacity)
    for begin in range(0, width, CHUNK):
        inside = jnp.clip(lengths - begin, 0, CHUNK)
        part = tokens[:, begin : begin + CHUNK]
        fresh = stem is None and begin == 0
        _, cache = forward_cached(config, params, part, inside, cache, fresh=fresh, execution=execution)
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
    """See `_scored`. With a cache, groups of rows branch from its rows `parents`, each group as many as the others.

    All processes of a mesh hold the results. Whole rows are not masked: what a causal model makes of a token does not
    depend on padding after it.
    """
    if cache is None:
        if config.experts is not None:
            config = config.replace(experts=config.experts.replace(dispatch="dropless"))
        hidden = forward(config, params, tokens, outputs=("final_hidden",), execution=execution).final_hidden
        assert hidden is not None
    else:
        assert parents is not None
        hidden = forward_branches(config, params, tokens, lengths, take(cache, parents))
    found = _scored(config, params, hidden, targets, first, top_k, execution)
    return tuple(constrain(x, *[None] * x.ndim) for x in found)


def _scored(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "batch seq d_model"],
    targets: Int[Array, "batch scored"],
    first: Int[Array, " batch"],
    top_k: int,
    execution: Execution,
) -> tuple[Array, ...]:
    """Per target its log-probability, whether it is the likeliest, and with top_k ids and log-probabilities of those.

    first: the place in its row of the token that predicts the first target. Logits are made of these places alone.
    """
    batch, scored = targets.shape
    places = jnp.minimum(first[:, None] + jnp.arange(scored), hidden.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)

    def of_piece(piece: tuple[Array, Array]) -> tuple[Array, ...]:
        hidden, targets = piece
        logits = head(config, params, hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        before = jnp.arange(logits.shape[-1]) < targets[..., None]
        likeliest = jnp.all(jnp.where(before, logits < target, logits <= target), axis=-1)
        found = ((target - log_z)[..., 0], likeliest)
        if not top_k:
            return found
        top, ids = jax.lax.top_k(logits, top_k)
        return *found, ids, top - log_z

    pieces = min(scored, max(execution.loss_chunks, -(-batch * scored * config.vocab_size // _MOST_LOGITS)))
    if pieces == 1:
        return of_piece((hidden, targets))
    more = -scored % pieces
    pad = lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(batch, pieces, -1, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :scored]
    return jax.tree.map(join, jax.lax.map(of_piece, (cut(hidden), cut(targets))))
