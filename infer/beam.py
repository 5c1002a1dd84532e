"""Beam search on the device: the best continuations that a search of fixed width finds, and their scores."""

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
from model.checks import check_number, check_whole
from model.dtypes import DTypeLike
from model.errors import InputError
from model.sharding import under_mesh_of
from model.transformer import forward_cached


@dataclasses.dataclass(frozen=True)
class Beams:
    """Of every prompt the n best hypotheses, the best first; fewer only where the model has no more.

    tokens: without the stop id. logprobs: of those tokens, under the model. scores: see `beam_search`; the stop id
    counts in them. finish_reason: "stop" or "length". text: what the tokens add to the prompt's text; None where no
    tokenizer was given.
    """

    tokens: list[list[list[int]]]
    scores: list[list[float]]
    logprobs: list[list[list[float]]]
    finish_reason: list[list[str]]
    text: list[list[str]] | None = None


class Hypotheses(struct.PyTreeNode):
    """Outputs and what they weigh; log-probability and score −inf where there is none. Leaves are Any because JAX also
    fills the tree with shapes and shardings."""

    tokens: Any  # int32 [prompts, beams, room], the stop id included
    logprobs: Any  # float32 [prompts, beams, room]
    lengths: Any  # int32 [prompts, beams]
    scores: Any  # float32 [prompts, beams]: sums of log-probabilities while they run, normalised when finished
    stopped: Any  # bool [prompts, beams]: a stop id ended it


class Search(struct.PyTreeNode):
    """What the search carries on; leaves as in `Hypotheses`, traced settings among them."""

    running: Hypotheses  # the best first; their scores are −inf when a prompt's search has ended
    finished: Hypotheses  # the best first
    cache: KVCache  # rows: prompt by prompt, beam by beam; lacks the newest tokens
    step: Any  # int32 []: length of the running outputs
    limit: Any  # int32 []
    stop_ids: Any  # int32 [stops], padded with −1
    length_penalty: Any  # float32 []
    patience: Any  # int32 []: index in PATIENCE


PATIENCE: tuple[bool | str, ...] = (True, False, "never")  # the values of early_stopping


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
    """Continue every prompt by the outputs of highest score that a beam of this width finds.

    score = Σ log p(token) / length ** length_penalty, over all tokens of the output with the stop id that ends it: the
    power that Transformers uses, not the ((5 + length) / 6) ** α of Wu et al. 2016 (section 7). 0 compares sums, 1
    means; above 0 longer outputs gain.

    In each step the `beams` best continuations of the running hypotheses by Σ log p go on. Those of a stop id that are
    among the `beams` best of all finish and are kept apart, the `beams` best by score; what runs at max_new_tokens
    finishes there. early_stopping says when a prompt's search ends before that, once `beams` have finished: True: at
    once; False: when the best running hypothesis at its present length scores no better than the worst finished one;
    "never": when it could not do so at any length to come. With one beam and not "never" this is greedy decoding.

    stop_ids: None means the config's `eos_token_ids`. Of an encoder-decoder the prompts are the encoder's. n: how many
    are handed back. tokenizer: makes `text`. cache_dtype: see `init_cache`. execution: see `generate`. Changing
    length_penalty, early_stopping or n compiles nothing.
    Raises InputError on prompts as `generate` does, and on settings that mean nothing.
    """
    check_prompts(config, prompts, max_new_tokens)
    stops = tuple(dict.fromkeys(config.eos_token_ids if stop_ids is None else stop_ids))
    _check(config, beams, n, length_penalty, stops, early_stopping)
    with under_mesh_of(params):
        copies = [beams] * len(prompts)
        logits, cache = read_prompts(
            config, params, prompts, copies=copies, cache_dtype=cache_dtype, execution=execution
        )
        search = Search(
            running=_none(len(prompts), beams, bucket(max_new_tokens, ROOM)),
            finished=_none(len(prompts), beams, bucket(max_new_tokens, ROOM)),
            cache=cache,
            step=jnp.int32(0),
            limit=jnp.int32(max_new_tokens),
            stop_ids=jnp.asarray([*stops, *[-1] * (bucket(len(stops), 8) - len(stops))], jnp.int32),
            length_penalty=jnp.float32(length_penalty),
            patience=jnp.int32(PATIENCE.index(early_stopping)),
        )
        search, running = _begin(search, logits)
        filled = 1 if config.stack == "encoder-decoder" else max(map(len, prompts))
        left = max_new_tokens - 1
        while left:
            if filled == search.cache.capacity:
                search = search.replace(cache=grow(config, search.cache, capacity_for(config, filled + 1)))
            steps = min(ROOM, left, search.cache.capacity - filled)
            search, upcoming = _go_on(config, params, search, np.int32(steps))
            if not running:  # of the call before: this one is under way while the host waits for that
                break
            running, filled, left = upcoming, filled + steps, left - steps
    made = _beams(jax.device_get(search.finished), n)
    if tokenizer is None:
        return made
    before = decoder_prompts(config, prompts)
    text = [
        [continuation_text(tokenizer, prompt, tokens) for tokens in of_prompt]
        for prompt, of_prompt in zip(before, made.tokens, strict=True)
    ]
    return dataclasses.replace(made, text=text)


