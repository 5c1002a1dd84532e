"""How the next token is chosen. Every setting is traced and a row's own: changing one compiles nothing."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from infer.sampling import MOST_LOGPROBS, Sampling
from infer.selection import argmax, draw, first_to_reach, ordered, total
from model.errors import InputError

# Settings are clipped to this size: larger ones would choose no differently, but make infinities meet.
_LARGEST = 1e15


class History(struct.PyTreeNode):
    """What penalties read: row b's prompt, then its output, in `tokens[b, :lengths[b]]`; what lies beyond is ignored.

    Leaves are Any because JAX also fills the tree with shapes and axes.
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
    biased: Any  # bool [batch]: whether the row's bias has any entry
    bias: Any  # float32 [batch, vocab]
    keys: Any  # PRNG keys [batch]

    @classmethod
    def create(
        cls, samplings: Sequence[Sampling], keys: Key[Array, " batch"] | PRNGKeyArray, vocab_size: int
    ) -> "SamplerState":
        """One row per sampling; a row with a seed gets that seed's key in place of its entry of `keys`.

        Raises InputError if a logit_bias names an id outside the vocabulary.
        """

        def real(name: str, low: float = -_LARGEST) -> Array:
            return jnp.asarray(np.clip([getattr(row, name) for row in samplings], low, _LARGEST), jnp.float32)

        def whole(name: str, most: int) -> Array:
            return jnp.asarray([min(getattr(row, name), most) for row in samplings], jnp.int32)

        tiny = float(np.finfo(np.float32).tiny)  # the least number that no device takes for 0
        temperature = real("temperature")
        return cls(
            temperature=jnp.where(temperature < tiny, 0.0, temperature),
            top_p=real("top_p", tiny),
            min_p=real("min_p"),
            repetition_penalty=real("repetition_penalty", 1 / _LARGEST),
            presence_penalty=real("presence_penalty"),
            frequency_penalty=real("frequency_penalty"),
            top_k=whole("top_k", vocab_size),
            logprobs=whole("logprobs", MOST_LOGPROBS),
            biased=jnp.asarray([bool(row.logit_bias) for row in samplings]),
            bias=_bias(samplings, vocab_size),
            keys=_seeded(samplings, keys),
        )


