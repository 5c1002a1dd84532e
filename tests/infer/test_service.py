"""A service refuses, cancels and fails without waiting for the device, and loses no slot over it."""

import threading
import time
from collections import Counter

import numpy as np
import pytest

from infer import Sampling
from infer.engine import Engine
from infer.service import QueueFull, Service, ServiceStopped
from model import InputError, ModelConfig

CONFIG = ModelConfig(vocab_size=40, d_model=16, num_layers=1, num_heads=2, max_seq_len=96)
ENDLESS = Sampling(temperature=0.0, stop_ids=())
LONG = 60


class Letters:
    """A tokenizer of one letter a token; id 39 cannot be decoded."""

    def decode(self, ids):
        if 39 in ids:
            raise ValueError("no letter")
        return "".join(chr(ord("A") + token) for token in ids)


class Heard:
    """A listener that collects what it hears."""

    def __init__(self):
        self.updates, self.ended = [], threading.Event()

    def __call__(self, request, update):
        self.updates.append((request, update))
        if update.finish_reason is not None:
            self.ended.set()

    def reason(self):
        assert self.ended.wait(60)
        assert [update.finish_reason for _, update in self.updates[:-1]] == [None] * (len(self.updates) - 1)
        return self.updates[-1][1].finish_reason


@pytest.fixture(scope="module")
def make_engine(random_params):
    def make(**options):
        options = {"slots": 2, "capacity": 80, "steps": 2, "block": 16, "chunk": 16, "tokenizer": Letters()} | options
        engine = Engine(CONFIG, random_params(CONFIG), **options)
        engine.warm_up([1, 20, 40])
        return engine

    return make


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


class Gate:
    """Holds the engine's thread between two steps."""

    def __init__(self, service):
        self.open, entered = threading.Event(), threading.Event()
        service.call(lambda: (entered.set(), self.open.wait(60)))
        assert entered.wait(60)


def test_listeners_hear_all_of_a_text_and_jobs_run_between_steps(engine):
    with Service(engine) as service:
        heard = [Heard() for _ in range(5)]
        requests = [service.submit([number], ENDLESS, 20, listener) for number, listener in enumerate(heard)]
        assert service.call(lambda: threading.current_thread().name).result(60) == "engine"
        with pytest.raises(ZeroDivisionError):
            service.call(lambda: 1 / 0).result(60)
        for request, listener in zip(requests, heard, strict=True):
            assert listener.reason() == "length"
            assert [token for _, update in listener.updates for token in update.tokens] == request.tokens
            assert "".join(update.text for _, update in listener.updates) == request.text
            assert request.submitted <= request.started <= request.first_token <= request.finished
        assert service.load()[:3] == (0, 0, 0.0)
        assert service.totals().finished["length"] >= 5


@pytest.mark.parametrize("state", ["waiting", "prefill", "decode"])
def test_a_cancelled_request_is_gone_before_the_next_step(engine, state):
    with Service(engine) as service:
        others = [Heard() for _ in range(2 if state == "waiting" else 1)]
        for other in others:
            service.submit([3], ENDLESS, LONG, other)
        heard = Heard()
        request = service.submit([1] * 40, ENDLESS, 40, heard)
        while {"waiting": False, "prefill": request.started is None, "decode": not request.tokens}[state]:
            Gate(service).open.set()
        gate = Gate(service)
        assert request.finish_reason is None
        service.cancel(request)
        after = service.call(lambda: (engine.running, request.finish_reason))
        gate.open.set()
        running, reason = after.result(60)
        assert (reason, heard.reason()) == ("cancelled", "cancelled")
        assert request not in running
        for other in others:
            assert other.reason() == "length"
        assert service.load()[:2] == (0, 0)


def test_a_full_queue_refuses_at_once_while_the_engine_is_busy(engine):
    with Service(engine, most_waiting=1) as service:
        gate, heard = Gate(service), [Heard() for _ in range(engine.slots + 1)]
        for one in heard:
            service.submit([1], ENDLESS, LONG, one)
        seconds = []
        for _ in range(200):
            start = time.perf_counter()
            with pytest.raises(QueueFull) as full:
                service.submit([2], ENDLESS, LONG, heard[0])
            seconds.append(time.perf_counter() - start)
        assert np.median(seconds) < 1e-3
        assert 0 < full.value.retry_after <= 60
        with pytest.raises(InputError, match=r"4 continuations.*at most 3"):
            service.submit_many([1], [ENDLESS] * 4, 4, heard[0])
        gate.open.set()
        assert [one.reason() for one in heard] == ["length"] * 3
    with Service(engine, most_waiting=0) as service:
        for _ in range(3):  # idle slots take requests although none may wait
            requests = service.submit_many([1, 2], [ENDLESS] * 2, 4, lambda request, update: None)
            while service.load().waiting + service.load().running:
                time.sleep(0.001)
            assert [request.finish_reason for request in requests] == ["length"] * 2


def test_a_failing_listener_or_tokenizer_ends_its_own_request(engine, caplog):
    with Service(engine) as service:
        good, heard = Heard(), Heard()
        service.submit([1], ENDLESS, 30, good)

        def bad(request, update):
            raise OSError("the client is gone")

        broken = service.submit([2], ENDLESS, 30, bad)
        undecodable = service.submit([3], Sampling(temperature=0.0, logit_bias={39: 1e9}), 30, heard)
        assert (good.reason(), heard.reason()) == ("length", "error")
        assert isinstance(undecodable.error, ValueError)
        after = Heard()
        service.submit([1], ENDLESS, 3, after)
        assert after.reason() == "length"
        assert broken.finish_reason == "error"
        assert "the client is gone" in caplog.text
        assert service.load()[:2] == (0, 0)


