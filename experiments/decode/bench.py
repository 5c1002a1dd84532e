"""Prefill and decode throughput over a grid of batch and context."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer import decode_step, init_cache, prefill, prepare
from model import ModelConfig, Params, accounting
from model.errors import InputError
from train.progress import progress_bar


def bench_decode(
    config: ModelConfig,
    params: Params,
    *,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] = (32, 96),
    steps: int = 16,
    repeats: int = 7,
    weights: str = "float32",
) -> list[dict[str, Any]]:
    """One row per (batch, context): medians over `repeats`, with the fastest and slowest beside them.

    context: tokens in the prompt. A repeat prefills the whole prompt, then decodes `steps` tokens one after another
    (greedy, fed back on the device); compile time and the first call are apart. tokens_per_second counts all rows of
    the batch, per_sequence one row. kv_cache_bytes_filled is at the middle of the decoded stretch.
    """
    longest = max(contexts) + steps
    if longest > config.max_seq_len:
        raise InputError(
            f"context {max(contexts)} and {steps} steps exceed the model's context, max_seq_len={config.max_seq_len}"
        )
    prepared = prepare(config, params, weights)  # type: ignore[arg-type]
    rows = []
    with progress_bar("decode benchmark", len(batches) * len(contexts)) as advance:
        for batch in batches:
            for context in contexts:
                rows.append(_cell(config, prepared, batch, context, steps, repeats) | {"weights": weights})
                advance()
    return rows


def _compiled() -> int:
    """Programs of the pair that this process holds."""
    return sum(function._cache_size() for function in (prefill, decode_step))  # type: ignore[attr-defined]


def _cell(config: ModelConfig, params: Params, batch: int, context: int, steps: int, repeats: int) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, context), dtype=np.int32)
    lengths = np.full(batch, context, np.int32)
    choose = jax.jit(lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))

    def once() -> tuple[float, float]:
        cache = jax.block_until_ready(init_cache(config, batch, context + steps))
        start = time.perf_counter()
        logits, cache = prefill(config, params, tokens, lengths, cache)
        jax.block_until_ready(logits)
        middle = time.perf_counter()
        for _ in range(steps):
            logits, cache = decode_step(config, params, choose(logits), cache)
        jax.block_until_ready(logits)
        return middle - start, time.perf_counter() - middle

    start = time.perf_counter()
    once()
    first_call = time.perf_counter() - start
    before = _compiled()
    times = [once() for _ in range(repeats)]
    prefill_seconds, decode_seconds = ([time[i] for time in times] for i in (0, 1))
    rate = lambda seconds: batch * steps / seconds
    return {
        "batch": batch,
        "context": context,
        "steps": steps,
        "repeats": repeats,
        "first_call_seconds": first_call,
        "recompiles": _compiled() - before,
        "prefill_tokens_per_second": batch * context / statistics.median(prefill_seconds),
        "time_to_first_token_seconds": statistics.median(prefill_seconds),
        "decode_tokens_per_second": rate(statistics.median(decode_seconds)),
        "decode_tokens_per_second_slowest": rate(max(decode_seconds)),
        "decode_tokens_per_second_fastest": rate(min(decode_seconds)),
        "decode_tokens_per_second_per_sequence": rate(statistics.median(decode_seconds)) / batch,
        "seconds_per_step": statistics.median(decode_seconds) / steps,
        "kv_cache_bytes_filled": accounting.kv_cache_bytes(config, batch, context + steps // 2),
    }
