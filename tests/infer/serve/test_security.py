"""Requests that may not pass: hosts, keys, bodies; and the headers of every response."""

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from infer.serve.errors import HANDLERS
from infer.serve.security import key_name, middleware
from infer.serve.settings import Settings


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"bytes": len(await request.body()), "key": getattr(request.state, "key", None)})


def application(settings: Settings) -> Starlette:
    routes = [Route(path, echo, methods=["GET", "POST"]) for path in ("/", "/v1/x", "/health")]
    return Starlette(routes=routes, middleware=middleware(settings), exception_handlers=HANDLERS)


def client(**settings) -> TestClient:
    return TestClient(application(Settings(**settings)))


def test_one_of_the_keys_is_needed():
    one = client(api_keys=("first", "schlüssel"))
    for given in ("", "Bearer ", "Bearer firs", "Basic first"):
        answer = one.post("/v1/x", headers={"authorization": given} if given else {})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for key in ("first", "schlüssel"):
        answer = one.post("/v1/x", headers={"authorization": f"bearer {key}".encode()})
        assert answer.json() == {"bytes": 0, "key": key_name(key)}
    assert one.get("/health").status_code == 200
    assert one.get("/").status_code == 200
    assert one.post("/health").status_code == 401


def test_large_bodies_are_refused_however_they_are_sent():
    one = client(most_body_bytes=1000)
    assert one.post("/v1/x", content=b"x" * 1000).json()["bytes"] == 1000
    for content in (b"x" * 1001, iter([b"x" * 400] * 3)):
        answer = one.post("/v1/x", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_not_kept(announced):
    held, most = [], 0

    async def receive():
        nonlocal most
        held.append(1)
        most = max(most, len(held))
        return {"type": "http.request", "body": b"x" * 1000, "more_body": most < 500}

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", b"500000")] if announced else [(b"transfer-encoding", b"chunked")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/x",
        "headers": headers,
        "query_string": b"",
        "root_path": "",
    }
    asyncio.run(application(Settings(most_body_bytes=2000))(scope, receive, send))
    assert most == 500  # the rest was read, so that the client reads the answer
    assert sent[0]["status"] == 413


def test_hosts_are_checked():
    one = client(hosts=("localhost", "127.0.0.1", "[::1]"))
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:80"):
        assert one.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "", "[::1"):
        assert one.get("/health", headers={"host": host}).status_code == 403
    assert client().get("/health", headers={"host": "any.example"}).status_code == 200


def test_other_origins_are_refused_unless_given():
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = client().options("/v1/x", headers=headers)
    assert "access-control-allow-origin" not in closed.headers
    opened = client(cors_origins=("https://a.example",), api_keys=("k",))
    assert opened.options("/v1/x", headers=headers).headers["access-control-allow-origin"] == "https://a.example"
    other = opened.options("/v1/x", headers=headers | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    assert opened.post("/v1/x", headers=headers).headers["access-control-allow-origin"] == "https://a.example"


def test_every_response_has_the_headers():
    for answer in (client().get("/"), client(api_keys=("k",)).post("/v1/x"), client().get("/nothing")):
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
