"""Whole completions: one prefill, then a loop that stays on the device until every row has stopped."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from infer.sampling import SamplerState, Sampling, choose
from infer.step import prefill
from model import KVCache, ModelConfig, Params, head, init_cache
from model.errors import InputError
from model.transformer import forward_cached


@dataclasses.dataclass(frozen=True)
class Generated:
    """One entry per prompt. tokens: without the stop id. logprobs: of those tokens, under the model.

    finish_reason: "stop" (a stop id came) or "length".
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = Sampling(),
    *,
    max_new_tokens: int = 64,
    key: PRNGKeyArray | None = None,
) -> Generated:
    """Continue every prompt; prompts may differ in length. key None: `jax.random.key(0)`.

    Of an encoder-decoder the prompts are the encoder's, and the decoder starts from `decoder_start_token_id`. Prompt
    lengths and token counts are rounded up to powers of two inside, so that few programs are ever compiled.
    Raises InputError on an empty prompt, an id outside the vocabulary, or more tokens than the context holds.
    """
    _check(config, prompts, max_new_tokens)
    encoder: dict[str, np.ndarray] = {}
    encoder_capacity = None
    if config.stack == "encoder-decoder":
        sources, source_lengths = _padded(prompts, config.max_seq_len)
        encoder = {"encoder_tokens": sources, "encoder_lengths": source_lengths}
        encoder_capacity = sources.shape[1]
        prompts = [[config.decoder_start_token_id]] * len(prompts)
    tokens, lengths = _padded(prompts, config.max_seq_len)
    capacity = min(_bucket(int(lengths.max()) + max_new_tokens), config.max_seq_len)
    cache = init_cache(config, len(prompts), capacity, encoder_capacity=encoder_capacity)
    logits, cache = prefill(config, params, tokens, lengths, cache, **encoder)
    stop_ids = config.eos_token_ids if sampling.stop_ids is None else sampling.stop_ids
    state = SamplerState.create(sampling, jax.random.key(0) if key is None else key)
    chosen, logprobs, counts, stopped = jax.device_get(
        _decode(
            config,
            _bucket(max_new_tokens),
            params,
            logits,
            cache,
            state,
            jnp.asarray(stop_ids, jnp.int32).reshape(-1),
            jnp.int32(max_new_tokens),
        )
    )
    return Generated(
        tokens=[row[:count].tolist() for row, count in zip(chosen, counts, strict=True)],
        logprobs=[row[:count].tolist() for row, count in zip(logprobs, counts, strict=True)],
        finish_reason=["stop" if stop else "length" for stop in stopped],
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    config: ModelConfig,
    room: int,
    params: Params,
    logits: Array,
    cache: KVCache,
    sampler: SamplerState,
    stop_ids: Int[Array, " stops"],
    limit: Int[Array, ""],
):
    """(tokens [batch, room], logprobs, counts [batch], stopped [batch]): choose, stop or append, until all stop."""
    batch = logits.shape[0]
    start = (
        jnp.int32(0),
        logits,
        cache,
        jnp.zeros((batch, room), jnp.int32),
        jnp.zeros((batch, room), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
    )

    def go_on(carry):
        step, *_, stopped = carry
        return (step < limit) & ~jnp.all(stopped)

    def body(carry):
        step, logits, cache, tokens, logprobs, counts, stopped = carry
        token, logprob = choose(sampler, logits, step)
        stopped = stopped | jnp.any(token[:, None] == stop_ids[None], axis=-1)
        tokens = tokens.at[:, step].set(token)
        logprobs = logprobs.at[:, step].set(logprob)
        counts = counts + ~stopped
        # The last token needs no logits after it; a stopped row is not appended to.
        appended = jnp.where(stopped | (step + 1 >= limit), 0, 1)
        hidden, cache = forward_cached(config, params, token[:, None], appended, cache)
        return step + 1, head(config, params, hidden), cache, tokens, logprobs, counts, stopped

    _, _, _, tokens, logprobs, counts, stopped = jax.lax.while_loop(go_on, body, start)
    return tokens, logprobs, counts, stopped


def _bucket(length: int) -> int:
    return 1 << max(3, (length - 1).bit_length())


def _padded(prompts: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [batch, bucket] right-padded with 0, lengths [batch])."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), min(_bucket(int(lengths.max())), limit)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if config.head != "language-model" or config.stack == "encoder":
        raise InputError(f"a model with stack={config.stack!r} and head={config.head!r} does not generate text")
    if not prompts:
        raise InputError("there is no prompt to continue")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; give it at least one token, such as the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise InputError(f"prompt {number} has the id {wrong}, outside the vocabulary of {config.vocab_size}")
    longest = max(len(prompt) for prompt in prompts)
    if config.stack == "encoder-decoder":
        if longest > config.max_seq_len:
            raise InputError(f"a prompt of {longest} tokens does not fit the encoder, max_seq_len={config.max_seq_len}")
        longest = 1
    if longest + max_new_tokens > config.max_seq_len:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context, "
            f"max_seq_len={config.max_seq_len}"
        )
