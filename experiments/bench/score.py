"""Benchmark `infer.score` with and without shared prefixes against a plain forward pass, in interleaved rounds."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.bench.rounds import interleaved, median_and_range
from experiments.models import check_is_decoder
from infer import prepare, score
from infer.scoring.batches import padded_length
from model import ModelConfig, Params, apply
from model.errors import InputError, check_at_least_one
from model.progress import progress_bar

ScoreRequest = tuple[list[int], list[int]]
MOST_LOGITS = 2**28  # bytes of a plain pass's logits (1 GiB) above which it is not measured


def bench_score(
    config: ModelConfig,
    params: Params,
    *,
    prefixes: Sequence[int],
    continuation: int | None = None,
    continuations: int = 4,
    contexts: int = 32,
    batch_size: int = 16,
    rounds: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return one row per prefix length: seconds of each contender and the ratios of speeds, medians of rounds.

    Requests are random: `contexts` prefixes, each with a number of continuations of `continuation` tokens, by default a
    tenth of the prefix. Contenders are "shared", "unshared" and "apply": `apply` and a log-softmax, jitted, on the
    batches of "unshared". Ratios are of the same round; the first calls, which compile, are not among the samples.
    Raises InputError for a model or lengths that cannot be scored, before anything is measured.
    """
    _check(config, prefixes, continuation, continuations, contexts, batch_size, rounds)
    if config.experts is not None:  # nothing is dropped at inference
        config = config.replace(experts=config.experts.replace(dispatch="dropless"))
    params = prepare(config, params)
    rows = []
    with progress_bar("scoring", len(prefixes) * rounds) as advance:
        for prefix in prefixes:
            scored = continuation or max(1, prefix // 10)
            requests = _draw(config, prefix, scored, contexts, continuations, seed)
            row = {"prefix": prefix, "continuation": scored, "continuations": continuations, "contexts": contexts}
            rows.append(row | _measure(config, params, requests, batch_size, rounds, advance))
    return rows


def _check(config, prefixes, continuation, continuations, contexts, batch_size, rounds) -> None:
    check_is_decoder(config, "bench score")
    counts = {"continuations": continuations, "contexts": contexts, "batch_size": batch_size, "rounds": rounds}
    if continuation is not None:
        counts["continuation"] = continuation
    check_at_least_one(**counts)
    for prefix in prefixes:
        check_at_least_one(prefix=prefix)
        scored = continuation or max(1, prefix // 10)
        if prefix + scored - 1 > config.max_seq_len:
            raise InputError(
                f"a prefix of {prefix} tokens and {scored} more, the last of which is not read, do not fit "
                f"max_seq_len={config.max_seq_len}; give a shorter --prefix"
            )


def _draw(
    config: ModelConfig, prefix: int, continuation: int, contexts: int, continuations: int, seed: int
) -> list[ScoreRequest]:
    random = np.random.default_rng(seed)
    found: list[ScoreRequest] = []
    for _ in range(contexts):
        context = random.integers(0, config.vocab_size, prefix).tolist()
        ids = random.integers(0, config.vocab_size, (continuations, continuation))
        found += [(context, row.tolist()) for row in ids]
    return found


def _measure(
    config: ModelConfig,
    params: Params,
    requests: list[ScoreRequest],
    batch_size: int,
    rounds: int,
    advance: Callable[..., None],
) -> dict[str, Any]:
    """Return the measured part of a row."""
    turns: dict[str, Callable[[], np.ndarray]] = {
        name: lambda share=share: (
            score(  # type: ignore[misc]
                config, params, requests, batch_size=batch_size, share_prefixes=share
            ).logprobs
        )
        for name, share in (("shared", True), ("unshared", False))
    }
    length = padded_length(sum(map(len, requests[0])) - 1, config.max_seq_len)
    if batch_size * length * config.vocab_size <= MOST_LOGITS:
        turns["apply"] = _plain_passes(config, params, requests, batch_size, length)
    found, first_calls = {}, {}
    for name, turn in turns.items():
        first_calls[name], found[name] = _timed(turn)
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for number, name in enumerate(interleaved(list(turns), rounds), 1):
        samples[name].append(_timed(turns[name])[0])
        if number % len(turns) == 0:
            advance()

    def over(name: str, other: str) -> list[float]:
        return [theirs / own for own, theirs in zip(samples[name], samples[other], strict=True)]

    row: dict[str, Any] = {"requests": len(requests)}
    row |= {f"{name}_seconds": statistics.median(seconds) for name, seconds in samples.items()}
    row |= median_and_range("shared_over_unshared", over("shared", "unshared"))
    if "apply" in turns:
        row |= median_and_range("unshared_over_apply", over("unshared", "apply"))
    difference = max(float(np.abs(found["unshared"] - other).max()) for other in found.values())
    return row | {"largest_difference": difference, "first_call_seconds": first_calls, "samples": samples}


def _timed(turn: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = turn()
    return time.perf_counter() - start, found


def _plain_passes(
    config: ModelConfig, params: Params, requests: list[ScoreRequest], batch_size: int, length: int
) -> Callable[[], np.ndarray]:
    """Return a call that gives the log-probability of every request from logits of whole rows."""
    count = -(-len(requests) // batch_size) * batch_size
    rows = np.zeros((count, length + 1), np.int32)
    for row, (context, continuation) in zip(rows, requests, strict=False):
        row[: len(context) + len(continuation)] = [*context, *continuation]
    first = len(requests[0][0]) - 1
    targets = rows[:, first + 1 : first + 1 + len(requests[0][1])]
    batches = [slice(start, start + batch_size) for start in range(0, count, batch_size)]

    def run() -> np.ndarray:
        sent = [_logprobs(config, params, rows[batch, :-1], targets[batch], first) for batch in batches]
        return np.concatenate([np.asarray(made) for made in sent])[: len(requests)]

    return run


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logprobs(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    targets: Int[Array, "batch scored"],
    first: int,
) -> Float[Array, " batch"]:
    logprobs = jax.nn.log_softmax(apply(config, params, tokens))[:, first : first + targets.shape[1]]
    return jnp.take_along_axis(logprobs, targets[..., None], axis=-1).sum(axis=(1, 2))
