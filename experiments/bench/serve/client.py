"""Send a load to a server over HTTP and record what becomes of every request, by asyncio and Python's library alone.

Run as a program, in a process of its own, so that neither a benchmark's nor a server's threads delay it: one JSON line
with a target and the path of a load in, lines of progress and one line of outcomes out.
"""

import asyncio
import json
import os
import resource
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from experiments.bench.serve.outcome import Outcome, spread

BUSY = (429, 503)
"""Statuses with which a server refuses a request for want of room."""
CHUNK_BYTES = 65536
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class Target:
    """A server and how it is asked.

    endpoint: "completions" or "chat". body: fields that all requests have, such as {"ignore_eos": true}.
    """

    url: str
    model: str
    endpoint: str = "completions"
    api_key: str | None = None
    timeout: float = 600.0
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path of the endpoint below the server's address, which may end in /v1."""
        base = urlsplit(self.url).path.rstrip("/").removesuffix("/v1")
        return f"{base}/v1/{'chat/completions' if self.endpoint == 'chat' else 'completions'}"

    def message(self, entry: dict[str, Any]) -> bytes:
        """Return the whole HTTP request for one line of a load."""
        prompt = entry["prompt"]
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.endpoint == "chat" else {"prompt": prompt}
        body = {
            "model": self.model,
            **asked,
            "max_tokens": entry["max_tokens"],
            "seed": entry.get("seed", 0),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.body,
        }
        content = json.dumps(body).encode()
        split = urlsplit(self.url)
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {split.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(content)}",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode() + content


class ResponseParser:
    """Parse an HTTP/1.1 response from pieces of any size (RFC 9112): chunked, of a known length, or until the end."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.complete = False
        self._held = b""
        self._left: int | None = None  # bytes of the body, or of its present chunk; None: until the connection ends
        self._chunked = self._after_chunk = self._in_trailers = False

    @property
    def keeps_alive(self) -> bool:
        """True if the connection can carry another request."""
        return self.complete and self.headers.get("connection", "").lower() != "close" and self._has_length

    @property
    def _has_length(self) -> bool:
        return self._chunked or "content-length" in self.headers

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the connection, return those of the body. Raises ValueError if it is not HTTP."""
        self._held += data
        if self.status is None and not self._read_head():
            return b""
        return self._read_chunks() if self._chunked else self._read_plain()

    def _read_head(self) -> bool:
        head, end, rest = self._held.partition(b"\r\n\r\n")
        if not end:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        protocol, _, after = first.partition(" ")
        if not protocol.startswith("HTTP/1"):
            raise ValueError(f"the server does not answer in HTTP/1.1 but with {first[:80]!r}")
        self.status, self._held = int(after[:3]), rest
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._chunked:
            self._left = 0
        elif "content-length" in self.headers:
            self._left = int(self.headers["content-length"])
        return True

    def _read_plain(self) -> bytes:
        if self._left is None:
            body, self._held = self._held, b""
            return body
        body, self._held = self._held[: self._left], self._held[self._left :]
        self._left -= len(body)
        self.complete = self._left == 0
        return body

    def _read_chunks(self) -> bytes:
        parts = []
        while not self.complete:
            if self._left:
                part, self._held = self._held[: self._left], self._held[self._left :]
                self._left -= len(part)
                parts.append(part)
                if self._left:
                    break
                self._after_chunk = True
            line, end, rest = self._held.partition(b"\r\n")
            if not end:
                break
            self._held = rest
            if self._after_chunk:
                self._after_chunk = False
            elif self._in_trailers:
                self.complete = not line
            else:
                self._left = int(line.partition(b";")[0], 16)
                self._in_trailers = self._left == 0
        return b"".join(parts)


class EventParser:
    """Split the body of a stream of server-sent events into the texts of their data lines."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, body: bytes) -> Iterator[str]:
        """Yield the data of every line that is complete."""
        *lines, self._held = (self._held + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")


class _Stream:
    """Collects what the chunks of one stream have said so far."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.first: float | None = None
        self.last: float | None = None
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.chunks = 0
        self.error: str | None = None

    def take(self, data: str, now: float) -> None:
        """Take the data of one event that was received at a time."""
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if not isinstance(event, dict) or event.get("error"):
            self.error = _error_words(event)
            return
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            has_output = _has_output(choice)
            if has_output:
                self.chunks += 1
                if not self.times or self.times[-1] != now:  # events that came together are one chunk
                    self.times.append(now)
            if has_output or choice.get("finish_reason"):
                self.first = now if self.first is None else self.first
                self.last = now


def _has_output(choice: dict[str, Any]) -> bool:
    """Return whether a chunk holds output: the first one of a chat has the role alone, which is no token."""
    if "delta" not in choice:
        return bool(choice.get("text"))
    delta = choice["delta"] or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls", "refusal"))


def _error_words(event: Any) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False


