"""A server of known speed, to calibrate clients of load tests: a fixed time to the first token and between tokens.

`python -m experiments.bench.serve.stub --port 8123 --ttft 0.05 --itl 0.01` speaks the streaming part of OpenAI's API.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

TOKEN = " word"


@dataclass(frozen=True)
class Stub:
    """The speed and the size of the stub. Times in seconds; slots: requests at a time, beyond which it answers 429."""

    ttft: float = 0.05
    itl: float = 0.01
    slots: int = 1_000_000
    model: str = "stub"
    api_key: str | None = None
    tokens_per_chunk: int = 1
    fail_every: int = 0
    """Every k-th request breaks off after its first token; 0: none."""


class StubServer:
    """The stub's connections."""

    def __init__(self, stub: Stub):
        self.stub = stub
        self.running = self.seen = self.most_running = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._answer(first.split(" ")[1], headers, body, writer):
                    break
        writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> bool:
        stub = self.stub
        if stub.api_key is not None and headers.get("authorization") != f"Bearer {stub.api_key}":
            return await _send(writer, 401, {"error": {"message": "wrong API key", "type": "authentication_error"}})
        if path == "/health":
            return await _send(writer, 200, {"status": "ok"})
        if path == "/v1/models":
            entry = {"id": stub.model, "object": "model", "meta": {"n_vocab": 1000}}
            return await _send(writer, 200, {"object": "list", "data": [entry]})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return await _send(writer, 404, {"error": {"message": f"no {path}", "type": "not_found_error"}})
        if self.running >= stub.slots:
            return await _send(writer, 429, {"error": {"message": "full", "type": "overloaded"}}, "Retry-After: 1\r\n")
        self.running += 1
        self.seen += 1
        self.most_running = max(self.running, self.most_running)
        try:
            return await self._stream(path, json.loads(body), writer, self.seen)
        finally:
            self.running -= 1

    async def _stream(self, path: str, asked: dict[str, Any], writer: asyncio.StreamWriter, number: int) -> bool:
        stub, is_chat = self.stub, "chat" in path
        loop = asyncio.get_running_loop()
        due = loop.time()
        about: dict[str, Any] = {
            "id": f"stub-{number}",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
        }
        about |= {"created": 0, "model": stub.model}
        stream = bool(asked.get("stream"))
        tokens = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        prompt = asked.get("prompt", "")
        read = len(prompt) if isinstance(prompt, list) else len(str(prompt or asked.get("messages")).split())
        usage = {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}
        if not stream:
            await asyncio.sleep(stub.ttft + stub.itl * (tokens - 1))
            text = TOKEN * tokens
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
            choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            return await _send(writer, 200, {**about, "choices": [choice], "usage": usage})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

        async def say(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            event = f"data: {text}\n\n".encode()
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            await writer.drain()

        def piece(text: str, reason: str | None) -> dict[str, Any]:
            content = {"delta": {"content": text} if text else {}} if is_chat else {"text": text}
            return {**about, "choices": [{"index": 0, "finish_reason": reason, **content}]}

        if is_chat:
            await say({**about, "choices": [{"index": 0, "finish_reason": None, "delta": {"role": "assistant"}}]})
        due += stub.ttft
        left = tokens
        while left:
            await asyncio.sleep(max(0.0, due - loop.time()))
            count = min(left, 1 if left == tokens else stub.tokens_per_chunk)
            left -= count
            await say(piece(TOKEN * count, None if left or is_chat else "length"))
            due += stub.itl * min(left, stub.tokens_per_chunk)
            if stub.fail_every and number % stub.fail_every == 0:
                return False
        if is_chat:
            await say(piece("", "length"))
        if (asked.get("stream_options") or {}).get("include_usage"):
            await say({**about, "choices": [], "usage": usage})
        await say("[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def _send(writer: asyncio.StreamWriter, status: int, content: dict[str, Any], header: str = "") -> bool:
    body = json.dumps(content).encode()
    words = {200: "OK", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}[status]
    head = f"HTTP/1.1 {status} {words}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{header}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return True


@contextlib.contextmanager
def running_stub(stub: Stub) -> Iterator[tuple[str, StubServer]]:
    """Run a stub in a thread on a free port of this machine, and give its URL."""
    server, ready = StubServer(stub), threading.Event()
    places: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def until_stopped() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        places.append(listening.sockets[0].getsockname()[1])
        loops.append(asyncio.get_running_loop())
        ready.set()
        await stop.wait()
        listening.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=asyncio.run, args=(until_stopped(),), name="stub", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{places[0]}", server
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


def main(stub: Annotated[Stub, tyro.conf.arg(name="")], port: int = 8123) -> None:
    """Serve until Ctrl-C."""

    async def listen() -> None:
        server = await asyncio.start_server(StubServer(stub).serve, "127.0.0.1", port)
        await server.serve_forever()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(listen())


if __name__ == "__main__":
    tyro.cli(main)
