"""Prefill prompts: validate them, split them into chunks of few lengths, and read a prefix that they share once."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from infer.step import prefill
from model import Execution, KVCache, ModelConfig, Params, init_cache
from model.ambient import lenient
from model.cache import grow, take
from model.dtypes import DTypeLike
from model.errors import InputError, check_at_least_one

Prompt = Sequence[int]
CHUNK = 1024  # most tokens per row in one prefill, a power of two
SMALLEST_CHUNK = 16
SMALLEST_CAPACITY = 64
WORTH_SHARING = 64  # tokens; a shorter common prefix is read again in every row


def bucket(length: int, smallest: int = 1) -> int:
    """Return the smallest power of two that is at least `length` and `smallest`, so that few programs are compiled."""
    return 1 << (max(smallest, length) - 1).bit_length()


def capacity_for(config: ModelConfig, length: int) -> int:
    """Return the capacity of a cache for rows of `length` tokens: a power of two, or the context if that is less."""
    return min(bucket(length, SMALLEST_CAPACITY), max(config.max_seq_len, length))


@lenient()
def read_prompts(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    *,
    copies: Sequence[int] | None = None,
    cache_dtype: DTypeLike | None = None,
    spare: int = 0,
    execution: Execution = Execution(),
) -> tuple[Float[Array, "rows vocab"], KVCache]:
    """Prefill the prompts; return the logits after each and the cache, with copies[i] consecutive rows of prompt i.

    The prompts must be valid (`check_prompts`). A prefix common to all prompts is read once, and so are equal prompts.
    For an encoder-decoder these are the encoder's prompts.
    """
    unique = list(dict.fromkeys(map(tuple, prompts)))
    if config.stack == "encoder-decoder":
        logits, cache = _prefill_encoder(config, params, unique, cache_dtype, spare, execution)
    else:
        logits, cache = _prefill_decoder(config, params, unique, cache_dtype, spare, execution)
    copies = copies or [1] * len(prompts)
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    rows = [row_of[tuple(prompt)] for prompt, count in zip(prompts, copies, strict=True) for _ in range(count)]
    if rows != list(range(len(unique))):
        index = jnp.asarray(rows, jnp.int32)
        logits, cache = logits[index], take(cache, index)
    return logits, cache


def _prefill_decoder(config, params, prompts, cache_dtype, spare, execution):
    shared = _shared_length(prompts) if len(prompts) > 1 else 0
    if shared < WORTH_SHARING:
        first = min(CHUNK, max(map(len, prompts)))
        cache = init_cache(config, len(prompts), capacity_for(config, first), cache_dtype, spare=spare)
        return _prefill_from(config, params, prompts, 0, cache, execution)
    cache = init_cache(config, 1, capacity_for(config, min(CHUNK, shared)), cache_dtype, spare=spare)
    _, cache = _prefill_from(config, params, [prompts[0][:shared]], 0, cache, execution)
    cache = take(cache, jnp.zeros(len(prompts), jnp.int32))
    return _prefill_from(config, params, prompts, shared, cache, execution)


def _shared_length(prompts: Sequence[Prompt]) -> int:
    """Return the length of the prefix that all prompts share, at most one token less than the shortest prompt."""
    ordered = sorted(map(tuple, prompts))  # lexicographic: what the first and the last share, all share
    first, last = np.array(ordered[0]), np.array(ordered[-1])
    most = min(map(len, prompts)) - 1
    differ = np.flatnonzero(first[:most] != last[:most])
    return int(differ[0]) if len(differ) else most


def _prefill_from(config, params, prompts, start, cache, execution):
    """Append the prompts from position `start`, which is where the cache ends, in chunks."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    logits, longest = None, int(lengths.max())
    for begin in range(start, longest, CHUNK):
        end = min(begin + CHUNK, longest)
        chunk_lengths = np.clip(lengths - begin, 0, CHUNK).astype(np.int32)
        if end > cache.capacity:
            cache = grow(config, cache, capacity_for(config, end))
        tokens = _padded([prompt[begin:end] for prompt in prompts], bucket(end - begin, SMALLEST_CHUNK))
        chunk_logits, cache = prefill(
            config, params, tokens, chunk_lengths, cache, fresh=begin == 0, execution=execution
        )
        # Rows that ended in an earlier chunk keep their logits.
        logits = chunk_logits if logits is None else jnp.where((chunk_lengths > 0)[:, None], chunk_logits, logits)
    return logits, cache


def _prefill_encoder(config, params, prompts, cache_dtype, spare, execution):
    width = min(bucket(max(map(len, prompts)), SMALLEST_CHUNK), config.max_seq_len)
    cache = init_cache(config, len(prompts), capacity_for(config, 1), cache_dtype, width, spare)
    start = np.full((len(prompts), 1), config.decoder_start_token_id, np.int32)
    return prefill(
        config,
        params,
        start,
        np.ones(len(prompts), np.int32),
        cache,
        encoder_tokens=_padded(prompts, width),
        encoder_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        fresh=True,
        execution=execution,
    )


def _padded(prompts: Sequence[Prompt], width: int) -> np.ndarray:
    """Return int32 [batch, width], right-padded with 0."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def decoder_prompts(config: ModelConfig, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Return the tokens before each output in the decoder: the prompts, or an encoder-decoder's start token."""
    return [[config.decoder_start_token_id]] * len(prompts) if config.stack == "encoder-decoder" else prompts


def check_prompts(config: ModelConfig, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Raise InputError unless the model can continue every prompt by `max_new_tokens` tokens."""
    check_generates(config)
    if not len(prompts):
        raise InputError("there is no prompt to continue; give at least one")
    check_at_least_one(max_new_tokens=max_new_tokens)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; give it at least one token, such as the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise InputError(
                f"prompt {number} has the id {wrong}, outside the vocabulary of {config.vocab_size}; was it encoded "
                "with this model's tokenizer?"
            )
    longest = max(map(len, prompts))
    if config.stack == "encoder-decoder":
        if longest > config.max_seq_len:
            raise InputError(f"a prompt of {longest} tokens does not fit the encoder, max_seq_len={config.max_seq_len}")
        longest = 1
    if longest + max_new_tokens > config.max_seq_len:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context, "
            f"max_seq_len={config.max_seq_len}"
        )


def check_generates(config: ModelConfig) -> None:
    """Raise InputError if the model has no language-model head or no decoder."""
    if config.head != "language-model" or config.stack == "encoder":
        raise InputError(
            f"a model with stack={config.stack!r} and head={config.head!r} does not generate text; use a decoder or an "
            "encoder-decoder with head='language-model'"
        )
