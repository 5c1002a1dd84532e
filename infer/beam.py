"""Beam search on the device, for all prompts at the same time."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from infer.decode import ROOM
from infer.prompts import Prompt, bucket, capacity_for, check_prompts, decoder_prompts, read_prompts
from infer.text import Decoder, continuation_text
from model import Execution, KVCache, ModelConfig, Params, head
from model.ambient import lenient
from model.cache import grow, take
from model.dtypes import DTypeLike
from model.errors import InputError, check_number, check_whole
from model.sharding import under_mesh_of
from model.transformer import forward_cached


@dataclasses.dataclass(frozen=True)
class Beams:
    """The n best hypotheses per prompt, best first; fewer only if the model has no more.

    tokens: without the stop id. logprobs: log-probabilities of these tokens under the model. scores: see `beam_search`;
    the stop id counts in them. finish_reason: "stop" or "length". text: the text that the tokens add to the prompt's;
    None without a tokenizer.
    """

    tokens: list[list[list[int]]]
    scores: list[list[float]]
    logprobs: list[list[list[float]]]
    finish_reason: list[list[str]]
    text: list[list[str]] | None = None


class Hypotheses(struct.PyTreeNode):
    """Outputs and their scores; the score is −inf in an empty place.

    Leaves are Any because JAX also fills the tree with shapes and shardings.
    """

    tokens: Any  # int32 [prompts, beams, room], with the stop id
    logprobs: Any  # float32 [prompts, beams, room]
    lengths: Any  # int32 [prompts, beams]
    scores: Any  # float32 [prompts, beams]: sum of log-probabilities while running, length-normalised once finished
    stopped: Any  # bool [prompts, beams]: ended by a stop id


class BeamState(struct.PyTreeNode):
    """State of the search between steps, with its traced settings. Leaves as in `Hypotheses`."""

    running: Hypotheses  # best first; all scores of a prompt are −inf once its search has ended
    finished: Hypotheses  # best first
    cache: KVCache  # row prompt · beams + beam; lacks the newest tokens
    step: Any  # int32 []: length of the running outputs
    limit: Any  # int32 []: max_new_tokens
    stop_ids: Any  # int32 [stops], padded with −1
    length_penalty: Any  # float32 []
    early_stopping: Any  # int32 []: index in EARLY_STOPPING


EARLY_STOPPING: tuple[bool | str, ...] = (True, False, "never")


@lenient()
def beam_search(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    *,
    beams: int = 4,
    max_new_tokens: int = 64,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    early_stopping: bool | str = False,
    n: int = 1,
    tokenizer: Decoder | None = None,
    cache_dtype: DTypeLike | None = None,
    execution: Execution = Execution(),
) -> Beams:
    """Continue every prompt by the n highest-scoring outputs that a beam of this width finds.

    score = Σ log p(token) / length ** length_penalty, over all tokens of the output and the stop id that ends it. The
    power is Transformers' normalisation, not the ((5 + length) / 6) ** α of Wu et al. 2016 (section 7). A penalty of 0
    compares sums, 1 means; above 0 it favours longer outputs.

    Each step extends the running hypotheses to the `beams` best by Σ log p. An extension by a stop id that ranks among
    the `beams` best of all extensions finishes; of the finished hypotheses the `beams` best by score are kept. Those
    still running at max_new_tokens finish there. early_stopping: when to end a prompt's search earlier, once `beams`
    have finished. True: at once. False: when the best running hypothesis at its present length scores no better than
    the worst finished one. "never": when it could not do so at any later length. With one beam, and not "never", this
    is greedy decoding.

    prompts: for an encoder-decoder the encoder's. stop_ids: None means the config's `eos_token_ids`. n: hypotheses to
    return per prompt, at most beams. tokenizer: decodes `text`. cache_dtype: see `init_cache`. execution: see
    `generate`. Changing length_penalty, early_stopping or n compiles nothing.
    Raises InputError on prompts as `generate` does, and on settings out of range.
    """
    check_prompts(config, prompts, max_new_tokens)
    stops = tuple(dict.fromkeys(config.eos_token_ids if stop_ids is None else stop_ids))
    _check(config, beams, n, length_penalty, stops, early_stopping)
    with under_mesh_of(params):
        copies = [beams] * len(prompts)
        logits, cache = read_prompts(
            config, params, prompts, copies=copies, cache_dtype=cache_dtype, execution=execution
        )
        state = BeamState(
            running=_no_hypotheses(len(prompts), beams, bucket(max_new_tokens, ROOM)),
            finished=_no_hypotheses(len(prompts), beams, bucket(max_new_tokens, ROOM)),
            cache=cache,
            step=jnp.int32(0),
            limit=jnp.int32(max_new_tokens),
            stop_ids=jnp.asarray([*stops, *[-1] * (bucket(len(stops), 8) - len(stops))], jnp.int32),
            length_penalty=jnp.float32(length_penalty),
            early_stopping=jnp.int32(EARLY_STOPPING.index(early_stopping)),
        )
        state, any_running = _begin(state, logits)
        filled = 1 if config.stack == "encoder-decoder" else max(map(len, prompts))
        left = max_new_tokens - 1
        while left:
            if filled == state.cache.capacity:
                state = state.replace(cache=grow(config, state.cache, capacity_for(config, filled + 1)))
            steps = min(ROOM, left, state.cache.capacity - filled)
            state, running_after = _search_steps(config, params, state, np.int32(steps))
            if not any_running:  # waits for the previous call only; this one, then without effect, is under way
                break
            any_running, filled, left = running_after, filled + steps, left - steps
    result = _beams(jax.device_get(state.finished), n)
    if tokenizer is None:
        return result
    text = [
        [continuation_text(tokenizer, prompt, tokens) for tokens in hypotheses]
        for prompt, hypotheses in zip(decoder_prompts(config, prompts), result.tokens, strict=True)
    ]
    return dataclasses.replace(result, text=text)


def _no_hypotheses(prompts: int, beams: int, room: int) -> Hypotheses:
    return Hypotheses(
        tokens=jnp.zeros((prompts, beams, room), jnp.int32),
        logprobs=jnp.zeros((prompts, beams, room), jnp.float32),
        lengths=jnp.zeros((prompts, beams), jnp.int32),
        scores=jnp.full((prompts, beams), -jnp.inf, jnp.float32),
        stopped=jnp.zeros((prompts, beams), bool),
    )


@functools.partial(jax.jit, donate_argnums=0)
@lenient()
def _begin(state: BeamState, logits: Float[Array, "rows vocab"]) -> tuple[BeamState, Bool[Array, ""]]:
    """Choose the first token of every output. All beams of a prompt are still equal, so only the first one counts."""
    scores = jnp.where(jnp.arange(state.running.scores.shape[1]) == 0, 0.0, state.running.scores)
    state = state.replace(running=state.running.replace(scores=scores))
    state = _advance(state, logits)
    return state, _any_running(state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@lenient()
def _search_steps(
    config: ModelConfig, params: Params, state: BeamState, steps: Int[Array, ""]
) -> tuple[BeamState, Bool[Array, ""]]:
    """Search up to `steps` steps, stopping early once no prompt's search runs; return whether one still does.

    Donates the state.
    """

    def unfinished(carry):
        step, state = carry
        return (step < steps) & _any_running(state)

    def body(carry):
        step, state = carry
        running = state.running
        newest = jnp.take(running.tokens, state.step - 1, axis=2).reshape(-1)
        lengths = (running.scores > -jnp.inf).astype(jnp.int32).reshape(-1)
        hidden, cache = forward_cached(config, params, newest[:, None], lengths, state.cache)
        return step + 1, _advance(state.replace(cache=cache), head(config, params, hidden))

    _, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))
    return state, _any_running(state)


def _any_running(state: BeamState) -> Bool[Array, ""]:
    return jnp.any(state.running.scores > -jnp.inf)


def _advance(state: BeamState, logits: Float[Array, "rows vocab"]) -> BeamState:
    """Extend every running hypothesis by one token, move those that end to the finished ones, and reorder the cache."""
    old = state.running
    prompts, beams = old.scores.shape
    vocab = logits.shape[-1]
    logprobs = jax.nn.log_softmax(logits).reshape(prompts, beams, vocab)
    stop_ids = state.stop_ids
    is_stop = jnp.any(jnp.arange(vocab)[:, None] == stop_ids, axis=1)

    # Extensions that go on: [prompts, beams · vocab], where index = parent · vocab + token.
    sums = old.scores[..., None] + jnp.where(is_stop, -jnp.inf, logprobs)
    best, index = jax.lax.top_k(sums.reshape(prompts, -1), beams)
    parent = index // vocab
    running = _extended(old, logprobs, parent, index % vocab, best, state.step)

    # Extensions by a stop id: index = parent · stops + position in stop_ids. Only those among the best of all count.
    stop_logprobs = jnp.where(stop_ids >= 0, logprobs[..., jnp.maximum(stop_ids, 0)], -jnp.inf)
    ended, index = jax.lax.top_k((old.scores[..., None] + stop_logprobs).reshape(prompts, -1), beams)
    worst = jax.lax.top_k(jnp.concatenate([best, ended], axis=1), beams)[0][:, -1:]
    ended = jnp.where(ended >= worst, ended, -jnp.inf)
    stops = jnp.maximum(stop_ids, 0)[index % len(stop_ids)]
    stopped = _extended(old, logprobs, index // len(stop_ids), stops, ended, state.step)
    stopped = stopped.replace(stopped=jnp.ones((prompts, beams), bool))

    length = (state.step + 1).astype(jnp.float32)

    def normalised(sums: Array, length: Array) -> Array:
        return sums / length**state.length_penalty

    # The best of: those finished before, those that end now, and at the limit those that run.
    last = state.step + 1 >= state.limit
    candidates = [
        state.finished,
        stopped.replace(scores=normalised(stopped.scores, length)),
        running.replace(scores=jnp.where(last, normalised(running.scores, length), -jnp.inf)),
    ]
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *candidates)
    _, index = jax.lax.top_k(together.scores, beams)
    finished = _take_beams(together, index)

    # The best score that a running hypothesis can still reach. Sums only decrease; but with a positive penalty they are
    # divided by a power of the length, so "never" assumes the present sum at the maximal length.
    never = (state.early_stopping == EARLY_STOPPING.index("never")) & (state.length_penalty > 0)
    attainable = normalised(running.scores[:, 0], jnp.where(never, state.limit.astype(jnp.float32), length))
    worst = finished.scores[:, -1]
    at_once = (state.early_stopping == EARLY_STOPPING.index(True)) & (worst > -jnp.inf)
    over = last | at_once | (attainable <= worst)
    running = running.replace(scores=jnp.where(over[:, None], -jnp.inf, running.scores))
    cache = state.cache
    if beams > 1:
        cache = take(cache, (parent + beams * jnp.arange(prompts)[:, None]).reshape(-1))
    return state.replace(running=running, finished=finished, cache=cache, step=state.step + 1)


def _take_beams(hypotheses: Hypotheses, index: Int[Array, "prompts beams"]) -> Hypotheses:
    """Return hypothesis index[p, b] of prompt p in place b."""

    def take_rows(leaf: Array) -> Array:
        return jax.vmap(lambda rows, places: rows[places])(leaf, index)

    return jax.tree.map(take_rows, hypotheses)


def _extended(
    old: Hypotheses,
    logprobs: Float[Array, "prompts beams vocab"],
    parent: Int[Array, "prompts beams"],
    token: Int[Array, "prompts beams"],
    scores: Float[Array, "prompts beams"],
    step: Int[Array, ""],
) -> Hypotheses:
    """Return the parents extended by the tokens at `step`, with these scores."""
    parents = _take_beams(old, parent)
    token_logprobs = jax.vmap(lambda rows, parent, token: rows[parent, token])(logprobs, parent, token)
    return Hypotheses(
        tokens=parents.tokens.at[:, :, step].set(token),
        logprobs=parents.logprobs.at[:, :, step].set(token_logprobs),
        lengths=jnp.full_like(parents.lengths, step + 1),
        scores=scores,
        stopped=parents.stopped,
    )


def _beams(finished: Hypotheses, n: int) -> Beams:
    """Return the n best hypotheses of every prompt from host arrays."""
    result = Beams([], [], [], [])
    for prompt, scores in enumerate(finished.scores):
        found = [place for place in range(n) if scores[place] > -math.inf]
        counts = [int(finished.lengths[prompt, place] - finished.stopped[prompt, place]) for place in found]
        pairs = list(zip(found, counts, strict=True))
        result.tokens.append([finished.tokens[prompt, place, :count].tolist() for place, count in pairs])
        result.logprobs.append([finished.logprobs[prompt, place, :count].tolist() for place, count in pairs])
        result.scores.append([float(scores[place]) for place in found])
        result.finish_reason.append(["stop" if finished.stopped[prompt, place] else "length" for place in found])
    return result


def _check(config, beams, n, length_penalty, stops, early_stopping) -> None:
    check_whole("beams", beams, 1, hint="4 is usual")
    if not 1 <= n <= beams:
        raise InputError(f"n={n} hypotheses cannot be returned from beams={beams}; give n in 1 … {beams}")
    check_number("length_penalty", length_penalty, hint="1 compares means, 0 sums")
    if early_stopping not in EARLY_STOPPING:
        raise InputError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
    wrong = [token for token in stops if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(f"stop_ids has the id {wrong[0]}, outside the vocabulary of {config.vocab_size}")
