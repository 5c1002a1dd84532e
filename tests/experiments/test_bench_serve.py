"""Load tests over HTTP: measures by hand, a server of known speed, replays, and capacities that are known."""

import asyncio
import json
import selectors
from collections import Counter

import numpy as np
import pytest

from experiments.bench.render import load_table
from experiments.bench.serve.against import sentence, take_turns, turns_table
from experiments.bench.serve.bench import bench_capacity
from experiments.bench.serve.capacity import find_capacity
from experiments.bench.serve.client import Client, EventParser, ResponseParser, Target
from experiments.bench.serve.figures import draw
from experiments.bench.serve.load import Load, closed_load, open_load
from experiments.bench.serve.measures import Limits, summarize
from experiments.bench.serve.outcome import Outcome
from experiments.bench.serve.prompts import prompts_from_file, random_ids, random_words
from experiments.bench.serve.stub import Stub, StubServer, running_stub
from experiments.commands.bench.serve import serve
from model.errors import InputError

PROMPTS = random_ids(100, 6, (3, 5), (6, 6), seed=0)


def served(due, first, ended, tokens, sent=None):
    times = tuple(np.linspace(first, ended, tokens).tolist())
    return Outcome(
        due=due,
        sent=due if sent is None else sent,
        ended=ended,
        status="served",
        chunk_times=times,
        chunk_tokens=(1,) * tokens,
        prompt_tokens=10,
        output_tokens=tokens,
        finish_reason="length",
        first=first,
    )


def test_measures_of_a_record_made_by_hand():
    """vLLM's formulas: TPOT = (end − first) / (tokens − 1); percentiles are linear; good keeps every limit."""
    outcomes = [
        served(0.0, 0.1, 0.5, 5),
        served(1.0, 1.4, 2.4, 11, sent=1.3),  # 0.3 s of its wait is that of a busy client
        served(2.0, 2.2, 2.2, 1),  # one token: no TPOT
        Outcome(due=3.0, sent=3.0, ended=3.05, status="refused"),
        Outcome(due=3.0, sent=3.0, ended=4.0, status="failed", note="HTTP 500: oops"),
    ]
    row = summarize(outcomes, Limits(ttft=0.25, tpot=0.1))
    assert row["samples"]["time_to_first_token_seconds"] == pytest.approx([0.1, 0.4, 0.2])
    assert row["time_to_first_token_seconds"] == pytest.approx(0.2)
    assert row["time_to_first_token_seconds_p90"] == pytest.approx(0.36)  # 0.2 + 0.8 · 0.2
    assert row["time_to_first_token_from_sending_seconds"] == pytest.approx(0.1)
    assert row["samples"]["time_per_output_token_seconds"] == pytest.approx([0.1, 0.1])
    assert row["samples"]["end_to_end_seconds"] == pytest.approx([0.5, 1.4, 0.2])
    assert row["samples"]["inter_chunk_latency_seconds"] == pytest.approx([0.1] * 14)
    assert row["seconds"] == 4.0
    assert row["tokens_per_second"] == pytest.approx(17 / 4)
    assert row["total_tokens_per_second"] == pytest.approx(47 / 4)
    assert (row["served"], row["refused"], row["failed"], row["good"]) == (3, 1, 1, 2)
    assert row["goodput_share"] == pytest.approx(2 / 5)
    assert row["goodput_requests_per_second"] == pytest.approx(2 / 4)
    assert row["refusal_seconds"] == pytest.approx(0.05)
    assert row["notes"] == ["HTTP 500: oops"]


def test_limits_are_read_in_milliseconds_or_seconds():
    assert Limits.parse(["ttft:500", "tpot:12.5ms", "e2e:10s"]) == Limits(0.5, 0.0125, 10.0)
    for wrong, message in (("ttft=5", "of the form"), ("foo:5", "limit"), ("ttft:0", "ttft")):
        with pytest.raises(InputError, match=message):
            Limits.parse([wrong])
    with pytest.raises(InputError, match="twice"):
        Limits.parse(["ttft:5", "ttft:6"])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_pieces_of_any_size_are_one_response(size):
    events = b'data: {"a": 1}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (events[:9], events[9:])) + b"0\r\n\r\n"
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(events) + events
    for message in (head + chunks, plain):
        response, parser, found = ResponseParser(), EventParser(), []
        for start in range(0, len(message), size):
            found += parser.feed(response.feed(message[start : start + size]))
        assert found == ['{"a": 1}', "[DONE]"]
        assert response.complete
        assert response.keeps_alive


class MadeUpTime(selectors.DefaultSelector):
    """Lets a loop whose sockets are all silent sleep in no time: a busy machine delays nothing that is measured."""

    now = 0.0

    def select(self, timeout=None):
        events = super().select(timeout if timeout is None else min(timeout, 0.002))
        if not events and timeout:
            self.now += timeout
        return events


def loop_of_made_up_time():
    selector = MadeUpTime()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    return loop


