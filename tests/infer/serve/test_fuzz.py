"""Schemathesis makes requests from the OpenAPI document: right ones, wrong ones and odd ones. None fails the server.

The same over HTTP, with all of Schemathesis' checks and phases, against a small model:

    schemathesis run http://127.0.0.1:8000/openapi.json --checks not_a_server_error --max-examples 50
"""

import json

import pytest

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

pytestmark = pytest.mark.long
EXAMPLES, MOST_TOKENS = 50, 16
VALID = {"prompt": "the time", "messages": [{"role": "user", "content": "the time"}], "input": "the time"}


def shorten(body):
    """Ask for few tokens."""
    names = {"max_tokens", "max_completion_tokens"} & set(body) or {"max_tokens"}
    for name in names:
        if type(body.get(name, MOST_TOKENS)) is int:
            body[name] = min(body.get(name, MOST_TOKENS), MOST_TOKENS)


def aim(body):
    """Replace what made nearly every request fail early, so that its other fields reach the model."""
    body.pop("model", None)
    body.update({name: value for name, value in VALID.items() if name in body})


def aim_at_a_conversation(case, place):
    """Replace the places in the path by those of a conversation with an answer, which its body answers again."""
    case.path_parameters = {name: place[name] for name in case.path_parameters}
    if case.path.endswith("/answer"):
        case.body = {"parent": place["question"], "model": "tiny", "settings": case.body.get("settings") or {}}
        case.body["settings"].pop("seed", None)
    elif case.path.endswith("/branch"):
        case.body = {"message": int(place["message"])}


@pytest.fixture(scope="module")
def place(client):
    """The ids of a conversation, of its question and of the answer."""
    made = client.post("/api/conversations", json={}).json()["id"]
    body = {"content": "the time", "settings": {"max_tokens": 2}}
    assert client.post(f"/api/conversations/{made}/answer", json=body).status_code == 200
    question, answer = client.get(f"/api/conversations/{made}").json()["messages"]
    return {"conversation": str(made), "question": question["id"], "message": str(answer["id"])}


@pytest.fixture(scope="module")
def operations(app):
    """The operations of the document."""
    return [one.ok() for one in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]


def fuzz(operation, mode, place):
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
        aimed = aimed and mode == schemathesis.GenerationMode.POSITIVE
        if aimed and "conversation" in (case.path_parameters or {}) and operation.method.upper() != "DELETE":
            aim_at_a_conversation(case, place)
        elif isinstance(case.body, dict):
            if aimed:
                aim(case.body)
            if "completions" in operation.path:
                shorten(case.body)
        response = case.call(headers={"host": "localhost"}, timeout=120)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        if response.status_code >= 400:
            assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}

    send()
    return statuses


def test_no_request_fails_the_server(operations, place, idle):
    """50 requests of each operation that the document allows, and 50 that it does not."""
    assert len(operations) > 2
    for operation in operations:
        statuses = fuzz(operation, schemathesis.GenerationMode.POSITIVE, place)
        print(operation.label, statuses)
        if operation.body:
            assert statuses.get(200), "some are answered"
            print(operation.label, "against the document", fuzz(operation, schemathesis.GenerationMode.NEGATIVE, place))
    idle()
