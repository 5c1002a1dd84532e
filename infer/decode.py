"""Decode many tokens without leaving the device, for rows that differ in length, settings, limits and stop ids."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from infer.prompts import Prompt, bucket
from infer.sampling import (
    MOST_LOGPROBS,
    Choice,
    History,
    SamplerState,
    Sampling,
    choose,
    idle_rows_greedy,
    row_keys,
)
from model import KVCache, ModelConfig, Params, head
from model.ambient import lenient
from model.cache import grow
from model.transformer import forward_cached

ROOM = 32  # most tokens per row in one call of `decode`
RUNNING, STOPPED, FULL = 0, 1, 2  # status of a row; STOPPED: by a stop id, FULL: at its limit of output tokens


class DecodeState(struct.PyTreeNode):
    """State of a batch of rows between calls of `decode`.

    token: each row's newest token, which is not in the cache yet. history: prompt and output with the newest token, so
    it has room for one token more than the cache. status: RUNNING, STOPPED or FULL; only running rows are read or
    written. Leaves are Any because JAX also fills the tree with shapes and shardings.
    """

    token: Any  # int32 [batch]
    cache: KVCache
    history: History
    sampler: SamplerState
    stop_ids: Any  # int32 [batch, stops], padded with −1
    limits: Any  # int32 [batch]: output tokens
    status: Any  # int32 [batch]


class Emitted(struct.PyTreeNode):
    """The tokens of one call, in order; −1 in columns where the row emitted none: it had ended, or met a stop id.

    Log-probabilities are the model's: see `infer.sampling.Choice`.
    """

    tokens: Any  # int32 [batch, room]
    logprobs: Any  # float32 [batch, room]
    top_ids: Any  # int32 [batch, room, top]
    top_logprobs: Any  # float32 [batch, room, top]
    status: Any  # int32 [batch]: after the call


@lenient()
def init_decode_state(
    config: ModelConfig,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    cache: KVCache,
    max_new_tokens: int,
    key: PRNGKeyArray | None = None,
) -> DecodeState:
    """Return the state of rows whose prompts are in the cache and whose output is empty.

    key: of the rows whose sampling has no seed; None: `jax.random.key(0)`.
    """
    batch = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((batch, cache.capacity + 1), np.int32)  # the newest token is not in the cache
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    stops = [config.eos_token_ids if one.stop_ids is None else one.stop_ids for one in samplings]
    stop_ids = np.full((batch, bucket(max(map(len, stops)), 8)), -1, np.int32)
    for row, ids in zip(stop_ids, stops, strict=True):
        row[: len(ids)] = ids
    keys = row_keys(samplings, jax.random.key(0) if key is None else key)
    zeros = jnp.zeros(batch, jnp.int32)
    return DecodeState(
        token=zeros,
        cache=cache,
        history=History(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(lengths)),
        sampler=SamplerState.create(samplings, keys, config.vocab_size, stop_ids),
        stop_ids=jnp.asarray(stop_ids),
        limits=zeros + max_new_tokens,
        status=zeros + RUNNING,
    )


@lenient()
def grow_state(config: ModelConfig, state: DecodeState, capacity: int) -> DecodeState:
    """Return the same rows with a cache of this capacity, and a history that matches it."""
    added = ((0, 0), (0, capacity - state.cache.capacity))
    history = state.history.replace(tokens=jnp.pad(state.history.tokens, added))
    return state.replace(cache=grow(config, state.cache, capacity), history=history)


@functools.partial(jax.jit, donate_argnums=0)
@lenient()
def begin(
    state: DecodeState,
    logits: Float[Array, "batch vocab"],
    masks: UInt32[Array, "batch words"] | None = None,
    constrained: Bool[Array, " batch"] | None = None,
) -> tuple[DecodeState, Emitted]:
    """Choose the first token after the prompts from the logits that `prefill` returned. Donates the state.

    masks, constrained: see `choose`.
    """
    choice = choose(state.sampler, logits, state.history, masks, constrained)
    return _append(state, state.cache, choice, nothing_emitted(state, 1), jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@lenient()
def decode(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    steps: Int[Array, ""],
    halt: Bool[Array, " batch"],
    masks: UInt32[Array, "batch words"] | None = None,
    constrained: Bool[Array, " batch"] | None = None,
) -> tuple[DecodeState, Emitted]:
    """Decode up to `steps` ≤ ROOM tokens for every running row; stop early once no row runs. Donates the state.

    halt: rows to stop before the first step. masks, constrained: see `choose`; a mask holds for one token, so that
    `steps` must be 1 while a constrained row runs. The cache must have room for the tokens: see `grow_state`.
    """
    state = halt_rows(state, halt)

    def unfinished(carry):
        step, state, _ = carry
        return (step < steps) & jnp.any(state.status == RUNNING)

    def body(carry):
        step, state, emitted = carry
        running = state.status == RUNNING
        hidden, cache = forward_cached(config, params, state.token[:, None], running.astype(jnp.int32), state.cache)
        sampler = idle_rows_greedy(state.sampler, running)
        rows = None if constrained is None else constrained & running
        choice = choose(sampler, head(config, params, hidden), state.history, masks, rows)
        return step + 1, *_append(state, cache, choice, emitted, step)

    _, state, emitted = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, nothing_emitted(state, ROOM)))
    return state, emitted


def _append(
    state: DecodeState, cache: KVCache, choice: Choice, emitted: Emitted, step: Array
) -> tuple[DecodeState, Emitted]:
    """Append each running row's chosen token, unless it is a stop id, and record it in column `step` of `emitted`."""
    history, running = state.history, state.status == RUNNING
    stopped = running & jnp.any(choice.token[:, None] == state.stop_ids, axis=1)
    appended = running & ~stopped
    lengths = history.lengths + appended
    full = appended & (lengths - history.prompt_lengths >= state.limits)
    status = jnp.where(stopped, STOPPED, jnp.where(full, FULL, state.status))
    # Rows without a new token write past the end of the history, and the write is dropped.
    positions = jnp.where(appended, history.lengths, history.tokens.shape[1])

    def write(row: Array, position: Array, token: Array) -> Array:
        return row.at[position].set(token, mode="drop")

    tokens = jax.vmap(write)(history.tokens, positions, choice.token)

    def record(columns: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(columns, new.astype(columns.dtype), step, 1)

    emitted = Emitted(
        tokens=record(emitted.tokens, jnp.where(appended, choice.token, -1)),
        logprobs=record(emitted.logprobs, choice.logprob),
        top_ids=record(emitted.top_ids, choice.top_ids),
        top_logprobs=record(emitted.top_logprobs, choice.top_logprobs),
        status=status,
    )
    state = state.replace(
        token=jnp.where(appended, choice.token, state.token),
        cache=cache,
        history=history.replace(tokens=tokens, lengths=lengths),
        status=status,
    )
    return state, emitted


def halt_rows(state: DecodeState, halt: Bool[Array, " batch"]) -> DecodeState:
    """Return the state with the status of these rows set to STOPPED if they were running."""
    status = jnp.where(halt & (state.status == RUNNING), STOPPED, state.status)
    return state.replace(status=status)


def nothing_emitted(state: DecodeState, room: int) -> Emitted:
    """Return an empty `Emitted` with `room` columns."""
    batch, vocab = state.sampler.bias.shape
    top = min(MOST_LOGPROBS, vocab)
    return Emitted(
        tokens=jnp.full((batch, room), -1, jnp.int32),
        logprobs=jnp.zeros((batch, room), jnp.float32),
        top_ids=jnp.zeros((batch, room, top), jnp.int32),
        top_logprobs=jnp.zeros((batch, room, top), jnp.float32),
        status=state.status,
    )
