"""Wrong requests: the status, the field and the code of each, and never a 5xx."""

import json

import pytest
from starlette.testclient import TestClient

from infer import Sampling
from infer.serve.app import create_app
from infer.serve.served import Registry, Served

MOST = 3 + 16  # requests that the service holds: conftest.py
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "the time"}]
SMALL = {"max_tokens": 2, "seed": 1}

# Fields of both endpoints: (value, the field in the error).
WRONG = [
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 100}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"seed": 0.5}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"269": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": list(range(33))}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "regex"}}, "response_format.pattern"),
    ({"response_format": {"type": "regex", "pattern": "("}}, "response_format"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"min_tokens": 2, "structured_outputs": {"regex": "a"}}, "min_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"model": 3}, "model"),
]
WRONG_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"max_completion_tokens": 3}, "max_tokens"),
    ({"functions": [{}]}, "functions"),
    ({"store": True}, "store"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"echo": True}, "echo"),
]
WRONG_COMPLETIONS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [269]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
]
CASES = [(path, wrong, param) for wrong, param in WRONG for path in (CHAT, COMPLETIONS)]
CASES += [(CHAT, wrong, param) for wrong, param in WRONG_CHAT]
CASES += [(COMPLETIONS, wrong, param) for wrong, param in WRONG_COMPLETIONS]


def valid(path):
    return SMALL | ({"messages": HELLO} if path == CHAT else {"prompt": "the time"})


def counts(answer):
    """Return the numbers of tokens, without how many of them an earlier request left in the prefix cache."""
    return {name: value for name, value in answer["usage"].items() if name != "prompt_tokens_details"}


def error(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(name, body)] = response.json().items()
    assert name == "error"
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    return body


@pytest.mark.parametrize(("path", "wrong", "param"), CASES)
def test_a_wrong_field_is_named(client, path, wrong, param):
    found = error(client.post(path, json=valid(path) | wrong))
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"a"', b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"prompt": "\\ud800"}'],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_no_object_is_refused(client, path, body):
    error(client.post(path, content=body))


def test_a_missing_field_is_named(client):
    assert error(client.post(COMPLETIONS, json={}))["param"] == "prompt"
    assert error(client.post(CHAT, json={}))["param"] == "messages"


def test_a_lone_surrogate_is_refused(client):
    error(client.post(COMPLETIONS, content=b'{"prompt": "\\ud800"}'))
    error(client.post(CHAT, content=b'{"messages": [{"role": "user", "content": "\\udfff"}]}'))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_null_is_the_default(client, path):
    nulls = dict.fromkeys(("n", "stop", "temperature", "logit_bias", "logprobs", "stream", "user", "suffix", "tools"))
    with_nulls = client.post(path, json=valid(path) | nulls).json()
    assert counts(with_nulls) == counts(client.post(path, json=valid(path)).json())


def test_unknown_fields_are_ignored_and_named(client):
    strange = {"frobnicate": 1, "a\r\nx-evil: 1": 2, "ünï": 3}
    message = {"role": "user", "content": "a", "mood": "good", "refusal": None}
    response = client.post(CHAT, json=SMALL | strange | {"messages": [message]})
    assert response.status_code == 200
    assert response.headers["x-isoflop-ignored"] == r"frobnicate, a\r\nx-evil: 1, \u00fcn\u00ef, messages[0].mood"
    assert "x-isoflop-ignored" not in client.post(CHAT, json=valid(CHAT)).headers
    streamed = client.post(CHAT, json=valid(CHAT) | {"stream": True, "frobnicate": 1})
    assert streamed.headers["x-isoflop-ignored"] == "frobnicate"


def test_a_prompt_beyond_the_window_is_refused_with_both_numbers(client, served):
    long = "x" * 200
    for path, body in ((COMPLETIONS, {"prompt": long}), (CHAT, {"messages": [{"role": "user", "content": long}]})):
        for more in ({}, {"max_tokens": None}, {"stream": True}):
            found = error(client.post(path, json=SMALL | body | more))
            assert found["code"] == "context_length_exceeded"
            assert str(served.capacity) in found["message"]
            assert "20" in found["message"] or "21" in found["message"]


@pytest.mark.parametrize("most", [96, 10_000])
def test_a_text_ends_with_its_window(client, served, most):
    """As with llama-server; clients send the same max_tokens with every prompt."""
    answer = client.post(COMPLETIONS, json={"prompt": "x" * 90, "max_tokens": most, "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == served.capacity
    assert answer["choices"][0]["finish_reason"] == "length"


def test_unknown_models_paths_and_methods(client):
    found = error(client.post(COMPLETIONS, json={"model": "gpt-4", "prompt": "a"}), 404)
    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert error(client.get("/v2/nothing"), 404)["code"] == "not_found"
    response = client.get(COMPLETIONS)
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_before_a_stream_begins(client, served, paused, idle, stream):
    with paused():
        fill = [served.service.submit([1], Sampling(), 2, lambda *_: None) for _ in range(MOST - 1)]
        two = {"prompt": ["a", "b"], "stream": stream}  # of which only the first finds room
        error(client.post(COMPLETIONS, json=valid(COMPLETIONS) | two), 429)
        response = client.post(CHAT, json=valid(CHAT) | {"stream": stream})
        assert error(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        for request in fill:
            served.service.cancel(request)
    idle()


def test_models_that_lack_something(served, tokenizer, model_config, random_params):
    """An encoder, a model without a tokenizer, and one without a chat template say so."""
    encoder = model_config.replace(stack="encoder", head="masked-language-model", eos_token_ids=())
    plain = tokenizer.with_chat_template("")
    plain._conventions = type(plain._conventions)()
    options = {"config": model_config, "params": served.params, "capacity": 8, "service": served.service}
    models = [
        Served(name="bert", tokenizer=tokenizer, **options | {"config": encoder, "service": None}),
        Served(name="mute", tokenizer=None, **options),
        Served(name="plain", tokenizer=plain, **options),
    ]
    client = TestClient(create_app(Registry(models)), raise_server_exceptions=False)
    for path in (CHAT, COMPLETIONS):
        assert "/v1/embeddings" in error(client.post(path, json=valid(path) | {"model": "bert"}))["message"]
    assert error(client.post(CHAT, json={"model": "mute", "messages": HELLO}))["param"] == "messages"
    assert error(client.post(COMPLETIONS, json={"model": "mute", "prompt": "a"}))["param"] == "prompt"
    assert error(client.post(COMPLETIONS, json={"model": "mute", "prompt": [1], "stop": "a"}))["param"] == "stop"
    assert error(client.post(CHAT, json={"model": "plain", "messages": HELLO}))["code"] == "no_chat_template"


def test_an_exception_is_a_500_that_tells_nothing(registry, monkeypatch):
    from infer.serve import models

    def fail(one):
        raise RuntimeError("secret")

    monkeypatch.setattr(models, "_card", fail)
    client = TestClient(create_app(registry), raise_server_exceptions=False)
    found = error(client.get("/v1/models"), 500)
    assert "secret" not in json.dumps(found)
