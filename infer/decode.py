"""Decoding as many tokens as asked without leaving the device: rows of their own lengths, settings, limits and ends."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from infer.sampler import Choice, History, SamplerState, choose, quiet
from infer.sampling import MOST_LOGPROBS
from model import KVCache, ModelConfig, Params, head
from model.ambient import lenient
from model.cache import grow
from model.transformer import forward_cached

ROOM = 32  # tokens of a row that one call can make
RUNNING, STOPPED, FULL = 0, 1, 2  # how a row stands: a stop id came, or all tokens that were asked for were made


class Rows(struct.PyTreeNode):
    """What decoding carries on. Leaves are Any because JAX also fills the tree with shapes and shardings.

    token: each row's newest, which the cache does not hold yet. history: prompt and output, the newest included, with
    room for one token more than the cache.
    stop_ids: padded with −1. limits: of output tokens. status: RUNNING, STOPPED or FULL; a row that does not run is
    neither written nor read.
    """

    token: Any  # int32 [batch]
    cache: KVCache
    history: History
    sampler: SamplerState
    stop_ids: Any  # int32 [batch, stops]
    limits: Any  # int32 [batch]
    status: Any  # int32 [batch]


class Emitted(struct.PyTreeNode):
    """Tokens of one call, row by row in order; −1 where a row made none (it had ended, or met a stop id).

    logprobs and the likeliest tokens are the model's: see `infer.sampler.Choice`.
    """

    tokens: Any  # int32 [batch, room]
    logprobs: Any  # float32 [batch, room]
    top_ids: Any  # int32 [batch, room, top]
    top_logprobs: Any  # float32 [batch, room, top]
    status: Any  # int32 [batch]: after the call


@lenient()
def grow_rows(config: ModelConfig, rows: Rows, capacity: int) -> Rows:
    """The same rows with room for more tokens, in cache and history."""
    more = ((0, 0), (0, capacity - rows.cache.capacity))
    history = rows.history.replace(tokens=jnp.pad(rows.history.tokens, more))
    return rows.replace(cache=grow(config, rows.cache, capacity), history=history)


@functools.partial(jax.jit, donate_argnums=0)
@lenient()
def begin(rows: Rows, logits: Float[Array, "batch vocab"]) -> tuple[Rows, Emitted]:
    """Choose the first token after the prompts, from what `prefill` gave. The rows are donated."""
    choice = choose(rows.sampler, logits, rows.history)
    return _after(rows, rows.cache, choice, nothing_yet(rows, 1), jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@lenient()
def decode(
    config: ModelConfig,
    params: Params,
    rows: Rows,
    steps: Int[Array, ""],
    halt: Bool[Array, " batch"],
) -> tuple[Rows, Emitted]:
    """Up to `steps` ≤ ROOM tokens more for every row that runs; fewer once none does. The rows are donated.

    halt: rows that are stopped first. The cache must have room: see `model.cache.grow`.
    """
    rows = halted(rows, halt)

    def go_on(carry):
        step, rows, _ = carry
        return (step < steps) & jnp.any(rows.status == RUNNING)

    def body(carry):
        step, rows, emitted = carry
        running = rows.status == RUNNING
        hidden, cache = forward_cached(config, params, rows.token[:, None], running.astype(jnp.int32), rows.cache)
        choice = choose(quiet(rows.sampler, running), head(config, params, hidden), rows.history)
        return step + 1, *_after(rows, cache, choice, emitted, step)

    _, rows, emitted = jax.lax.while_loop(go_on, body, (jnp.int32(0), rows, nothing_yet(rows, ROOM)))
    return rows, emitted


def _after(rows: Rows, cache: KVCache, choice: Choice, emitted: Emitted, step: Array) -> tuple[Rows, Emitted]:
    """The rows with their new tokens, and these put down under `step`."""
    history, running = rows.history, rows.status == RUNNING
    stops = running & jnp.any(choice.token[:, None] == rows.stop_ids, axis=1)
    made = running & ~stops
    lengths = history.lengths + made
    full = made & (lengths - history.prompt_lengths >= rows.limits)
    status = jnp.where(stops, STOPPED, jnp.where(full, FULL, rows.status))
    at = jnp.where(made, history.lengths, history.tokens.shape[1])
    tokens = jax.vmap(lambda row, i, token: row.at[i].set(token, mode="drop"))(history.tokens, at, choice.token)
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), step, 1)
    emitted = Emitted(
        tokens=put(emitted.tokens, jnp.where(made, choice.token, -1)),
        logprobs=put(emitted.logprobs, choice.logprob),
        top_ids=put(emitted.top_ids, choice.top_ids),
        top_logprobs=put(emitted.top_logprobs, choice.top_logprobs),
        status=status,
    )
    rows = rows.replace(
        token=jnp.where(made, choice.token, rows.token),
        cache=cache,
        history=history.replace(tokens=tokens, lengths=lengths),
        status=status,
    )
    return rows, emitted


def halted(rows: Rows, halt: Bool[Array, " batch"]) -> Rows:
    """The same, those rows stopped if they ran."""
    stopped = jnp.where(halt & (rows.status == RUNNING), STOPPED, rows.status)
    return rows.replace(status=stopped)


def nothing_yet(rows: Rows, room: int) -> Emitted:
    """What a call has made before its first token, with room for so many of each row."""
    batch, vocab = rows.sampler.bias.shape
    top = min(MOST_LOGPROBS, vocab)
    return Emitted(
        tokens=jnp.full((batch, room), -1, jnp.int32),
        logprobs=jnp.zeros((batch, room), jnp.float32),
        top_ids=jnp.zeros((batch, room, top), jnp.int32),
        top_logprobs=jnp.zeros((batch, room, top), jnp.float32),
        status=rows.status,
    )
