"""Choose the next token of every row. All settings are traced, one per row: changing them compiles nothing."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32

from infer.sampling.selection import argmax, draw, first_to_reach, ordered, total
from infer.sampling.settings import MOST_LOGPROBS, Sampling
from model.errors import InputError

# Settings are clipped to ±_LARGEST: larger values would choose the same tokens, but ∞ − ∞ would give NaN.
_LARGEST = 1e15


class History(struct.PyTreeNode):
    """The tokens that penalties count: row b's prompt, then its output, in `tokens[b, :lengths[b]]`.

    Entries beyond `lengths[b]` are ignored. Leaves are Any because JAX also fills the tree with shapes and axes.
    """

    tokens: Any  # int32 [batch, room]
    prompt_lengths: Any  # int32 [batch]
    lengths: Any  # int32 [batch]: prompt and output so far


class SamplerState(struct.PyTreeNode):
    """The settings of every row, traced. Leaves are Any because JAX also fills the tree with shapes and axes."""

    temperature: Any  # float32 [batch], as all penalties, top_p and min_p
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    top_k: Any  # int32 [batch]
    logprobs: Any  # int32 [batch]
    min_tokens: Any  # int32 [batch]
    stop_ids: Any  # int32 [batch, stops], padded with −1: cannot come before min_tokens
    biased: Any  # bool [batch]: whether the row's bias has any entry
    bias: Any  # float32 [batch, vocab]
    keys: Any  # PRNG keys [batch]

    @classmethod
    def create(
        cls,
        samplings: Sequence[Sampling],
        keys: Key[Array, " batch"] | PRNGKeyArray,
        vocab_size: int,
        stop_ids: Int[np.ndarray, "batch stops"] | None = None,
    ) -> "SamplerState":
        """Return the state of one row per sampling; a row with a seed uses that seed's key in place of `keys[row]`.

        stop_ids: what `Sampling.min_tokens` defers, padded with −1; None: nothing.
        Raises InputError if a logit_bias names an id outside the vocabulary.
        """

        def real(name: str, low: float = -_LARGEST) -> Array:
            return jnp.asarray(np.clip([getattr(row, name) for row in samplings], low, _LARGEST), jnp.float32)

        def whole(name: str, most: int) -> Array:
            return jnp.asarray([min(getattr(row, name), most) for row in samplings], jnp.int32)

        smallest_normal = float(np.finfo(np.float32).tiny)  # smaller numbers are flushed to 0 on some devices
        temperature = real("temperature")
        return cls(
            temperature=jnp.where(temperature < smallest_normal, 0.0, temperature),
            top_p=real("top_p", smallest_normal),
            min_p=real("min_p"),
            repetition_penalty=real("repetition_penalty", 1 / _LARGEST),
            presence_penalty=real("presence_penalty"),
            frequency_penalty=real("frequency_penalty"),
            top_k=whole("top_k", vocab_size),
            logprobs=whole("logprobs", MOST_LOGPROBS),
            min_tokens=whole("min_tokens", np.iinfo(np.int32).max),
            stop_ids=jnp.full((len(samplings), 1), -1, jnp.int32) if stop_ids is None else jnp.array(stop_ids),
            biased=jnp.asarray([bool(row.logit_bias) for row in samplings]),
            bias=_bias(samplings, vocab_size),
            keys=_replace_seeded(samplings, keys),
        )


def row_keys(samplings: Sequence[Sampling], key: PRNGKeyArray) -> Key[Array, " batch"]:
    """Return a key per row: that of the row's seed if it has one, else `fold_in(key, row)`."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(samplings)))
    return _replace_seeded(samplings, keys)


def _replace_seeded(samplings: Sequence[Sampling], keys: Any) -> Any:
    if all(row.seed is None for row in samplings):
        return keys
    key_of_seed = functools.partial(jax.random.key, impl=jax.random.key_impl(keys))
    seeds = jnp.asarray(np.array([row.seed or 0 for row in samplings], np.uint32))
    has_seed = jnp.asarray([row.seed is not None for row in samplings])
    return jnp.where(has_seed, jax.vmap(key_of_seed)(seeds), keys)


