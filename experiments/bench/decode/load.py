"""Measure the engine under load: requests arrive at random at a given rate, and their latencies are recorded."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from infer import GREEDY, Engine, Request
from model.errors import check_at_least_one, check_number


def arrivals(rate: float, requests: int, seed: int) -> list[float]:
    """Return arrival times in seconds of a Poisson process that starts at 0.

    Equal seeds give equal times.
    """
    check_number("rate", rate, above=0)
    check_at_least_one(requests=requests)
    return np.random.default_rng(seed).exponential(1 / rate, requests).cumsum().tolist()


class LoadRun(NamedTuple):
    """The requests that an engine served, and on the clock, when each was due."""

    arrived: list[float]
    requests: list[Request]


def drive(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    at: Sequence[float],
    *,
    max_new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> LoadRun:
    """Submit each prompt at its arrival time and step the engine until all are done.

    A request arrived when it was due, not when a busy engine accepted it: the wait for the current step is part of the
    latency (leaving it out would be coordinated omission).
    """
    start = clock()
    due = [start + seconds for seconds in at]
    requests: list[Request] = []
    while len(requests) < len(due) or any(request.finished is None for request in requests):
        while len(requests) < len(due) and due[len(requests)] <= clock():
            requests.append(engine.submit(prompts[len(requests)], GREEDY, max_new_tokens))
        if any(request.finished is None for request in requests):
            engine.step()
        elif len(requests) < len(due):
            sleep(max(due[len(requests)] - clock(), 0.0))
    return LoadRun(due, requests)


def summarize(
    run: LoadRun, *, rate: float, ttft_limit: float | None = None, tpot_limit: float | None = None
) -> dict[str, Any]:
    """Return one row: median, p90 and p99 of every latency in seconds, throughput, and goodput under the limits.

    time_to_first_token and end_to_end count from a request's arrival. The engine returns the tokens of a step together,
    as a chunk: inter_chunk_latency is the gap between two chunks of a request, which is what a client of a stream sees;
    inter_token_latency has a value for every token after the first chunk, its chunk's gap over the chunk's tokens.
    time_per_output_token is a request's time from its first token to its last, over the tokens after the first; a
    request of one token has none. Without a value a latency is None. Throughput is over the time from the first arrival
    to the last token. goodput_requests_per_second counts the requests that keep both limits (None: any).
    """
    arrived, requests = run
    first = [_known(request.first_token) - due for request, due in zip(requests, arrived, strict=True)]
    whole = [_known(request.finished) - due for request, due in zip(requests, arrived, strict=True)]
    received = [chunks(request.token_times) for request in requests]
    gaps, counts = (np.concatenate(values) for values in zip(*received, strict=True))
    each = [_per_output_token(request.token_times) for request in requests]
    latencies = {
        "time_to_first_token_seconds": first,
        "inter_chunk_latency_seconds": gaps.tolist(),
        "inter_token_latency_seconds": np.repeat(gaps / counts, counts).tolist(),
        "time_per_output_token_seconds": [seconds for seconds in each if seconds is not None],
        "end_to_end_seconds": whole,
    }
    seconds = max(max(_known(request.finished) for request in requests) - min(arrived), 1e-9)
    good = sum(
        (ttft_limit is None or wait <= ttft_limit) and (tpot_limit is None or gap is None or gap <= tpot_limit)
        for wait, gap in zip(first, each, strict=True)
    )
    row: dict[str, Any] = {"rate_requests_per_second": rate, "requests": len(requests)}
    for name, values in latencies.items():
        for suffix, percent in (("", 50), ("_p90", 90), ("_p99", 99)):
            row[name + suffix] = float(np.percentile(values, percent)) if values else None
    return row | {
        "tokens_per_chunk": float(counts.mean()) if counts.size else None,
        "requests_per_second": len(requests) / seconds,
        "tokens_per_second": sum(len(request.tokens) for request in requests) / seconds,
        "goodput_requests_per_second": good / seconds,
        "goodput_share": good / len(requests),
        "ttft_limit_seconds": ttft_limit,
        "tpot_limit_seconds": tpot_limit,
        "samples": latencies,
    }


def _known(seconds: float | None) -> float:
    assert seconds is not None, "a request is not finished"
    return seconds


def chunks(token_times: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return (the gap before each chunk after the first, its tokens); tokens that came at one time are a chunk.

    chunks([1, 1, 3, 3, 3]) is ([2.0], [3]): three tokens came together, two seconds after the ones before.
    """
    times, counts = np.unique(np.asarray(token_times, np.float64), return_counts=True)
    return np.diff(times), counts[1:]


def _per_output_token(token_times: Sequence[float]) -> float | None:
    """Return seconds from the first token to the last, over the tokens after the first; None of one token or none."""
    return (token_times[-1] - token_times[0]) / (len(token_times) - 1) if len(token_times) > 1 else None


def bench_load(
    make_engine: Callable[[], Engine],
    vocab_size: int,
    rates: Sequence[float],
    *,
    requests: int,
    prompt: int,
    max_new_tokens: int,
    seed: int = 0,
    ttft_limit: float | None = None,
    tpot_limit: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """Return one row per rate, each on a fresh engine that is warm; a failure is the row's "error".

    Prompts are random, of half to one and a half times `prompt` tokens; the seed determines them and the arrivals.
    """
    rows = []
    for rate in rates:
        at = arrivals(rate, requests, seed)
        random = np.random.default_rng([seed, 1])
        lengths = random.integers(max(1, prompt // 2), max(2, prompt + prompt // 2 + 1), requests)
        prompts = [random.integers(0, vocab_size, length).tolist() for length in lengths]
        try:
            engine = make_engine()
            engine.warm_up(lengths.tolist())
            run = drive(engine, prompts, at, max_new_tokens=max_new_tokens, clock=clock, sleep=sleep)
            rows.append(summarize(run, rate=rate, ttft_limit=ttft_limit, tpot_limit=tpot_limit))
        except Exception as error:  # one rate may run out of memory: the others are still measured
            rows.append({"rate_requests_per_second": rate, "error": f"{type(error).__name__}: {error}"})
    return rows