def _none(prompts: int, beams: int, room: int) -> Hypotheses:
    return Hypotheses(
        tokens=jnp.zeros((prompts, beams, room), jnp.int32),
        logprobs=jnp.zeros((prompts, beams, room), jnp.float32),
        lengths=jnp.zeros((prompts, beams), jnp.int32),
        scores=jnp.full((prompts, beams), -jnp.inf, jnp.float32),
        stopped=jnp.zeros((prompts, beams), bool),
    )


@functools.partial(jax.jit, donate_argnums=0)
@lenient()
def _begin(search: Search, logits: Float[Array, "rows vocab"]) -> tuple[Search, Bool[Array, ""]]:
    """The first token of every output. All beams of a prompt are the same yet, so that one of them counts."""
    scores = jnp.where(jnp.arange(search.running.scores.shape[1]) == 0, 0.0, search.running.scores)
    search = search.replace(running=search.running.replace(scores=scores))
    search = _advance(search, logits)
    return search, _runs(search)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@lenient()
def _go_on(
    config: ModelConfig, params: Params, search: Search, steps: Int[Array, ""]
) -> tuple[Search, Bool[Array, ""]]:
    """Up to `steps` tokens more, fewer once no prompt's search runs, and whether one still does. Donates the search."""

    def body(carry):
        step, search = carry
        running = search.running
        newest = jnp.take(running.tokens, search.step - 1, axis=2).reshape(-1)
        lengths = (running.scores > -jnp.inf).astype(jnp.int32).reshape(-1)
        hidden, cache = forward_cached(config, params, newest[:, None], lengths, search.cache)
        return step + 1, _advance(search.replace(cache=cache), head(config, params, hidden))

    unfinished = lambda carry: (carry[0] < steps) & _runs(carry[1])
    _, search = jax.lax.while_loop(unfinished, body, (jnp.int32(0), search))
    return search, _runs(search)


def _runs(search: Search) -> Bool[Array, ""]:
    return jnp.any(search.running.scores > -jnp.inf)