def row_keys(samplings: Sequence[Sampling], key: PRNGKeyArray) -> Key[Array, " batch"]:
    """Of every row `fold_in(key, its number)`, or its seed's key."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(samplings)))
    return _seeded(samplings, keys)


def _seeded(samplings: Sequence[Sampling], keys: Any) -> Any:
    if all(row.seed is None for row in samplings):
        return keys
    make = functools.partial(jax.random.key, impl=jax.random.key_impl(keys))
    seeds = jnp.asarray(np.array([row.seed or 0 for row in samplings], np.uint32))
    return jnp.where(jnp.asarray([row.seed is not None for row in samplings]), jax.vmap(make)(seeds), keys)


def _bias(samplings: Sequence[Sampling], vocab_size: int) -> Array:
    if not any(row.logit_bias for row in samplings):
        return jnp.zeros((len(samplings), vocab_size), jnp.float32)
    bias = np.zeros((len(samplings), vocab_size), np.float32)
    for row, sampling in zip(bias, samplings, strict=True):
        for token, value in dict(sampling.logit_bias).items():
            if token >= vocab_size:
                raise InputError(f"logit_bias names the id {token}, outside the vocabulary of {vocab_size}")
            row[token] = value if value == -math.inf else np.clip(value, -_LARGEST, _LARGEST)
    return jnp.asarray(bias)


class Choice(struct.PyTreeNode):
    """One token per row. Log-probabilities are the model's: of the raw logits, before every setting.

    top_ids, top_logprobs: the MOST_LOGPROBS likeliest (all of a smaller vocabulary), the likeliest first; zeros unless
    some row asks for log-probabilities. Leaves are Any because JAX also fills the tree with shapes and axes.
    """

    token: Any  # int32 [batch]
    logprob: Any  # float32 [batch]
    top_ids: Any  # int32 [batch, top]
    top_logprobs: Any  # float32 [batch, top]


def quiet(state: SamplerState, running: Bool[Array, " batch"]) -> SamplerState:
    """The same with plain greedy settings in rows that do not run, so that nobody pays for their branches."""
    neutral = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "biased": False, "logprobs": 0}
    neutral |= {"presence_penalty": 0, "frequency_penalty": 0}
    settings = {name: getattr(state, name) for name in neutral}
    return state.replace(
        **{name: jnp.where(running, old, jnp.asarray(neutral[name], old.dtype)) for name, old in settings.items()}
    )


def choose(state: SamplerState, logits: Float[Array, "batch vocab"], history: History) -> Choice:
    """The next token of every row, drawn from `distribution`.

    A row's draw depends on its key and on how many tokens its output has, not on its neighbours. Branches run only
    if some row needs them: all greedy costs an argmax.
    """
    adjusted = adjust(state, logits, history)

    def sample() -> Int[Array, " batch"]:
        keys = jax.vmap(jax.random.fold_in)(state.keys, history.lengths - history.prompt_lengths)
        return draw(keys, jnp.exp(truncate(state, adjusted)))

    token = jax.lax.cond(jnp.any(state.temperature > 0), sample, lambda: argmax(adjusted))
    return describe(jnp.any(state.logprobs > 0), logits, token)


def describe(asked: Bool[Array, ""], logits: Float[Array, "rows vocab"], token: Int[Array, " rows"]) -> Choice:
    """These tokens with what the model gave them, and the likeliest in their places if they are asked for."""
    largest = jnp.max(logits, axis=-1)
    normaliser = largest + jnp.log(total(jnp.exp(logits - largest[:, None])))
    top = min(MOST_LOGPROBS, logits.shape[-1])

    def likeliest() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, top)
        return ids.astype(jnp.int32), values - normaliser[:, None]

    nothing = lambda: (jnp.zeros((len(token), top), jnp.int32), jnp.zeros((len(token), top), logits.dtype))
    top_ids, top_logprobs = jax.lax.cond(asked, likeliest, nothing)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - normaliser
    return Choice(token=token, logprob=logprob, top_ids=top_ids, top_logprobs=top_logprobs)


def distribution(
    state: SamplerState, logits: Float[Array, "batch vocab"], history: History
) -> Float[Array, "batch vocab"]:
    """The probabilities that `choose` draws from, one-hot at temperature 0; NaN where every token is banned."""
    weights = jnp.exp(truncate(state, adjust(state, logits, history)))
    return weights / total(weights)[:, None]


def adjust(state: SamplerState, logits: Float[Array, "batch vocab"], history: History) -> Float[Array, "batch vocab"]:
    """Logits with bias and penalties."""
    logits = jax.lax.cond(jnp.any(state.biased), lambda: logits + state.bias, lambda: logits)
    penalised = (state.repetition_penalty != 1) | (state.presence_penalty != 0) | (state.frequency_penalty != 0)
    return jax.lax.cond(jnp.any(penalised), lambda: _penalise(state, logits, history), lambda: logits)


def _penalise(state: SamplerState, logits: Array, history: History) -> Array:
    place = jnp.arange(history.tokens.shape[1])[None]
    said = place < history.lengths[:, None]
    rows = jnp.arange(len(logits))[:, None]
    count = lambda which: jnp.zeros_like(logits).at[rows, history.tokens].add(which.astype(logits.dtype), mode="drop")
    occurs, outputs = count(said), count(said & (place >= history.prompt_lengths[:, None]))
    factor = state.repetition_penalty[:, None]
    logits = jnp.where(occurs > 0, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits -= state.presence_penalty[:, None] * (outputs > 0) + state.frequency_penalty[:, None] * outputs
    return jnp.minimum(logits, jnp.finfo(logits.dtype).max)


def truncate(state: SamplerState, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """Adjusted logits over the temperature, the likeliest at 0, with −inf where top_k, top_p or min_p cuts.

    At temperature 0 one token is left.
    """
    vocab = logits.shape[-1]
    order = ordered(logits)
    best = argmax(logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # The difference comes first: then no temperature is small enough to make two infinities.
    warm = state.temperature[:, None] > 0
    scaled = (logits - jnp.where(jnp.isfinite(largest), largest, 0)) / jnp.where(warm, state.temperature[:, None], 1)
    scaled = jnp.where(warm, scaled, jnp.where(jnp.arange(vocab)[None] == best[:, None], 0, -jnp.inf))

    def likeliest(scaled: Array) -> Array:
        k = jnp.where(state.top_k > 0, state.top_k, vocab).astype(logits.dtype)
        return jnp.where(first_to_reach(order, jnp.ones_like(logits), k), scaled, -jnp.inf)

    def nucleus(scaled: Array) -> Array:
        weights = jnp.exp(scaled)
        kept = first_to_reach(order, weights, state.top_p * total(weights))
        return jnp.where(kept | (state.top_p >= 1)[:, None], scaled, -jnp.inf)

    scaled = jax.lax.cond(jnp.any(state.top_k > 0), likeliest, lambda scaled: scaled, scaled)
    scaled = jax.lax.cond(jnp.any(state.top_p < 1), nucleus, lambda scaled: scaled, scaled)
    return jnp.where(scaled >= jnp.log(state.min_p)[:, None], scaled, -jnp.inf)