def _bias(samplings: Sequence[Sampling], vocab_size: int) -> Array:
    if not any(row.logit_bias for row in samplings):
        return jnp.zeros((len(samplings), vocab_size), jnp.float32)
    bias = np.zeros((len(samplings), vocab_size), np.float32)
    for row, sampling in zip(bias, samplings, strict=True):
        check_bias(sampling, vocab_size)
        for token, value in dict(sampling.logit_bias).items():
            row[token] = value if value == -math.inf else np.clip(value, -_LARGEST, _LARGEST)
    return jnp.asarray(bias)


def check_bias(sampling: Sampling, vocab_size: int) -> None:
    """Raise InputError if the logit_bias names an id outside the vocabulary."""
    for token in dict(sampling.logit_bias):
        if token >= vocab_size:
            raise InputError(f"logit_bias names the id {token}, outside the vocabulary of {vocab_size}")


class Choice(struct.PyTreeNode):
    """One token per row, with log-probabilities under the model: of the raw logits, before any setting.

    top_ids, top_logprobs: the MOST_LOGPROBS most likely tokens (all of a smaller vocabulary) in descending order; zeros
    unless some row requests log-probabilities. Leaves are Any because JAX also fills the tree with shapes and axes.
    """

    token: Any  # int32 [batch]
    logprob: Any  # float32 [batch]
    top_ids: Any  # int32 [batch, top]
    top_logprobs: Any  # float32 [batch, top]


def idle_rows_greedy(state: SamplerState, running: Bool[Array, " batch"]) -> SamplerState:
    """Return the state with plain greedy settings in rows that do not run, so that they trigger no costly branch."""
    neutral = {
        "temperature": 0,
        "top_k": 0,
        "top_p": 1,
        "repetition_penalty": 1,
        "biased": False,
        "min_tokens": 0,
        "logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
    changes = {}
    for name, value in neutral.items():
        setting = getattr(state, name)
        changes[name] = jnp.where(running, setting, jnp.asarray(value, setting.dtype))
    return state.replace(**changes)


def choose(
    state: SamplerState,
    logits: Float[Array, "batch vocab"],
    history: History,
    masks: UInt32[Array, "batch words"] | None = None,
    constrained: Bool[Array, " batch"] | None = None,
) -> Choice:
    """Choose the next token of every row, drawn from `distribution`.

    masks: of the rows that are constrained, the tokens that may come: see `infer.constraint.Constraint`. None: all may.
    A row's draw depends on its key and the length of its output, not on other rows. Each setting costs time only if
    some row uses it: if all rows are greedy, choosing is an argmax.
    """
    adjusted = adjust(state, logits, history)
    if masks is not None and constrained is not None:
        adjusted = jax.lax.cond(
            jnp.any(constrained), lambda: _keep_allowed(adjusted, masks, constrained), lambda: adjusted
        )

    def sample() -> Int[Array, " batch"]:
        keys = jax.vmap(jax.random.fold_in)(state.keys, history.lengths - history.prompt_lengths)
        return draw(keys, jnp.exp(truncate(state, adjusted)))

    token = jax.lax.cond(jnp.any(state.temperature > 0), sample, lambda: argmax(adjusted))
    return describe(jnp.any(state.logprobs > 0), logits, token)


def _keep_allowed(logits: Array, masks: Array, constrained: Array) -> Array:
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    allowed = bits.reshape(len(masks), -1)[:, : logits.shape[1]] > 0
    return jnp.where(allowed | ~constrained[:, None], logits, -jnp.inf)


def describe(with_top: Bool[Array, ""], logits: Float[Array, "rows vocab"], token: Int[Array, " rows"]) -> Choice:
    """Return the tokens with log-probabilities, and if with_top the most likely tokens at their positions."""
    largest = jnp.max(logits, axis=-1)
    log_normaliser = largest + jnp.log(total(jnp.exp(logits - largest[:, None])))
    top = min(MOST_LOGPROBS, logits.shape[-1])

    def likeliest() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, top)
        return ids.astype(jnp.int32), values - log_normaliser[:, None]

    def zeros() -> tuple[Array, Array]:
        return jnp.zeros((len(token), top), jnp.int32), jnp.zeros((len(token), top), logits.dtype)

    top_ids, top_logprobs = jax.lax.cond(with_top, likeliest, zeros)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - log_normaliser
    return Choice(token=token, logprob=logprob, top_ids=top_ids, top_logprobs=top_logprobs)


