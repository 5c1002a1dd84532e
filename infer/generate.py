"""Whole completions: prompts into a cache, then calls that stay on the device for many tokens, the next one under way
while the host reads the last."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from infer.decode import FULL, ROOM, RUNNING, Emitted, Rows, begin, decode, grow_rows
from infer.prompts import Prompt, bucket, capacity_for, check_prompts, decoder_prompts, read_prompts
from infer.sampler import History, SamplerState, row_keys
from infer.sampling import Sampling
from infer.text import Decoder, Detokenizer
from model import Execution, ModelConfig, Params
from model.ambient import lenient
from model.dtypes import DTypeLike
from model.errors import InputError
from model.sharding import under_mesh_of


@dataclasses.dataclass(frozen=True)
class Generated:
    """One entry per completion: those of the first prompt, those of the second, …

    tokens: without the stop id. Where a stop string came, all that `text` is made of, so that the last of them may
    reach into it. logprobs: of those tokens, under the model. finish_reason: "stop" (a stop id or string came) or
    "length". top_logprobs: of every token {id: log-probability} of the likeliest ones in its place, where the sampling
    asks for them. text: what the tokens add to the prompt's text, up to where a stop string begins
    (`infer.text.Detokenizer`); None where no tokenizer was given.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]
    top_logprobs: list[list[dict[int, float]]] = dataclasses.field(default_factory=list)
    text: list[str] | None = None


@dataclasses.dataclass
class Completion:
    """A row as far as the host has read it. finish_reason: None while it goes on.

    words: turns its tokens into text; None without a tokenizer.
    """

    sampling: Sampling
    words: Detokenizer | None = dataclasses.field(default=None, repr=False, compare=False)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str | None:
        """The text so far, without what a coming token may still change; None without a tokenizer."""
        return None if self.words is None else self.words.text

    def read(self, emitted: Emitted, row: int) -> None:
        """Take in the tokens that a call made (host arrays) for this row."""
        if self.finish_reason is not None:
            return
        before, asked = len(self.tokens), slice(0, self.sampling.logprobs)
        for step in np.flatnonzero(emitted.tokens[row] >= 0):
            self.tokens.append(int(emitted.tokens[row, step]))
            self.logprobs.append(float(emitted.logprobs[row, step]))
            likeliest = zip(emitted.top_ids[row, step, asked], emitted.top_logprobs[row, step, asked], strict=True)
            self.top_logprobs.append({int(token): float(logprob) for token, logprob in likeliest})
        if self.words is not None:
            self.words.push(self.tokens[before:])
            if self.words.ids_before_stop is not None:
                return self.end("stop")
        if emitted.status[row] != RUNNING:
            self.end("length" if emitted.status[row] == FULL else "stop")

    def end(self, reason: str) -> None:
        """Take no more tokens, and drop those that came after a stop string."""
        self.finish_reason = reason
        if self.words is None:
            return
        self.words.finish()
        kept = self.words.ids_before_stop
        if kept is not None:
            self.finish_reason = "stop"
            del self.tokens[kept:], self.logprobs[kept:], self.top_logprobs[kept:]


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    max_new_tokens: int = 64,
    key: PRNGKeyArray | None = None,
    tokenizer: Decoder | None = None,
    cache_dtype: DTypeLike | None = None,
    execution: Execution = Execution(),
) -> Generated:
    """Continue every prompt; prompts may differ in length, and in their sampling where a sequence is given.

    key: of all rows whose sampling has no seed; None: `jax.random.key(0)`. tokenizer: makes `text`, and is needed for
    stop strings.
    cache_dtype: see `init_cache`. Of an encoder-decoder the prompts are the encoder's, and the decoder starts from
    `decoder_start_token_id`. Lengths are rounded up to powers of two inside, so that few programs are ever compiled.
    params may lie over a mesh, prepared (`prepare(…, mesh=mesh)`) or not: the cache is then split over it too.
    execution: chooses the kernel of an encoder; all else is read from a cache, which takes XLA.
    Raises InputError on an empty prompt, an id outside the vocabulary, or more tokens than the context holds.
    """
    *_, rows = stream(
        config,
        params,
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        key=key,
        tokenizer=tokenizer,
        cache_dtype=cache_dtype,
        every=ROOM,
        execution=execution,
    )
    return Generated(**columns(rows))


def columns(rows: Sequence[Completion]) -> dict[str, Any]:
    """The fields of `Generated`, from completions that have ended."""
    names = [field.name for field in dataclasses.fields(Generated)]
    found = {name: [getattr(row, name) for row in rows] for name in names}
    return found if all(row.words is not None for row in rows) else found | {"text": None}


def stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    max_new_tokens: int = 64,
    key: PRNGKeyArray | None = None,
    tokenizer: Decoder | None = None,
    cache_dtype: DTypeLike | None = None,
    every: int = 8,
    execution: Execution = Execution(),
) -> Iterator[list[Completion]]:
    """As `generate`, handing out all completions as far as they are: after the first token, then every few.

    The list and its completions are the same objects throughout. The device works on the next tokens meanwhile.
    Raises InputError before anything is computed.
    """
    check_prompts(config, prompts, max_new_tokens)
    samplings = one_sampling_each(sampling, len(prompts), tokenizer)
    every = min(every, ROOM)
    return _stream(config, params, prompts, samplings, max_new_tokens, key, tokenizer, cache_dtype, every, execution)


def _stream(config, params, prompts, samplings, max_new_tokens, key, tokenizer, cache_dtype, every, execution):
    with under_mesh_of(params):
        copies = [one.n for one in samplings]
        logits, cache = read_prompts(
            config, params, prompts, copies=copies, cache_dtype=cache_dtype, execution=execution
        )
        prompts, samplings = one_row_each(config, prompts, samplings)
        rows, coming = begin(start_rows(config, prompts, samplings, cache, max_new_tokens, key), logits)
    completions = [
        Completion(one, words_after(tokenizer, prompt, one)) for prompt, one in zip(prompts, samplings, strict=True)
    ]
    filled = max(map(len, prompts))  # of the cache, which does not hold the newest token
    left = max_new_tokens - 1
    going_on = lambda: any(one.finish_reason is None for one in completions)

    def read(emitted: Emitted) -> list[Completion]:
        emitted = jax.device_get(emitted)
        for row, completion in enumerate(completions):
            completion.read(emitted, row)
        return completions

    yield read(coming)
    ahead = None  # what the device works on while the host reads what came before
    while left and going_on():
        halt = np.array([one.finish_reason is not None for one in completions])
        with under_mesh_of(params):
            if filled == rows.cache.capacity:
                rows = grow_rows(config, rows, capacity_for(config, filled + 1))
            steps = min(every, left, rows.cache.capacity - filled)
            rows, coming = decode(config, params, rows, np.int32(steps), halt)
        filled, left = filled + steps, left - steps
        if ahead is not None:
            yield read(ahead)
        ahead = coming
    if ahead is not None and going_on():
        yield read(ahead)


def words_after(decoder: Decoder | None, prompt: Prompt, sampling: Sampling) -> Detokenizer | None:
    """Return the detokenizer of a continuation of this prompt; None without a tokenizer."""
    return None if decoder is None else Detokenizer(decoder, prompt, sampling.stop_strings)


def one_row_each(
    config: ModelConfig, prompts: Sequence[Prompt], samplings: Sequence[Sampling]
) -> tuple[list[Prompt], list[Sampling]]:
    """What stands before each row's output, and its sampling: n rows per prompt; a seed counts up from row to row."""
    own = lambda one, i: one if one.seed is None else dataclasses.replace(one, seed=(one.seed + i) % 2**32)
    before = zip(decoder_prompts(config, prompts), samplings, strict=True)
    pairs = [(prompt, own(one, i)) for prompt, one in before for i in range(one.n)]
    return [prompt for prompt, _ in pairs], [one for _, one in pairs]


@lenient()
def start_rows(
    config: ModelConfig,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    cache: Any,
    max_new_tokens: int,
    key: PRNGKeyArray | None = None,
) -> Rows:
    """Rows whose prompts stand in the cache, before their first token."""
    batch = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((batch, cache.capacity + 1), np.int32)  # the newest token is not in the cache yet
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    stops = [config.eos_token_ids if one.stop_ids is None else one.stop_ids for one in samplings]
    stop_ids = np.full((batch, bucket(max(map(len, stops)), 8)), -1, np.int32)
    for row, ids in zip(stop_ids, stops, strict=True):
        row[: len(ids)] = ids
    keys = row_keys(samplings, jax.random.key(0) if key is None else key)
    zeros = jnp.zeros(batch, jnp.int32)
    return Rows(
        token=zeros,
        cache=cache,
        history=History(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(lengths)),
        sampler=SamplerState.create(samplings, keys, config.vocab_size),
        stop_ids=jnp.asarray(stop_ids),
        limits=zeros + max_new_tokens,
        status=zeros + RUNNING,
    )


def one_sampling_each(
    sampling: Sampling | Sequence[Sampling], prompts: int, tokenizer: Decoder | None
) -> list[Sampling]:
    """The sampling of every prompt. Raises InputError on another number of them, and where stop strings lack a
    tokenizer."""
    samplings = [sampling] * prompts if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != prompts:
        raise InputError(f"{len(samplings)} samplings were given for {prompts} prompts; give one, or one for each")
    for one in samplings:
        if one.stop_strings and tokenizer is None:
            raise InputError(f"stop_strings={one.stop_strings!r} need the tokenizer; give generate(…, tokenizer=…)")
    return samplings