def _advance(search: Search, logits: Float[Array, "rows vocab"]) -> Search:
    """Every running hypothesis one token longer, what ends put among the finished, the cache in the new order."""
    old = search.running
    prompts, beams = old.scores.shape
    vocab = logits.shape[-1]
    logprobs = jax.nn.log_softmax(logits).reshape(prompts, beams, vocab)
    stop_ids = search.stop_ids
    is_stop = jnp.any(jnp.arange(vocab)[:, None] == stop_ids, axis=1)

    sums = old.scores[..., None] + jnp.where(is_stop, -jnp.inf, logprobs)
    best, index = jax.lax.top_k(sums.reshape(prompts, -1), beams)
    parent = index // vocab
    running = _extended(old, logprobs, parent, index % vocab, best, search.step)

    # Whatever ends here competes with all continuations for a place among the best.
    ends = jnp.where(stop_ids >= 0, logprobs[..., jnp.maximum(stop_ids, 0)], -jnp.inf)
    ended, index = jax.lax.top_k((old.scores[..., None] + ends).reshape(prompts, -1), beams)
    worst = jax.lax.top_k(jnp.concatenate([best, ended], axis=1), beams)[0][:, -1:]
    ended = jnp.where(ended >= worst, ended, -jnp.inf)
    stops = jnp.maximum(stop_ids, 0)[index % len(stop_ids)]
    stopped = _extended(old, logprobs, index // len(stop_ids), stops, ended, search.step)
    stopped = stopped.replace(stopped=jnp.ones((prompts, beams), bool))

    length = (search.step + 1).astype(jnp.float32)
    normalised = lambda sums, length: sums / length**search.length_penalty
    last = search.step + 1 >= search.limit
    candidates = [
        search.finished,
        stopped.replace(scores=normalised(stopped.scores, length)),
        running.replace(scores=jnp.where(last, normalised(running.scores, length), -jnp.inf)),
    ]
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *candidates)
    _, index = jax.lax.top_k(together.scores, beams)
    finished = jax.tree.map(lambda leaf: jax.vmap(lambda row, places: row[places])(leaf, index), together)

    longest = (search.patience == PATIENCE.index("never")) & (search.length_penalty > 0)
    hope = normalised(running.scores[:, 0], jnp.where(longest, search.limit.astype(jnp.float32), length))
    worst = finished.scores[:, -1]
    at_once = (search.patience == PATIENCE.index(True)) & (worst > -jnp.inf)
    over = last | at_once | (hope <= worst)
    running = running.replace(scores=jnp.where(over[:, None], -jnp.inf, running.scores))
    cache = search.cache
    if beams > 1:
        cache = take(cache, (parent + beams * jnp.arange(prompts)[:, None]).reshape(-1))
    return search.replace(running=running, finished=finished, cache=cache, step=search.step + 1)


def _extended(
    old: Hypotheses,
    logprobs: Float[Array, "prompts beams vocab"],
    parent: Int[Array, "prompts beams"],
    token: Int[Array, "prompts beams"],
    scores: Float[Array, "prompts beams"],
    step: Int[Array, ""],
) -> Hypotheses:
    """Each parent with its token at `step`, and these scores."""
    taken = jax.tree.map(lambda leaf: jax.vmap(lambda row, places: row[places])(leaf, parent), old)
    own = jax.vmap(lambda row, parent, token: row[parent, token])(logprobs, parent, token)
    return Hypotheses(
        tokens=taken.tokens.at[:, :, step].set(token),
        logprobs=taken.logprobs.at[:, :, step].set(own),
        lengths=jnp.full_like(taken.lengths, step + 1),
        scores=scores,
        stopped=taken.stopped,
    )


def _beams(finished: Hypotheses, n: int) -> Beams:
    """The n best of every prompt, from host arrays."""
    made = Beams([], [], [], [])
    for prompt, scores in enumerate(finished.scores):
        there = [place for place in range(n) if scores[place] > -math.inf]
        counts = [int(finished.lengths[prompt, place] - finished.stopped[prompt, place]) for place in there]
        pairs = list(zip(there, counts, strict=True))
        made.tokens.append([finished.tokens[prompt, place, :count].tolist() for place, count in pairs])
        made.logprobs.append([finished.logprobs[prompt, place, :count].tolist() for place, count in pairs])
        made.scores.append([float(scores[place]) for place in there])
        made.finish_reason.append(["stop" if finished.stopped[prompt, place] else "length" for place in there])
    return made


def _check(config, beams, n, length_penalty, stops, early_stopping) -> None:
    check_whole("beams", beams, 1, hint="4 is usual")
    if not 1 <= n <= beams:
        raise InputError(f"n={n} hypotheses cannot be handed back of beams={beams}; give n in 1 … {beams}")
    check_number("length_penalty", length_penalty, hint="1 compares means, 0 sums")
    if early_stopping not in PATIENCE:
        raise InputError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
    wrong = [token for token in stops if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(f"stop_ids has the id {wrong[0]}, outside the vocabulary of {config.vocab_size}")
