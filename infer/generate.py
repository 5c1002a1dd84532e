"""Whole completions: prompts into a cache, then calls that stay on the device for many tokens, the next one under way
while the host reads the last."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from infer.decode import FULL, ROOM, RUNNING, Emitted, Rows, begin, decode, grow_rows
from infer.prompts import Prompt, bucket, capacity_for, check_prompts, read_prompts
from infer.sampler import History, SamplerState, row_keys
from infer.sampling import Sampling
from model import ModelConfig, Params
from model.ambient import lenient
from model.errors import InputError
from model.sharding import under_mesh_of


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these ids."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """One entry per completion: those of the first prompt, those of the second, …

    tokens: without the stop id, and up to where a stop string begins. logprobs: of those tokens, under the model.
    finish_reason: "stop" (a stop id or string came) or "length". top_logprobs: of every token {id: log-probability} of
    the likeliest ones in its place, where the sampling asks for them.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]
    top_logprobs: list[list[dict[int, float]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Completion:
    """A row as far as the host has read it. finish_reason: None while it goes on."""

    sampling: Sampling
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def read(self, emitted: Emitted, row: int, tokenizer: Decoder | None) -> None:
        """Take in what a call made (host arrays) of this row."""
        if self.finish_reason is not None:
            return
        for step in np.flatnonzero(emitted.tokens[row] >= 0):
            self.tokens.append(int(emitted.tokens[row, step]))
            self.logprobs.append(float(emitted.logprobs[row, step]))
            asked = slice(0, self.sampling.logprobs)
            likeliest = zip(emitted.top_ids[row, step, asked], emitted.top_logprobs[row, step, asked], strict=True)
            self.top_logprobs.append({int(token): float(logprob) for token, logprob in likeliest})
            if self.sampling.stop_strings and tokenizer is not None and self._cut(tokenizer):
                return
        if emitted.status[row] != RUNNING:
            self.finish_reason = "length" if emitted.status[row] == FULL else "stop"

    def _cut(self, tokenizer: Decoder) -> bool:
        """Cut before the first token that reaches into a stop string, if one has come."""
        text = tokenizer.decode(self.tokens)
        found = [text.find(stop) for stop in self.sampling.stop_strings]
        starts = [start for start in found if start >= 0]
        if not starts:
            return False
        while self.tokens and len(tokenizer.decode(self.tokens)) > min(starts):
            self.tokens.pop()
        del self.logprobs[len(self.tokens) :], self.top_logprobs[len(self.tokens) :]
        self.finish_reason = "stop"
        return True


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    max_new_tokens: int = 64,
    key: PRNGKeyArray | None = None,
    tokenizer: Decoder | None = None,
    cache_dtype: str | None = None,
) -> Generated:
    """Continue every prompt; prompts may differ in length, and in their sampling where a sequence is given.

    key: of all rows whose sampling has no seed; None: `jax.random.key(0)`. tokenizer: needed for stop strings.
    cache_dtype: see `init_cache`. Of an encoder-decoder the prompts are the encoder's, and the decoder starts from
    `decoder_start_token_id`. Lengths are rounded up to powers of two inside, so that few programs are ever compiled.
    params may lie over a mesh, prepared (`prepare(…, mesh=mesh)`) or not: the cache is then split over it too.
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
    )
    return Generated(**columns(rows))


def columns(rows: Sequence[Completion]) -> dict[str, Any]:
    """The fields of `Generated`, from completions that have ended."""
    names = [field.name for field in dataclasses.fields(Generated)]
    return {name: [getattr(row, name) for row in rows] for name in names}


def stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    max_new_tokens: int = 64,
    key: PRNGKeyArray | None = None,
    tokenizer: Decoder | None = None,
    cache_dtype: str | None = None,
    every: int = 8,
) -> Iterator[list[Completion]]:
    """As `generate`, handing out all completions as far as they are: after the first token, then every few.

    The list and its completions are the same objects throughout. The device works on the next tokens meanwhile.
    Raises InputError before anything is computed.
    """
    check_prompts(config, prompts, max_new_tokens)
    samplings = one_sampling_each(sampling, len(prompts), tokenizer)
    return _stream(config, params, prompts, samplings, max_new_tokens, key, tokenizer, cache_dtype, min(every, ROOM))


def _stream(config, params, prompts, samplings, max_new_tokens, key, tokenizer, cache_dtype, every):
    with under_mesh_of(params):
        logits, cache = read_prompts(
            config, params, prompts, copies=[one.n for one in samplings], cache_dtype=cache_dtype
        )
        prompts, samplings = one_row_each(config, prompts, samplings)
        rows, coming = begin(start_rows(config, prompts, samplings, cache, max_new_tokens, key), logits)
    completions = [Completion(one) for one in samplings]
    filled = max(map(len, prompts))  # of the cache, which does not hold the newest token
    left = max_new_tokens - 1
    going_on = lambda: any(one.finish_reason is None for one in completions)

    def read(emitted: Emitted) -> list[Completion]:
        emitted = jax.device_get(emitted)
        for row, completion in enumerate(completions):
            completion.read(emitted, row, tokenizer)
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


def one_row_each(
    config: ModelConfig, prompts: Sequence[Prompt], samplings: Sequence[Sampling]
) -> tuple[list[Prompt], list[Sampling]]:
    """What stands before each row's output, and its sampling: n rows per prompt; a seed counts up from row to row."""
    own = lambda one, i: one if one.seed is None else dataclasses.replace(one, seed=(one.seed + i) % 2**32)
    before = [[config.decoder_start_token_id]] * len(prompts) if config.stack == "encoder-decoder" else prompts
    pairs = [(prompt, own(one, i)) for prompt, one in zip(before, samplings, strict=True) for i in range(one.n)]
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
