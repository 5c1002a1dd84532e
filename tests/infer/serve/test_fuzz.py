"""Schemathesis makes requests from the OpenAPI document: right ones, wrong ones and odd ones. None fails the server.

The same over HTTP, with all phases of Schemathesis, against a small model:

    schemathesis run http://127.0.0.1:8000/openapi.json --checks not_a_server_error --max-examples 50
"""

import json

import pytest

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

pytestmark = pytest.mark.long
EXAMPLES, MOST_TOKENS = 50, 16
VALID = {
    "prompt": "the time",
    "messages": [{"role": "user", "content": "the time"}],
    "input": "the time",
    "content": "the time",
}


@pytest.fixture(scope="module")
def operations(app):
    """The operations of the document."""
    return [one.ok() for one in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]


@pytest.fixture(scope="module")
def conversation(client):
    """() → ids of a new conversation and of its answer."""

    def begin():
        new = client.post("/api/conversations", json={}).json()["id"]
        fields = {"content": "the time", "settings": {"max_tokens": 2, "seed": 1}}
        assert client.post(f"/api/conversations/{new}/answer", json=fields).status_code == 200
        return new, client.get(f"/api/conversations/{new}").json()["messages"][-1]["id"]

    return begin


def shorten(body):
    """Ask for few tokens."""
    names = {"max_tokens", "max_completion_tokens"} & set(body) or {"max_tokens"}
    for name in names:
        if type(body.get(name, MOST_TOKENS)) is int:
            body[name] = min(body.get(name, MOST_TOKENS), MOST_TOKENS)


def aim(case, conversation):
    """Replace what made nearly every request fail early, so that its other fields are tried."""
    places = case.path_parameters or {}
    message = None
    if "conversation" in places:
        places["conversation"], message = map(str, conversation())
    if "message" in places:
        places["message"] = message
    if "model" in places:
        places["model"] = "tiny"
    if isinstance(case.body, dict):
        case.body.pop("model", None)
        case.body.update({name: value for name, value in VALID.items() if name in case.body})
        case.body.update({name: int(message) for name in {"message", "parent"} & set(case.body) if message})


def fuzz(operation, mode, conversation):
    """Send 50 requests of one operation; return how many answers had each status."""
    statuses = {}

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode), hypothesis.strategies.booleans())
    def send(case, aimed):
        if aimed and mode == schemathesis.GenerationMode.POSITIVE:
            aim(case, conversation)
        if isinstance(case.body, dict) and "completions" in operation.path:
            shorten(case.body)
        if (
            operation.path.endswith("/answer")
            and isinstance(case.body, dict)
            and isinstance(case.body.get("settings", {}), dict)
        ):
            shorten(case.body.setdefault("settings", {}))
        response = case.call(headers={"host": "localhost"}, timeout=120)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        if response.status_code >= 400:
            assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}

    send()
    return statuses


def test_no_request_fails_the_server(operations, conversation, idle):
    """50 requests of each operation that the document allows, and 50 that it does not."""
    assert len(operations) > 2
    for operation in operations:
        statuses = fuzz(operation, schemathesis.GenerationMode.POSITIVE, conversation)
        print(operation.label, statuses)
        assert statuses.get(200), "some are answered"
        if operation.body:
            wrong = fuzz(operation, schemathesis.GenerationMode.NEGATIVE, conversation)
            print(operation.label, "against the document", wrong)
    idle()
