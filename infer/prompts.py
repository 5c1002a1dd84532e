"""Prompts into a cache: checked, cut into chunks of few lengths, what they share read once."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from infer.step import prefill
from model import Execution, KVCache, ModelConfig, Params, init_cache
from model.ambient import lenient
from model.cache import grow, take
from model.checks import check_at_least_one
from model.dtypes import DTypeLike
from model.errors import InputError

Prompt = Sequence[int]
CHUNK = 1024  # tokens of a row that one prefill takes in, a power of two
SMALLEST_CHUNK = 16
SMALLEST_CAPACITY = 64
WORTH_SHARING = 64  # tokens; fewer are read again in every row


def bucket(length: int, smallest: int = 1) -> int:
    """The power of two that holds `length`, so that few programs are ever compiled."""
    return 1 << (max(smallest, length) - 1).bit_length()


def capacity_for(config: ModelConfig, length: int) -> int:
    """Capacity of a cache for rows of `length` tokens: the same few for all lengths."""
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
    """Logits after every prompt and the cache that holds them, copies[i] rows of prompt i after one another.

    Prompts were checked (`check_prompts`). What all of them begin with is read once; so is a prompt that comes several
    times. Of an encoder-decoder the prompts are the encoder's.
    """
    unique = list(dict.fromkeys(map(tuple, prompts)))
    if config.stack == "encoder-decoder":
        logits, cache = _read_sources(config, params, unique, cache_dtype, spare, execution)
    else:
        logits, cache = _read(config, params, unique, cache_dtype, spare, execution)
    copies = copies or [1] * len(prompts)
    rows = [unique.index(tuple(prompt)) for prompt, n in zip(prompts, copies, strict=True) for _ in range(n)]
    if rows != list(range(len(unique))):
        index = jnp.asarray(rows, jnp.int32)
        logits, cache = logits[index], take(cache, index)
    return logits, cache


def _read(config, params, prompts, cache_dtype, spare, execution):
    shared = _shared(prompts) if len(prompts) > 1 else 0
    if shared < WORTH_SHARING:
        first = min(CHUNK, max(map(len, prompts)))
        cache = init_cache(config, len(prompts), capacity_for(config, first), cache_dtype, spare=spare)
        return _read_from(config, params, prompts, 0, cache, execution)
    cache = init_cache(config, 1, capacity_for(config, min(CHUNK, shared)), cache_dtype, spare=spare)
    _, cache = _read_from(config, params, [prompts[0][:shared]], 0, cache, execution)
    cache = take(cache, jnp.zeros(len(prompts), jnp.int32))
    return _read_from(config, params, prompts, shared, cache, execution)


def _shared(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with; of each at least one is left."""
    words = sorted(map(tuple, prompts))  # in the order of words: the two that differ first
    low, high = np.array(words[0]), np.array(words[-1])
    fewest = min(map(len, prompts)) - 1
    differ = np.flatnonzero(low[:fewest] != high[:fewest])
    return int(differ[0]) if len(differ) else fewest


def _read_from(config, params, prompts, start, cache, execution):
    """Every prompt from position `start` on, where the cache stands."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    logits, longest = None, int(lengths.max())
    for begin in range(start, longest, CHUNK):
        end = min(begin + CHUNK, longest)
        inside = np.clip(lengths - begin, 0, CHUNK).astype(np.int32)
        if end > cache.capacity:
            cache = grow(config, cache, capacity_for(config, end))
        tokens = _padded([prompt[begin:end] for prompt in prompts], bucket(end - begin, SMALLEST_CHUNK))
        made, cache = prefill(config, params, tokens, inside, cache, fresh=begin == 0, execution=execution)
        logits = made if logits is None else jnp.where((inside > 0)[:, None], made, logits)
    return logits, cache


def _read_sources(config, params, prompts, cache_dtype, spare, execution):
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
    """int32 [batch, width], right-padded with 0."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def decoder_prompts(config: ModelConfig, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The tokens before each output in the decoder: of an encoder-decoder its start token, else the prompts."""
    return [[config.decoder_start_token_id]] * len(prompts) if config.stack == "encoder-decoder" else prompts


def check_prompts(config: ModelConfig, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Raise InputError unless every prompt can be continued by so many tokens."""
    check_generates(config)
    if not len(prompts):
        raise InputError("there is no prompt to continue")
    check_at_least_one(max_new_tokens=max_new_tokens)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; give it at least one token, such as the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise InputError(f"prompt {number} has the id {wrong}, outside the vocabulary of {config.vocab_size}")
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
    """Raise InputError for a model that makes no text."""
    if config.head != "language-model" or config.stack == "encoder":
        raise InputError(f"a model with stack={config.stack!r} and head={config.head!r} does not generate text")