def sent(stub, load, **target):
    """Send a load to a stub; both live in one loop."""

    async def both():
        server = StubServer(stub)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        client = Client(Target(url, "stub", **target), clock=asyncio.get_running_loop().time)
        entries = [request.to_dict() for request in load.requests]
        outcomes = await client.run(entries, load.streams, Counter())
        listening.close()
        return outcomes, server

    with asyncio.Runner(loop_factory=loop_of_made_up_time) as runner:
        return runner.run(both())


@pytest.mark.long
def test_a_server_of_known_speed_is_measured_right_from_a_process(tmp_path):
    with running_stub(Stub(ttft=0.3, itl=0.03)) as (url, _):
        serve(url, concurrency=(4,), requests=24, json=tmp_path / "out.json")
    row = json.loads((tmp_path / "out.json").read_text())["load"][0]
    assert row["time_to_first_token_seconds"] == pytest.approx(0.3, rel=0.05)
    assert row["time_per_output_token_seconds"] == pytest.approx(0.03, rel=0.05)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_server_of_known_speed_is_measured_right(endpoint):
    """The chat's first chunk, with the role alone, comes at once and is no token."""
    prompts = random_words(6, (3, 5), (6, 6), seed=0) if endpoint == "chat" else PROMPTS
    outcomes, server = sent(Stub(ttft=0.3, itl=0.03), closed_load(3, prompts), endpoint=endpoint)
    row = summarize(outcomes, Limits(ttft=0.35, tpot=0.04), streams=3)
    assert server.most_running == 3
    assert row["time_to_first_token_seconds"] == pytest.approx(0.3, rel=1e-3)
    assert row["time_per_output_token_seconds"] == pytest.approx(0.03, rel=1e-3)
    assert row["inter_chunk_latency_seconds"] == pytest.approx(0.03, rel=1e-3)
    assert row["end_to_end_seconds"] == pytest.approx(0.45, rel=1e-3)
    assert (row["served"], row["output_tokens"], row["notes"]) == (6, 36, [])


def test_chunks_of_several_tokens_are_shared_out():
    (outcome,), _ = sent(Stub(ttft=0.02, itl=0.02, tokens_per_chunk=5), closed_load(1, [((1, 2), 11)]))
    assert outcome.output_tokens == 11
    assert len(outcome.chunk_times) == 3
    assert outcome.seconds_per_output_token == pytest.approx(0.02)


def test_refusals_failures_and_broken_streams_are_told_apart():
    load = open_load(float("inf"), PROMPTS)
    outcomes, _ = sent(Stub(ttft=0.1, slots=2), load)
    assert Counter(outcome.status for outcome in outcomes) == {"served": 2, "refused": 4}
    outcomes, _ = sent(Stub(ttft=0.01, fail_every=3), closed_load(1, PROMPTS))
    assert [outcome.status for outcome in outcomes] == ["served", "served", "failed"] * 2
    assert "before it was finished" in outcomes[2].note
    outcomes, _ = sent(Stub(api_key="right"), closed_load(1, PROMPTS[:1]), api_key="wrong")
    assert outcomes[0].note == "HTTP 401: wrong API key"
    outcomes, _ = sent(Stub(ttft=5.0), closed_load(1, PROMPTS[:1]), timeout=0.1)
    assert outcomes[0].note == "no end within 0.1 s"


def test_a_recorded_load_is_replayed_as_it_was(tmp_path, capsys):
    """The same arrivals, prompts, lengths and seeds: the record of the replay is the record."""
    first, second, plot = tmp_path / "first.jsonl", tmp_path / "second.jsonl", tmp_path / "plot.svg"
    with running_stub(Stub(ttft=0.01, itl=0.001)) as (url, server):
        of_first = {"rate": (200.0,), "requests": 8, "output": (2, 6), "prompt": (3, 9), "record": first, "seed": 5}
        serve(url, **of_first, burstiness=0.5, json=tmp_path / "first.json", plot=plot)
        serve(url, replay=first, record=second, json=tmp_path / "second.json")
        assert server.seen == 18  # and a first one each
    assert first.read_bytes() == second.read_bytes()
    assert Load.read(first) == open_load(200.0, random_ids(1000, 8, (3, 9), (2, 6), 5), 5, burstiness=0.5)
    rows = [json.loads((tmp_path / name).read_text())["load"][0] for name in ("first.json", "second.json")]
    for name in ("requests", "served", "prompt_tokens", "output_tokens"):
        assert rows[0][name] == rows[1][name]
    assert "200/s" in capsys.readouterr().out
    assert plot.read_text().startswith("<svg")


def test_a_load_that_cannot_be_sent_is_one_clear_sentence(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "max_tokens": 0, "at": 0}\n')
    for calls, message in (
        ({"replay": bad}, "bad.jsonl, line 1: max_tokens"),
        ({"capacity": True, "replay": bad}, "measurements of their own"),
        ({"limits": ("ttft",)}, "of the form"),
        ({"prompt": (1, 2, 3)}, "one length or two"),
    ):
        with pytest.raises(InputError, match=message):
            serve("http://127.0.0.1:9", **calls)
    with pytest.raises(InputError, match="no server answers"):
        serve("http://127.0.0.1:9")
    with pytest.raises(InputError, match="neither a URL"):
        serve(str(tmp_path / "nothing"))
    with running_stub(Stub(fail_every=1)) as (url, _), pytest.raises(InputError, match="did not serve a first request"):
        serve(url)
    with running_stub(Stub(ttft=0.01)) as (url, _), pytest.raises(InputError, match="give --limits"):
        serve(url, capacity=True)