def distribution(
    state: SamplerState, logits: Float[Array, "batch vocab"], history: History
) -> Float[Array, "batch vocab"]:
    """Return the probabilities that `choose` draws from: one-hot at temperature 0, NaN if every token is banned."""
    weights = jnp.exp(truncate(state, adjust(state, logits, history)))
    return weights / total(weights)[:, None]


def adjust(state: SamplerState, logits: Float[Array, "batch vocab"], history: History) -> Float[Array, "batch vocab"]:
    """Add the bias to the logits, set deferred stop ids to −inf, and apply the penalties."""
    changed = state.biased | (state.min_tokens > 0)
    logits = jax.lax.cond(jnp.any(changed), lambda: _defer_stops(state, logits + state.bias, history), lambda: logits)
    penalised = (state.repetition_penalty != 1) | (state.presence_penalty != 0) | (state.frequency_penalty != 0)
    return jax.lax.cond(jnp.any(penalised), lambda: _penalise(state, logits, history), lambda: logits)


def _defer_stops(state: SamplerState, logits: Array, history: History) -> Array:
    deferred = (history.lengths - history.prompt_lengths < state.min_tokens)[:, None] & (state.stop_ids >= 0)
    ids = jnp.where(deferred, state.stop_ids, logits.shape[1])  # outside the vocabulary: dropped
    return logits.at[jnp.arange(len(logits))[:, None], ids].set(-jnp.inf, mode="drop")


def _penalise(state: SamplerState, logits: Array, history: History) -> Array:
    position = jnp.arange(history.tokens.shape[1])[None]
    is_token = position < history.lengths[:, None]
    rows = jnp.arange(len(logits))[:, None]

    def occurrences(where: Array) -> Array:
        return jnp.zeros_like(logits).at[rows, history.tokens].add(where.astype(logits.dtype), mode="drop")

    in_text = occurrences(is_token)
    in_output = occurrences(is_token & (position >= history.prompt_lengths[:, None]))
    factor = state.repetition_penalty[:, None]
    logits = jnp.where(in_text > 0, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits -= state.presence_penalty[:, None] * (in_output > 0) + state.frequency_penalty[:, None] * in_output
    return jnp.minimum(logits, jnp.finfo(logits.dtype).max)


def truncate(state: SamplerState, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """Divide adjusted logits by the temperature, and set tokens that top_k, top_p or min_p removes to −inf.

    Logits are shifted so that each row's largest is 0. At temperature 0 only the most likely token is left.
    """
    vocab = logits.shape[-1]
    order = ordered(logits)
    best = argmax(logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    sampled = state.temperature[:, None] > 0
    # Subtract before dividing: then no temperature is small enough to give ∞ − ∞.
    shifted = logits - jnp.where(jnp.isfinite(largest), largest, 0)
    scaled = shifted / jnp.where(sampled, state.temperature[:, None], 1)
    scaled = jnp.where(sampled, scaled, jnp.where(jnp.arange(vocab)[None] == best[:, None], 0, -jnp.inf))

    def keep_top_k(scaled: Array) -> Array:
        k = jnp.where(state.top_k > 0, state.top_k, vocab).astype(logits.dtype)
        return jnp.where(first_to_reach(order, jnp.ones_like(logits), k), scaled, -jnp.inf)

    def keep_top_p(scaled: Array) -> Array:
        weights = jnp.exp(scaled)
        kept = first_to_reach(order, weights, state.top_p * total(weights))
        return jnp.where(kept | (state.top_p >= 1)[:, None], scaled, -jnp.inf)

    scaled = jax.lax.cond(jnp.any(state.top_k > 0), keep_top_k, lambda scaled: scaled, scaled)
    scaled = jax.lax.cond(jnp.any(state.top_p < 1), keep_top_p, lambda scaled: scaled, scaled)
    return jnp.where(scaled >= jnp.log(state.min_p)[:, None], scaled, -jnp.inf)
