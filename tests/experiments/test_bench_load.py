"""The engine under load: arrivals, waiting times and goodput, with an engine and a clock that are made up."""

import dataclasses

import numpy as np
import pytest

import infer
from experiments.bench.render import load_table
from experiments.bench.serve.arrivals import arrivals
from experiments.bench.serve.in_process import bench_load, drive
from experiments.bench.serve.load import Load, LoadRequest
from experiments.bench.serve.measures import Limits, summarize
from model import ModelConfig
from model.errors import InputError


class Clock:
    """Time that passes when somebody sleeps or works."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclasses.dataclass
class Request:
    wanted: int
    submitted: float
    prompt: tuple[int, ...] = (1,)
    finish_reason: str | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    token_times: list[float] = dataclasses.field(default_factory=list)
    first_token: float | None = None
    finished: float | None = None


class Engine:
    """Every step takes a second and gives each of the first `slots` unfinished requests a token."""

    def __init__(self, clock: Clock, slots: int = 1):
        self.clock, self.slots, self.requests = clock, slots, []

    def submit(self, prompt, sampling, max_new_tokens) -> Request:
        self.requests.append(Request(max_new_tokens, self.clock()))
        return self.requests[-1]

    def warm_up(self, prompt_lengths) -> None:
        assert min(prompt_lengths) > 0

    def step(self) -> None:
        self.clock.sleep(1.0)
        for request in [one for one in self.requests if one.finished is None][: self.slots]:
            request.tokens.append(7)
            request.token_times.append(self.clock())
            request.first_token = request.first_token or self.clock()
            if len(request.tokens) == request.wanted:
                request.finished = self.clock()


def load(at, max_tokens, prompt=(1,), streams=None) -> Load:
    return Load(tuple(LoadRequest(prompt, max_tokens, time) for time in at), streams)


def test_arrivals_are_a_poisson_process_of_the_rate_and_the_seed_decides_them():
    times = arrivals(4.0, 20_000, seed=3)
    gaps = np.diff([0.0, *times])
    assert times == arrivals(4.0, 20_000, seed=3) != arrivals(4.0, 20_000, seed=4)
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03)
    assert np.mean(gaps > 0.5) == pytest.approx(np.exp(-2), rel=0.05)
    for rate, requests in ((0.0, 1), (1.0, 0)):
        with pytest.raises(InputError, match="must be a"):
            arrivals(rate, requests, 0)


def test_waiting_counts_from_the_arrival_and_not_from_when_a_busy_engine_took_the_request():
    """Two requests of two tokens, one slot: the second is due in the middle of the first one's first step."""
    clock = Clock()
    engine = Engine(clock)
    run = drive(engine, load([0.0, 0.5], 2), clock=clock, sleep=clock.sleep)
    assert [outcome.sent for outcome in run] == [100.0, 101.0]
    row = summarize(run, Limits(2.0, 1.5), rate_requests_per_second=2.0)
    assert row["samples"]["time_to_first_token_seconds"] == [1.0, 2.5]
    assert row["samples"]["end_to_end_seconds"] == [2.0, 3.5]
    assert row["samples"]["inter_token_latency_seconds"] == [1.0, 1.0]
    assert row["time_to_first_token_seconds"] == pytest.approx(1.75)
    assert row["time_to_first_token_seconds_p99"] == pytest.approx(np.percentile([1.0, 2.5], 99))
    assert row["requests_per_second"] == pytest.approx(2 / 4)
    assert row["tokens_per_second"] == pytest.approx(4 / 4)
    assert row["goodput_share"] == 0.5  # the second waited for 2.5 s
    assert row["goodput_requests_per_second"] == pytest.approx(1 / 4)


def test_an_idle_engine_is_not_stepped():
    clock = Clock()
    run = drive(Engine(clock), load([0.0, 50.0], 1), clock=clock, sleep=clock.sleep)
    assert [outcome.ended for outcome in run] == [101.0, 151.0]


def test_a_higher_rate_waits_longer_and_a_failing_rate_is_a_row():
    clock, made = Clock(), []

    def engine():
        made.append(None)
        if len(made) == 3:
            raise MemoryError("no room")
        return Engine(clock, slots=2)

    rows = bench_load(
        engine, 32, (0.1, 4.0, 9.0), requests=20, prompt=6, max_new_tokens=3, clock=clock, sleep=clock.sleep
    )
    assert rows[0]["time_to_first_token_seconds_p90"] < rows[1]["time_to_first_token_seconds_p90"]
    assert rows[1]["requests_per_second"] == pytest.approx(2 / 3, rel=0.1)  # two slots, three seconds each
    assert rows[0]["goodput_share"] == rows[1]["goodput_share"] == 1
    assert rows[2] == {"rate_requests_per_second": 9.0, "error": "MemoryError: no room"}


class BurstEngine(Engine):
    """Every step takes two seconds and gives the first unfinished request up to four tokens at once."""

    def step(self) -> None:
        self.clock.sleep(2.0)
        request = next(one for one in self.requests if one.finished is None)
        count = 1 if not request.tokens else min(4, request.wanted - len(request.tokens))
        request.tokens += [7] * count
        request.token_times += [self.clock()] * count
        request.first_token = request.first_token or self.clock()
        if len(request.tokens) == request.wanted:
            request.finished = self.clock()


def test_tokens_that_come_together_are_a_chunk_and_no_latency_is_zero():
    """Seven tokens as 1 + 4 + 2 in six seconds: gaps of two seconds, half a second a token and then a whole one."""
    clock = Clock()
    run = drive(BurstEngine(clock), load([0.0], 7), clock=clock, sleep=clock.sleep)
    row = summarize(run)
    assert row["samples"]["inter_chunk_latency_seconds"] == [2.0, 2.0]
    assert row["samples"]["inter_token_latency_seconds"] == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0]
    assert row["samples"]["time_per_output_token_seconds"] == [pytest.approx(4 / 6)]
    assert sum(row["samples"]["inter_token_latency_seconds"]) == pytest.approx(4.0), "from the first token to the last"
    assert row["tokens_per_chunk"] == 3.0
    assert row["inter_token_latency_seconds"] == 0.5


def test_requests_of_one_token_have_no_time_per_further_token():
    clock = Clock()
    run = drive(Engine(clock), load([0.0, 50.0], 1), clock=clock, sleep=clock.sleep)
    row = summarize(run, Limits(tpot=0.5), rate_requests_per_second=1.0)
    assert row["inter_token_latency_seconds"] is None
    assert row["time_per_output_token_seconds"] is None
    assert row["tokens_per_chunk"] is None
    assert row["goodput_share"] == 1
    assert load_table([row])[1][0][-4:-1] == ["", "", ""]


def test_the_engine_itself_has_latencies_above_zero(random_params):
    """As a client sees it: 17 tokens of a request come as 1 + 8 + 8."""
    config = ModelConfig(vocab_size=32, d_model=8, num_layers=1, num_heads=2, d_ff=16, max_seq_len=64)
    engine = infer.Engine(config.replace(eos_token_ids=()), random_params(config), slots=2, capacity=32)
    engine.warm_up([4])
    row = summarize(drive(engine, load([0.0, 0.0], 17, (1, 2, 3))))
    assert row["tokens_per_chunk"] == 8
    assert len(row["samples"]["inter_chunk_latency_seconds"]) == 4
    assert len(row["samples"]["inter_token_latency_seconds"]) == 32
    assert min(row["samples"]["inter_token_latency_seconds"]) > 0
