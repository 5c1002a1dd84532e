"""A client that leaves frees its slots within a step: in the queue, in the prefill, in decode, streamed or not."""

import asyncio
import contextlib
import json
import threading
import time

import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def call(app, path, body, left, seen):
    """Call the application as a server does; `left` is set when the client leaves, `seen` when it got a first text."""
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive():
        with contextlib.suppress(StopIteration):
            return next(messages)
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if b'"content":"' in message.get("body", b"").replace(b'"content":""', b""):
            seen.set()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


LONG = {"max_tokens": 72, "ignore_eos": True, "n": 2}
BODIES = {
    CHAT: LONG | {"messages": [{"role": "user", "content": "a"}]},
    COMPLETIONS: LONG | {"prompt": ["the", "a time"]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_leaves_in_the_queue(app, served, paused, idle, path, stream):
    async def scenario():
        left, seen = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(call(app, path, BODIES[path] | {"stream": stream}, left, seen))
        await until(lambda: served.service.load().waiting)
        left.set()
        await asyncio.wait_for(task, 30)
        assert len(asyncio.all_tasks()) == 1, "nothing is left in the loop"

    before = served.service.totals().generated_tokens
    with paused():
        asyncio.run(scenario())
    idle()
    assert served.service.totals().generated_tokens == before, "no token was computed for a client that had left"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_leaves_in_decode(app, served, idle, monkeypatch, path, stream):
    engine = served.service.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.03) or step())

    async def scenario():
        left, seen = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(call(app, path, BODIES[path] | {"stream": stream}, left, seen))
        await until(lambda: served.service.load().running)
        left.set()
        await asyncio.wait_for(task, 30)
        assert len(asyncio.all_tasks()) == 1, "nothing is left in the loop"

    before = served.service.totals().generated_tokens
    asyncio.run(scenario())
    idle()
    assert served.service.totals().generated_tokens - before < 2 * 72


def test_clients_that_leave_at_random_leak_nothing(app, served, idle):
    import numpy as np

    random = np.random.default_rng(0)

    async def one():
        left, seen = asyncio.Event(), asyncio.Event()
        path = [CHAT, COMPLETIONS][random.integers(2)]
        body = BODIES[path] | {"stream": bool(random.integers(2)), "n": int(random.integers(1, 3))}
        task = asyncio.create_task(call(app, path, body, left, seen))
        await asyncio.sleep(float(random.exponential(0.02)))
        left.set()
        await asyncio.wait_for(task, 30)

    async def scenario():
        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(4)))
        assert len(asyncio.all_tasks()) == 1

    threads = threading.active_count()
    asyncio.run(scenario())
    idle()
    assert not served.service._listeners
    assert threading.active_count() <= threads + 1
