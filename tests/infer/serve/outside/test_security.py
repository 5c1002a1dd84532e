"""Who may call, from where, and how much."""

import pytest
import servers


@pytest.fixture(scope="module")
def locked(tiny, folder):
    """A server that needs a key, with bodies of at most one megabyte."""
    with servers.isoflop_server(tiny, folder, "--most-body-mb", 1, "--slots", 2, key="sk-secret") as server:
        yield server


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer ", "sk-secret", "Basic sk-secret", "Bearer sk-secret "])
def test_a_wrong_key(locked, key):
    headers = {"Authorization": key or ""}
    for method, path in [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nowhere")]:
        answer = locked.call(method, path, headers=headers)
        if key == "Bearer sk-secret ":  # white space around a value is no part of it
            assert answer.status != 401
        else:
            assert answer.status == 401
            assert answer.error["type"] == "authentication_error"
            assert "sk-secret" not in answer.text


def test_the_right_key(locked):
    assert locked.complete("x", max_tokens=1).status == 200
    assert locked.call("GET", "/v1/models").status == 200


def test_openais_client_learns_of_a_wrong_key(locked):
    openai = pytest.importorskip("openai")
    for key, right in (("sk-secret", True), ("sk-wrong", False)):
        client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
        if right:
            assert client.models.list().data
        else:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_health_needs_no_key(locked):
    assert locked.call("GET", "/health", headers={"Authorization": ""}).status == 200


def test_no_origin_is_allowed(locked):
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    for method, path in (("OPTIONS", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/health")):
        answer = locked.call(method, path, headers=asked)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_another_host_name_is_refused(locked):
    """A page whose name was bound to this machine's address cannot read the API."""
    answer = locked.call("GET", "/v1/models", headers={"Host": "evil.example"})
    assert answer.status in (400, 403, 421)
    assert answer.error


def test_a_body_beyond_the_limit(locked):
    answer = locked.complete("x" * 1_100_000)
    assert answer.status == 413
    assert answer.error
    assert locked.complete("x", max_tokens=1).status == 200


@pytest.mark.parametrize("honest", [True, False], ids=["length", "chunked"])
def test_a_body_of_100_megabytes(locked, honest):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=60)
    before = locked.resident_bytes
    body = (b"x" * 1_000_000 for _ in range(100))
    headers = {"Authorization": "Bearer sk-secret", "Content-Type": "application/json"}
    try:
        if honest:
            connection.request("POST", "/v1/completions", b"x" * 100_000_000, headers)
        else:
            connection.request("POST", "/v1/completions", body, headers, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413
        assert b"error" in response.read()
    except (BrokenPipeError, ConnectionResetError):
        pytest.fail("the connection was cut before the answer could be read")
    finally:
        connection.close()
    assert locked.resident_bytes - before < 50_000_000


def test_open_origins_are_those_that_were_named(tiny, folder):
    with servers.isoflop_server(tiny, folder, "--cors-origin", "https://good.example", "--slots", 1) as server:
        for origin, right in (("https://good.example", True), ("https://bad.example", False)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            allowed = server.call("OPTIONS", "/v1/completions", headers=asked).headers.get(
                "access-control-allow-origin"
            )
            assert (allowed == origin) is right