def test_a_failing_engine_ends_all_requests_and_says_so(make_engine, monkeypatch):
    engine = make_engine()
    with Service(engine) as service:
        gate, heard = Gate(service), [Heard() for _ in range(4)]
        requests = [service.submit([1], ENDLESS, LONG, one) for one in heard]
        waiting = service.call(lambda: None)

        def out_of_memory():
            raise MemoryError("no room for 3 GB")

        monkeypatch.setattr(engine, "_launch_decode", out_of_memory)
        gate.open.set()
        assert [one.reason() for one in heard] == ["error"] * 4
        assert all(isinstance(request.error, MemoryError) for request in requests)
        waiting.exception(60)
        with pytest.raises(ServiceStopped, match=r"MemoryError: no room for 3 GB.*restart"):
            service.submit([1], ENDLESS, 3, heard[0])
        with pytest.raises(ServiceStopped):
            service.call(lambda: None)
        assert service.load()[:2] == (0, 0)
        assert service.load().failure == "MemoryError: no room for 3 GB"


def test_closing_ends_what_runs_and_what_waits(engine):
    service, heard = Service(engine).start(), [Heard() for _ in range(4)]
    for one in heard:
        service.submit([1], ENDLESS, LONG, one)
    service.close()
    assert [one.reason() for one in heard] == ["cancelled"] * 4
    assert engine.idle
    with pytest.raises(ServiceStopped, match="closed"):
        service.submit([1], ENDLESS, 3, heard[0])
    service.close()


def test_random_submits_and_cancels_from_many_threads(engine):
    """Every request ends once, its listener hears all of its output, neighbours get their text, and nothing leaks."""
    alone = engine.submit([5, 6, 7], Sampling(seed=4, stop_ids=()), 30)
    engine.run()
    before, threads = engine.totals.finished, threading.active_count()
    accepted, refused, steady, most_waiting = [], [], [], 3

    def submit(prompt, samplings, count):
        heard = Heard()
        while True:
            try:
                return [(request, heard) for request in service.submit_many(prompt, samplings, count, heard)]
            except QueueFull:
                refused.append(heard)
                time.sleep(0.002)

    def client(number):
        random = np.random.default_rng(number)
        for _ in range(50):
            prompt = random.integers(0, 39, random.choice([1, 16, 20, 40])).tolist()
            sampling = Sampling(seed=int(random.integers(9)), stop_strings=("A", "BC"), temperature=0.7)
            new = submit(prompt, [sampling] * random.integers(1, 3), 12)
            accepted.extend(new)
            time.sleep(random.exponential(0.004))
            for request, _ in new:
                if random.random() < 0.8:
                    service.cancel(request)
                    service.cancel(request)

    with Service(engine, most_waiting=most_waiting) as service:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for one in clients:
            one.start()
        while any(one.is_alive() for one in clients) or service.load().waiting + service.load().running:
            load = service.load()
            assert load.waiting + load.running <= engine.slots + most_waiting
            steady += submit(alone.prompt, [alone.sampling], 30)
            assert steady[-1][1].reason() == "length"
        assert not service._listeners
        assert engine.idle
        assert service.load()[:3] == (0, 0, 0.0)
    assert threading.active_count() == threads
    assert engine._owners == [None] * engine.slots
    prefixes = engine._prefixes
    assert sorted([*(block.row for block in prefixes._blocks.values()), *prefixes._free]) == list(range(prefixes.rows))
    assert [request.tokens for request, _ in steady] == [alone.tokens] * len(steady)
    for request, heard in accepted:
        updates = [update for one, update in heard.updates if one is request]
        assert [update.finish_reason for update in updates] == [None] * (len(updates) - 1) + [request.finish_reason]
        assert [token for update in updates for token in update.tokens] == request.tokens
        assert "".join(update.text for update in updates) == request.text
    reasons = Counter(request.finish_reason for request, _ in [*accepted, *steady])
    assert reasons == Counter(engine.totals.finished) - Counter(before)
    assert min(reasons["cancelled"], reasons["length"], reasons["stop"], len(refused), len(steady)) > 0, reasons
    assert len(accepted) > 200
    assert {len(request.tokens) == 0 for request, _ in accepted if request.finish_reason == "cancelled"} == {
        True,
        False,
    }


def test_a_client_that_answers_at_once_waits_for_no_step_more(engine, monkeypatch):
    """Beside a running request, one sent on when the last ends joins the step that it joins in a loop of one thread."""
    steps, step, tokens, rounds = [0], engine.step, 6, 4

    def slow():
        steps[0] += 1
        time.sleep(0.05)
        return step()

    neighbour = engine.submit([1], ENDLESS, LONG)
    for _ in range(rounds):
        request = engine.submit([1, 2, 3], ENDLESS, tokens)
        while request.finish_reason is None:
            steps[0] += 1
            engine.step()
    engine.cancel(neighbour)
    engine.run()
    expected, steps[0] = steps[0], 0
    monkeypatch.setattr(engine, "step", slow)
    with Service(engine) as service:
        service.submit([1], ENDLESS, LONG, Heard())
        for _ in range(rounds):
            heard = Heard()
            service.submit([1, 2, 3], ENDLESS, tokens, heard)
            assert heard.reason() == "length"
        assert steps[0] <= expected + 1