def test_prompts_come_from_chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    chats = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "first"}]},
        {"conversations": [{"from": "human", "value": "second"}]},
        {"prompt": [1, 2], "max_tokens": 3},
    ]
    file.write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    assert Counter(prompts_from_file(file, 6, (9, 9), 0)) == {("first", 9): 2, ("second", 9): 2, ((1, 2), 3): 2}


def test_prompts_share_a_prefix():
    prompts = [prompt for prompt, _ in random_ids(1000, 5, (8, 12), (1, 1), 0, prefix=6)]
    assert len({prompt[:6] for prompt in prompts}) == 1
    assert len({prompt[6:] for prompt in prompts}) == 5


def queue(rate, seconds_per_request, requests, seed):
    """Waiting times, service included, of a queue with one server, exponential gaps and services (M/M/1)."""
    random = np.random.default_rng([seed, 9])
    arrivals = random.exponential(1 / rate, requests).cumsum()
    work = random.exponential(seconds_per_request, requests)
    backlog = work.cumsum() - arrivals
    before = np.concatenate([[0.0], work.cumsum()[:-1]]) - arrivals  # of the work that came before
    return backlog - np.minimum.accumulate(before)


@pytest.mark.parametrize("share", [pytest.param(0.8, marks=pytest.mark.long), 0.95])
def test_the_capacity_of_a_queue_is_found_and_its_interval_holds_the_truth(share):
    """P(wait > t) = exp(−(μ − λ) t) in equilibrium, so that λ = μ + ln(1 − share) / t; neighbours wait together."""
    mu, limit = 50.0, 0.2
    truth = mu + np.log(1 - share) / limit
    found = [
        find_capacity(lambda rate, s: (queue(rate, 1 / mu, 1500, s) <= limit).tolist(), 20.0, share=share, seed=100 * k)
        for k in range(16)
    ]
    covered = sum(one.low <= truth <= one.high for one in found)
    assert covered >= 13  # of 16, by 90 % intervals, with fixed seeds
    assert np.median([one.rate for one in found]) == pytest.approx(truth, rel=0.05)
    assert np.median([one.high / one.low for one in found]) < 1.5


def test_capacities_that_are_none_say_so():
    with pytest.raises(InputError, match="never holds"):
        find_capacity(lambda rate, seed: [False] * 50, 1.0)
    with pytest.raises(InputError, match="no rate is too high"):
        find_capacity(lambda rate, seed: [True] * 50, 1.0)


def known(seconds):
    """A server that serves one request at a time, in time that is made up."""

    def send(load):
        free, outcomes = 0.0, []
        for request in load.requests:
            due = request.at if load.streams is None else free
            first = max(free, due) + seconds / 2
            free = first + seconds / 2
            outcomes.append(served(due, first, free, request.max_tokens))
        return outcomes

    return send


def test_the_capacity_of_a_server_lies_below_what_it_can_serve_at_most(tmp_path):
    def prompts(count, seed):
        return random_ids(50, count, (2, 2), (5, 5), seed)

    capacity, rows = bench_capacity(known(0.1), prompts, Limits(ttft=1.0), share=0.9, requests=100, streams=4)
    assert 7 < capacity.low < capacity.rate < capacity.high < 12  # requests per second: at most ten
    assert capacity.standard_error < 1
    assert [row["rate_requests_per_second"] for row in rows] == sorted(row.rate for row in capacity.rates)
    lines = load_table(rows)[1]
    assert len(lines) == len(rows)
    document = {"load": rows, "capacity": capacity.to_dict()}
    assert len(draw(document).axes) == 2
    json.dumps(document["capacity"])


def test_contenders_take_turns_and_the_cost_of_http_is_a_ratio_of_the_same_round():
    def prompts(count, seed):
        return random_ids(50, count, (2, 2), (5, 5), seed)

    contenders = {"isoflop": known(0.1), "bare engine": known(0.095), "llama-server": known(0.2)}
    rows = take_turns(contenders, prompts, streams=(1, 8), requests=6, rounds=3)
    assert [(row["contender"], row["streams"]) for row in rows] == [(n, s) for s in (1, 8) for n in contenders]
    assert rows[1]["isoflop_over_this"] == pytest.approx(0.95)
    assert rows[2]["isoflop_over_this"] == pytest.approx(2.0)
    assert "HTTP costs 5.0%" in sentence(rows)
    assert "2.00 times the tokens per second of llama-server" in sentence(rows)
    assert len(turns_table(rows)[1]) == 6

    def failing(load):
        return [Outcome(0, 0, 1, "failed", note="why") for _ in load.requests]

    with pytest.raises(InputError, match="did not serve 6 requests of 6: why"):
        take_turns({"isoflop": failing}, prompts, streams=(1,), requests=6, rounds=1)
