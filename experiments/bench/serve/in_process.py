"""Drive the engine in this process with a load, without HTTP."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.bench.serve.load import Load, LoadRequest, open_load
from experiments.bench.serve.measures import Limits, summarize
from experiments.bench.serve.outcome import Outcome
from experiments.bench.serve.prompts import around, random_ids
from infer import Engine, Request, Sampling
from model.errors import InputError

Clock = Callable[[], float]
Sleep = Callable[[float], None]

_ALL_TOKENS = Sampling(temperature=0.0, stop_ids=())
"""Greedy; a request always has all its tokens."""


def drive(
    engine: Engine,
    load: Load,
    *,
    sampling: Sampling = _ALL_TOKENS,
    clock: Clock = time.perf_counter,
    sleep: Sleep = time.sleep,
) -> list[Outcome]:
    """Submit each request when it arrives, or in a closed loop when a stream is free, and step until all are done.

    A request arrived when it was due, not when a busy engine accepted it: the wait for the current step is part of the
    latency (leaving it out would be coordinated omission).
    """
    start = clock()
    waiting = list(reversed(load.requests))
    submitted: list[tuple[float, Request]] = []
    running: list[Request] = []

    def is_due() -> bool:
        if not waiting:
            return False
        if load.streams is not None:
            return len(running) < load.streams
        return start + (waiting[-1].at or 0.0) <= clock()

    while waiting or running:
        while is_due():
            entry = waiting.pop()
            request = engine.submit(_ids(entry), sampling, entry.max_tokens)
            arrived = request.submitted if load.streams is not None else start + (entry.at or 0.0)
            submitted.append((arrived, request))
            running.append(request)
        if running:
            engine.step()
            running = [request for request in running if request.finished is None]
        elif waiting:
            sleep(max(start + (waiting[-1].at or 0.0) - clock(), 0.0))
    return [outcome_of(request, due) for due, request in submitted]


def _ids(entry: LoadRequest) -> Sequence[int]:
    if isinstance(entry.prompt, str):
        raise InputError("the engine takes prompts of token ids; a text of a load needs a server")
    return entry.prompt


def outcome_of(request: Request, due: float) -> Outcome:
    """Return what became of a finished request of the engine.

    Tokens that came at one time are a chunk: the engine returns the tokens of a step together.
    """
    assert request.finished is not None, "the request is not finished"
    times, counts = np.unique(np.asarray(request.token_times, np.float64), return_counts=True)
    return Outcome(
        due=due,
        sent=request.submitted,
        ended=request.finished,
        status="served",
        chunk_times=tuple(times.tolist()),
        chunk_tokens=tuple(counts.tolist()),
        prompt_tokens=len(request.prompt),
        output_tokens=len(request.tokens),
        finish_reason=request.finish_reason,
        first=request.first_token,
    )


def bench_load(
    make_engine: Callable[[], Engine],
    vocab_size: int,
    rates: Sequence[float],
    *,
    requests: int,
    prompt: int,
    max_new_tokens: int,
    seed: int = 0,
    limits: Limits = Limits(),
    burstiness: float = 1.0,
    prefix: int = 0,
    clock: Clock = time.perf_counter,
    sleep: Sleep = time.sleep,
) -> list[dict[str, Any]]:
    """Return one row per rate (`summarize`), each on a fresh engine that is warm; a failure is the row's "error".

    Prompts are random, of half to one and a half times `prompt` tokens; the seed determines them and the arrivals.
    """
    rows = []
    lengths = around(prompt)
    prompts = random_ids(
        vocab_size, requests, (max(lengths[0], prefix), lengths[1]), (max_new_tokens,) * 2, seed, prefix=prefix
    )
    for rate in rates:
        place = {"rate_requests_per_second": rate}
        load = open_load(rate, prompts, seed, burstiness=burstiness)
        try:
            outcomes = drive(warm(make_engine(), load), load, clock=clock, sleep=sleep)
            rows.append(summarize(outcomes, limits, **place))
        except Exception as error:  # one rate may run out of memory: the others are still measured
            rows.append(place | {"error": f"{type(error).__name__}: {error}"})
    return rows


def warm(engine: Engine, load: Load) -> Engine:
    """Compile all programs that a load needs, and return the engine."""
    engine.warm_up([len(_ids(request)) for request in load.requests])
    return engine
