"""Middleware that every request passes first: the Host header, API keys, the size of the body, headers of responses.

All of it is plain ASGI: nothing is buffered, and a client that leaves is noticed below.
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from infer.serve.errors import ApiError
from infer.serve.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What the page is made of, which holds nothing secret: its script sends the key that its user types.
_WITHOUT_KEY = ("/", "/health", "/favicon.ico")
_WITHOUT_KEY_UNDER = "/page/"
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_DRAIN_SECONDS, _DRAIN_BYTES = 20.0, 2**30  # of a body that is too large
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
}


def middleware(settings: Settings) -> list[Middleware]:
    """Return the middleware of the application, outermost first."""
    layers = [Middleware(_Headers, shared=bool(settings.cors_origins))]
    if settings.hosts:
        layers.append(Middleware(_Hosts, names=settings.hosts))
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
                allow_headers=["authorization", "content-type"],
                expose_headers=["x-isoflop-ignored", "x-isoflop-flags", "retry-after"],
            )
        )
    if settings.api_keys:
        layers.append(Middleware(_Keys, keys=settings.api_keys))
    if settings.behaviour is not None:
        from infer.serve.limits import PerKey

        layers.append(Middleware(PerKey, limits=settings.behaviour.limits))
    return [*layers, Middleware(_BodyLimit, most_bytes=settings.most_body_bytes)]


def key_name(key: str) -> str:
    """Return a short name for an API key, which tells nothing about it: for limits and logs."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


class _Headers:
    """Add the headers of a page that runs nothing but its own scripts and is shown in no frame."""

    def __init__(self, app: App, shared: bool):
        self._app = app
        self._headers = {name: value for name, value in _HEADERS.items() if not (shared and "cross-origin" in name)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class _Hosts:
    """Refuse requests whose Host header is another name: a page elsewhere whose name was rebound to this address."""

    def __init__(self, app: App, names: Sequence[str]):
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (host := _without_port(_header(scope, b"host"))) not in self._names:
            error = ApiError(
                403,
                f"the Host header {host[:80]!r} is no name of this server; address it as one of "
                f"{', '.join(sorted(self._names))}, or start it with that --host",
                code="wrong_host",
            )
            return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)


class _Keys:
    """Refuse requests without one of the API keys; the others have `scope["state"]["key"]`, the `key_name`."""

    def __init__(self, app: App, keys: Sequence[str]):
        self._app, self._keys = app, [(key.encode(), key_name(key)) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope):
            return await self._app(scope, receive, send)
        kind, _, given = _header(scope, b"authorization").partition(" ")
        name = self._name_of(given.strip().encode("latin-1")) if kind.lower() == "bearer" else None
        if name is None:
            what = "is wrong" if given else "is missing: send the header Authorization: Bearer KEY"
            error = ApiError(401, f"the API key {what}", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            return await error.response()(scope, receive, send)
        scope.setdefault("state", {})["key"] = name
        await self._app(scope, receive, send)

    def _name_of(self, given: bytes) -> str | None:
        """Return the name of a key. Every key is compared, in constant time, so that time tells nothing of them."""
        found = None
        for key, name in self._keys:
            if hmac.compare_digest(key, given):
                found = name
        return found


class _BodyLimit:
    """Refuse bodies that are too large: by their Content-Length, or as soon as more has arrived.

    The rest is read and thrown away first, since most clients read no answer before they have sent everything.
    """

    def __init__(self, app: App, most_bytes: int):
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > self._most:
            await _drain(receive)
            return await self._error().response()(scope, receive, send)
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                if message.get("more_body"):
                    await _drain(receive)
                raise self._error()
            return message

        await self._app(scope, receive_limited, send)

    def _error(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._most:,} bytes; send less, or raise the server's --most-body-mb",
            code="body_too_large",
            headers={"connection": "close"},
        )


async def _drain(receive: Receive) -> None:
    """Read the rest of a body without keeping it, for a limited time."""
    dropped, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while more and dropped < _DRAIN_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in _WITHOUT_KEY or path.startswith(_WITHOUT_KEY_UNDER))


def _header(scope: Scope, name: bytes) -> str:
    """Return the first value of a header, "" without one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _without_port(host: str) -> str:
    """Return the name of "name:port" or "[address]:port", in lower case."""
    end = host.rfind(":")
    return (host[:end] if end > host.rfind("]") else host).lower()