class Client:
    """Sends requests over connections that are used again, as the clients of an API do."""

    def __init__(self, target: Target, clock: Callable[[], float] = time.perf_counter):
        self.target, self.clock = target, clock
        self._idle: deque[_Connection] = deque()

    async def run(self, entries: list[dict[str, Any]], streams: int | None, counts: Counter[str]) -> list[Outcome]:
        """Send the entries of a load when they are due, or in a closed loop; counts: of the outcomes so far."""
        try:
            if streams is not None:
                return await self._closed(entries, streams, counts)
            return await self._open(entries, counts)
        finally:
            for connection in self._idle:
                connection.writer.close()

    async def _open(self, entries: list[dict[str, Any]], counts: Counter[str]) -> list[Outcome]:
        start, tasks = self.clock(), []
        for entry in entries:
            due = start + entry["at"]
            if (wait := due - self.clock()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self._counted(entry, due, counts)))
        return list(await asyncio.gather(*tasks))

    async def _closed(self, entries: list[dict[str, Any]], streams: int, counts: Counter[str]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        left = iter(enumerate(entries))

        async def one_stream() -> None:
            for number, entry in left:
                outcomes[number] = await self._counted(entry, None, counts)

        await asyncio.gather(*(one_stream() for _ in range(streams)))
        return [outcomes[number] for number in range(len(entries))]

    async def _counted(self, entry: dict[str, Any], due: float | None, counts: Counter[str]) -> Outcome:
        outcome = await self.send(entry, due)
        counts[outcome.status] += 1
        return outcome

    async def send(self, entry: dict[str, Any], due: float | None = None) -> Outcome:
        """Send one request and read its stream to the end. due: None is now."""
        message = self.target.message(entry)
        sent = self.clock()
        due = sent if due is None else due
        stream, parser = _Stream(), ResponseParser()
        try:
            async with asyncio.timeout(self.target.timeout):
                parser = await self._exchange(message, stream)
        except TimeoutError:
            stream.error = f"no end within {self.target.timeout:g} s"
        except (OSError, ValueError, ssl.SSLError) as error:
            stream.error = f"{type(error).__name__}: {error}"
        now = self.clock()
        if parser.status in BUSY:
            return Outcome(due, sent, now, "refused", note=None)
        if stream.error is None and not (stream.done or stream.finish_reason):
            stream.error = "the stream ended before it was finished"
        if stream.error is not None or stream.first is None or stream.last is None:
            return Outcome(due, sent, now, "failed", first=None, note=stream.error or "the stream had no output")
        return _served(due, sent, stream)

    async def _exchange(self, message: bytes, stream: _Stream) -> ResponseParser:
        """Send a message and read the response; again on a new connection if the server has closed the old one."""
        while True:
            connection = await self._connect()
            parser, events = ResponseParser(), EventParser()
            text = b""
            try:
                connection.writer.write(message)
                await connection.writer.drain()
                while not parser.complete:
                    data = await connection.reader.read(CHUNK_BYTES)
                    now = self.clock()
                    if not data:
                        break
                    body = parser.feed(data)
                    if parser.status == 200:
                        for event in events.feed(body):
                            stream.take(event, now)
                    else:
                        text += body
            except ConnectionError:
                if not connection.used or parser.status is not None:
                    raise
            except BaseException:
                connection.writer.close()
                raise
            if parser.status is None and connection.used:
                connection.writer.close()
                continue
            if parser.status is None:
                raise ConnectionError("the server closed the connection without an answer")
            if parser.keeps_alive:
                connection.used = True
                self._idle.append(connection)
            else:
                connection.writer.close()
            if parser.status != 200 and parser.status not in BUSY:
                stream.error = f"HTTP {parser.status}: {_body_words(text)}"
            return parser

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.reader.at_eof() and not connection.writer.is_closing():
                return connection
            connection.writer.close()
        split = urlsplit(self.target.url)
        secure = split.scheme == "https"
        port = split.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(split.hostname, port, ssl=secure or None)
        return _Connection(reader, writer)


def _served(due: float, sent: float, stream: _Stream) -> Outcome:
    assert stream.first is not None
    assert stream.last is not None
    said = None if stream.usage is None else stream.usage.get("completion_tokens")
    tokens = stream.chunks if said is None else int(said)
    note = "the server gives no usage: tokens are counted as chunks" if said is None else None
    if said is not None and stream.chunks > tokens:
        note = f"usage counts {tokens} tokens of a stream with {stream.chunks} chunks of output"
    return Outcome(
        due=due,
        sent=sent,
        ended=stream.last,
        status="served",
        chunk_times=tuple(stream.times),
        chunk_tokens=spread(tokens, len(stream.times)) if stream.times else (),
        prompt_tokens=int((stream.usage or {}).get("prompt_tokens") or 0),
        output_tokens=tokens,
        finish_reason=stream.finish_reason,
        first=stream.first,
        note=note,
    )


def _body_words(body: bytes) -> str:
    try:
        return _error_words(json.loads(body))
    except ValueError:
        return " ".join(body.decode("utf-8", "replace").split())[:300]


async def _answer(spec: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    with open(spec["load"], encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    counts: Counter[str] = Counter()

    async def tell() -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            say({"ended": counts.total()})

    telling = asyncio.create_task(tell())
    try:
        outcomes = await Client(Target(**spec["target"])).run(entries, spec["streams"], counts)
    finally:
        telling.cancel()
    say({"outcomes": [outcome.to_dict() for outcome in outcomes]})


def main() -> None:
    """Answer line by line. The first argument is how nice this process is to the server on the same cores."""
    os.nice(int(sys.argv[1]))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    say({"ready": True})
    for line in sys.stdin:
        asyncio.run(_answer(json.loads(line), say))


if __name__ == "__main__":
    main()
