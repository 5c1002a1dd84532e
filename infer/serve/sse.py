"""Server-sent events: a response that streams JSON and ends what makes it when the client leaves."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infer.serve.errors import as_api_error

DONE = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()
_LOG = logging.getLogger(__name__)


def event(value: Any) -> bytes:
    """Return the event of a value's JSON."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


async def until_gone(receive: Receive) -> None:
    """Return when the client has left; the body of its request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of events. `close` is called at the end, or when the client leaves, which ends `events` too.

    An exception in `events` becomes a last event {"error": …}, since the status has been sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; for Starlette."""
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            await self._events.aclose()
            self._close()  # a generator that has not begun is closed without a word
        if not writing.cancelled() and (error := writing.exception()) is not None:
            raise error

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with contextlib.suppress(ClientDisconnect, OSError):
            try:
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except (ClientDisconnect, OSError):
                raise
            except Exception as error:
                if (told := as_api_error(error)).status == 500:
                    _LOG.exception("a stream failed")
                last = b"data: " + told.encode() + b"\n\n" + DONE
                await send({"type": "http.response.body", "body": last, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
