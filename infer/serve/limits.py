"""Limits of each API key: requests and tokens a minute, and requests at the same time."""

import contextvars
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders

from infer.serve.behaviour import FLAGS, Limits
from infer.serve.errors import ApiError
from infer.serve.security import App, Message, Receive, Scope, Send

ACCOUNT: contextvars.ContextVar["Account | None"] = contextvars.ContextVar("account", default=None)
"""The account of the current request's key."""


class Bucket:
    """An allowance that fills up in a minute; what is taken beyond it is a debt."""

    def __init__(self, size: float, clock: Callable[[], float]):
        self._size, self._clock, self._level, self._at = size, clock, float(size), clock()

    def wait(self, amount: float) -> float:
        """Return the seconds until this much is there; 0: it is there now."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._at) * self._size / 60)
        self._at = now
        return max(0.0, (amount - self._level) * 60 / self._size)

    def take(self, amount: float) -> None:
        """Take this much."""
        self.wait(0)
        self._level -= amount


class Account:
    """What one key has used."""

    def __init__(self, limits: Limits, clock: Callable[[], float]):
        self._limits = limits
        self._requests = limits.requests_per_minute and Bucket(limits.requests_per_minute, clock)
        self._tokens = limits.tokens_per_minute and Bucket(limits.tokens_per_minute, clock)
        self.running = 0

    def enter(self) -> None:
        """Begin a request. Raises ApiError 429 beyond a limit."""
        limits = self._limits
        if limits.concurrent is not None and self.running >= limits.concurrent:
            raise _limited(f"{self.running} requests of this key run already, as many as may run", 1.0)
        if self._tokens and (wait := self._tokens.wait(1)):
            raise _limited(f"this key has used its {limits.tokens_per_minute:,} tokens a minute", wait)
        if self._requests:
            if wait := self._requests.wait(1):
                raise _limited(f"this key has sent its {limits.requests_per_minute:,} requests a minute", wait)
            self._requests.take(1)
        self.running += 1

    def leave(self) -> None:
        """End a request."""
        self.running -= 1

    def spend(self, tokens: int) -> None:
        """Count tokens of prompts and answers."""
        if self._tokens:
            self._tokens.take(tokens)


class PerKey:
    """Middleware: hold every POST to the limits of its key, and name the filters that flagged it in a header."""

    def __init__(self, app: App, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._app, self._limits, self._clock = app, limits, clock
        self._accounts: dict[str, Account] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer 429; for Starlette."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        flags: list[str] = []

        async def send_with_flags(message: Message) -> None:
            if message["type"] == "http.response.start" and flags:
                MutableHeaders(scope=message)["x-isoflop-flags"] = ", ".join(flags)
            await send(message)

        account = self._account(scope.get("state", {}).get("key", ""))
        try:
            account.enter()
        except ApiError as error:
            return await error.response()(scope, receive, send)
        ACCOUNT.set(account)
        FLAGS.set(flags)
        try:
            await self._app(scope, receive, send_with_flags)
        finally:
            account.leave()

    def _account(self, key: str) -> Account:
        if key not in self._accounts:
            self._accounts[key] = Account(self._limits, self._clock)
        return self._accounts[key]


def spend(account: Account | None, tokens: int) -> None:
    """Count tokens of the current request, if anything limits them."""
    if account is not None:
        account.spend(tokens)


def _limited(what: str, wait: float) -> ApiError:
    return ApiError(429, f"{what}; try again in {wait:.1f} s", code="rate_limit_exceeded", retry_after=wait)
