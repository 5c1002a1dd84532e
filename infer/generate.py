"""Generate completions: prefill the prompts, then decode in calls of many tokens.

While the host reads the tokens of one call, the device computes the next.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from infer.completion import Completion, Generated, columns, detokenizer
from infer.decode import ROOM, Emitted, begin, decode, grow_state, init_decode_state
from infer.prompts import Prompt, capacity_for, check_prompts, decoder_prompts, read_prompts
from infer.sampling import Sampling
from infer.text import Decoder
from model import Execution, ModelConfig, Params
from model.dtypes import DTypeLike
from model.errors import InputError
from model.sharding import under_mesh_of


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
    """Continue every prompt by up to `max_new_tokens` tokens.

    prompts: token ids, of any lengths; for an encoder-decoder the encoder's, and the decoder starts from
    `decoder_start_token_id`. sampling: one for all prompts or one per prompt. key: of the rows whose sampling has no
    seed; None: `jax.random.key(0)`. tokenizer: decodes `text`, and is required for stop strings. cache_dtype: see
    `init_cache`. params: may be sharded over a mesh, prepared (`prepare(…, mesh=mesh)`) or not; the cache is then
    sharded over it too. execution: chooses the encoder's attention kernel; attention over a cache always uses XLA.

    Lengths are rounded up to powers of two internally, so that few programs are compiled.
    Raises InputError on an empty prompt, an id outside the vocabulary, or more tokens than the context holds.
    """
    *_, completions = stream(
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
    return Generated(**columns(completions))


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
    """Yield all completions so far: after the first token, then after every `every` tokens; else as `generate`.

    The same list of the same objects is yielded each time. Raises InputError before anything is computed.
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
        state, emitted = begin(init_decode_state(config, prompts, samplings, cache, max_new_tokens, key), logits)
    completions = [
        Completion(one, detokenizer(tokenizer, prompt, one)) for prompt, one in zip(prompts, samplings, strict=True)
    ]
    filled = max(map(len, prompts))  # tokens of the longest row in the cache, which lacks the newest token
    left = max_new_tokens - 1

    def any_running() -> bool:
        return any(completion.finish_reason is None for completion in completions)

    def read(emitted: Emitted) -> list[Completion]:
        emitted = jax.device_get(emitted)
        for row, completion in enumerate(completions):
            completion.read(emitted, row)
        return completions

    yield read(emitted)
    unread = None  # of the previous call; read only after the next call was dispatched, so that the device never waits
    while left and any_running():
        halt = np.array([completion.finish_reason is not None for completion in completions])
        with under_mesh_of(params):
            if filled == state.cache.capacity:
                state = grow_state(config, state, capacity_for(config, filled + 1))
            steps = min(every, left, state.cache.capacity - filled)
            state, emitted = decode(config, params, state, np.int32(steps), halt)
        filled, left = filled + steps, left - steps
        if unread is not None:
            yield read(unread)
        unread = emitted
    if unread is not None and any_running():
        yield read(unread)


def one_row_each(
    config: ModelConfig, prompts: Sequence[Prompt], samplings: Sequence[Sampling]
) -> tuple[list[Prompt], list[Sampling]]:
    """Return the decoder's prompt and the sampling of every row, `Sampling.n` rows per prompt.

    Row i of a prompt has the seed `seed + i`, if there is a seed.
    """
    row_prompts, row_samplings = [], []
    for prompt, sampling in zip(decoder_prompts(config, prompts), samplings, strict=True):
        for i in range(sampling.n):
            row_prompts.append(prompt)
            if sampling.seed is None:
                row_samplings.append(sampling)
            else:
                row_samplings.append(dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**32))
    return row_prompts, row_samplings


def one_sampling_each(
    sampling: Sampling | Sequence[Sampling], prompts: int, tokenizer: Decoder | None
) -> list[Sampling]:
    """Return one sampling per prompt.

    Raises InputError if their number differs from that of the prompts, or on stop strings without a tokenizer.
    """
    samplings = [sampling] * prompts if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != prompts:
        raise InputError(f"{len(samplings)} samplings were given for {prompts} prompts; give one, or one for each")
    for one in samplings:
        if one.stop_strings and tokenizer is None:
            raise InputError(f"stop_strings={one.stop_strings!r} need a tokenizer; give generate(…, tokenizer=…)")
    return samplings
