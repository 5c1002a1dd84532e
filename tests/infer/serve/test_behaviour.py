"""Behaviour controls: what the TOML file may say, and what the server then does."""

import asyncio
import dataclasses
import re

import pytest
from starlette.testclient import TestClient

from infer.completion import Update
from infer.request import Request
from infer.sampling import Sampling
from infer.serve.app import create_app
from infer.serve.behaviour import Behaviour
from infer.serve.errors import ApiError
from infer.serve.generation import Generation
from infer.serve.limits import Account, Limits
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from model.errors import InputError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "the time"}]


@pytest.fixture
def controlled(served, registry, tmp_path):
    """TOML → a client of a server with these controls, whose engine is that of the others."""

    def make(text, **settings):
        path = tmp_path / "behaviour.toml"
        path.write_text(text, encoding="utf-8")
        behaviour = Behaviour.read(path)
        model = Served(
            name="tiny",
            config=served.config,
            params=served.params,
            tokenizer=served.tokenizer,
            service=served.service,
            capacity=served.capacity,
            behaviour=behaviour,
        )
        app = create_app(Registry([model]), Settings(behaviour=behaviour, **settings))
        return TestClient(app, raise_server_exceptions=False)

    return make


def post(client, path=CHAT, status=200, **fields):
    body = {"max_tokens": 8, "seed": 1} | ({"messages": HELLO} if path == CHAT else {"prompt": "the time"}) | fields
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response


def saying(tokenizer, text):
    """Fields by which the model writes this text."""
    return {"structured_outputs": {"choice": [text]}, "max_tokens": 40}


def test_the_system_prompt_comes_first(controlled, client):
    one = controlled('[system]\nprompt = "Be a."')
    system = {"role": "system", "content": "Be a."}
    expected = post(client, messages=[system, *HELLO], return_token_ids=True).json()
    assert post(one, return_token_ids=True).json()["prompt_token_ids"] == expected["prompt_token_ids"]
    own = {"role": "system", "content": "on"}
    both = {"role": "system", "content": "Be a.\n\non"}
    expected = post(client, messages=[both, *HELLO], return_token_ids=True).json()
    assert (
        post(one, messages=[own, *HELLO], return_token_ids=True).json()["prompt_token_ids"]
        == expected["prompt_token_ids"]
    )
    assert one.post("/tokenize", json={"messages": HELLO}).status_code == 200


def test_a_hidden_system_prompt_is_not_shown(controlled):
    one = controlled('[system]\nprompt = "Be a."\nvisible = false')
    plain = post(one).json()
    assert "prompt_token_ids" not in plain
    for field in ({"return_token_ids": True}, {"prompt_logprobs": 1}):
        assert post(one, status=400, **field).json()["error"]["param"] == next(iter(field))
    assert one.post("/tokenize", json={"messages": HELLO}).json()["error"]["param"] == "messages"
    assert post(one, COMPLETIONS, return_token_ids=True).status_code == 200


FILTERS = """
[[filter]]
name = "rude"
on = ["input", "output"]
words = ["darn"]
action = "replace"
replacement = "d..n"

[[filter]]
name = "numbers"
on = ["input", "output"]
pattern = '\\d{4}'
action = "refuse"
message = "no numbers, please"

[[filter]]
name = "topic"
on = ["input", "output"]
words = ["weather"]
action = "flag"
"""


def test_filters_of_input(controlled, tokenizer):
    one = controlled(FILTERS)
    error = post(one, status=400, messages=[{"role": "user", "content": "in 1999"}]).json()["error"]
    assert (error["code"], error["param"]) == ("content_filter", "messages[0].content")
    assert "no numbers, please" in error["message"]
    assert post(one, COMPLETIONS, 400, prompt=["a", "1999"]).json()["error"]["param"] == "prompt"
    assert post(one, COMPLETIONS, 400, prompt=tokenizer.encode("in 1999")).json()["error"]["code"] == "content_filter"
    echoed = post(one, COMPLETIONS, prompt="oh Darn it", echo=True, max_tokens=0).json()
    assert echoed["choices"][0]["text"] == "oh d..n it"
    flagged = post(one, messages=[{"role": "user", "content": "the weather"}])
    assert flagged.headers["x-isoflop-flags"] == "topic"
    assert "x-isoflop-flags" not in post(one).headers


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("said", "shown", "reason"),
    [
        ("oh darn, the darnedest", "oh d..n, the darnedest", "stop"),
        ("it was in 1999 that", "it was in ", "content_filter"),
        ("weather", "weather", "stop"),
        ("a darn", "a d..n", "stop"),
    ],
)
def test_filters_of_output(controlled, events, idle, tokenizer, path, said, shown, reason):
    one = controlled(FILTERS)
    response = post(one, path, **saying(tokenizer, said))
    [choice] = response.json()["choices"]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert (text, choice["finish_reason"]) == (shown, reason)
    assert response.headers.get("x-isoflop-flags") == ("topic" if said == "weather" else None)
    chunks = events(post(one, path, stream=True, **saying(tokenizer, said)))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [(choice["delta"].get("content") if path == CHAT else choice["text"]) or "" for choice in choices]
    assert "".join(texts) == shown
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [reason]
    assert (
        post(one, path, status=400, logprobs=1 if path == COMPLETIONS else True).json()["error"]["param"] == "logprobs"
    )
    idle()


def test_nothing_follows_a_refusal_however_late_it_is_read(served, registry, tmp_path):
    """Updates that arrived together with the one that is refused are dropped."""
    path = tmp_path / "behaviour.toml"
    path.write_text(FILTERS, encoding="utf-8")
    behaviour = Behaviour.read(path)

    async def read():
        model = dataclasses.replace(served, behaviour=behaviour)
        with Generation(model) as generation:
            request = Request(Sampling(), prompt=[1], max_new_tokens=9, submitted=0.0)
            generation._numbers[request] = 0
            for text, reason in (("in 19", None), ("99 ", None), ("and more", None), ("", "stop")):
                generation._hear(request, Update(text, [5], [0.0], [{}], reason))
            return [one async for ready in generation for one in ready]

    found = asyncio.run(read())
    assert "".join(update.text for _, update in found) == "in "
    assert [update.finish_reason for _, update in found][-1] == "content_filter"


def test_a_function_filters_lines(controlled, tmp_path):
    code = """
def loud(line):
    if "fail" in line:
        raise ValueError("secret")
    return line.upper() if "a" in line else None
"""
    (tmp_path / "my_filters_of_test.py").write_text(code, encoding="utf-8")
    one = controlled(
        '[[filter]]\nname = "loud"\non = ["input"]\nfunction = "my_filters_of_test:loud"\naction = "replace"'
    )
    echoed = post(one, COMPLETIONS, prompt="say\non\nlast", echo=True, max_tokens=0).json()
    assert echoed["choices"][0]["text"] == "SAY\non\nLAST"
    failed = post(one, COMPLETIONS, 500, prompt="fail").json()
    assert "secret" not in str(failed)


def test_conversations_of_the_page_are_filtered(controlled):
    with controlled(FILTERS) as one:
        id = one.post("/api/conversations", json={}).json()["id"]
        path = f"/api/conversations/{id}/answer"
        refused = one.post(path, json={"content": "in 1999"})
        assert refused.json()["error"]["code"] == "content_filter"
        answered = one.post(path, json={"content": "the weather", "settings": {"max_tokens": 2}})
        assert answered.headers["x-isoflop-flags"] == "topic"
        assert '"type":"end"' in answered.text


def test_limits_are_those_of_each_key(controlled):
    one = controlled("[limits]\nrequests_per_minute = 2", api_keys=("a", "b"))
    headers = {"authorization": "Bearer a"}

    def status(key):
        answer = one.post(
            COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers={"authorization": f"Bearer {key}"}
        )
        return answer.status_code, answer.headers.get("retry-after")

    assert [status("a")[0] for _ in range(2)] == [200, 200]
    refused, wait = status("a")
    assert refused == 429
    assert 25 <= int(wait) <= 31
    assert status("b")[0] == 200
    assert one.get("/v1/models", headers=headers).status_code == 200


def test_tokens_are_counted_when_they_are_known(controlled):
    one = controlled("[limits]\ntokens_per_minute = 20")
    body = {"prompt": [5] * 10, "max_tokens": 14, "ignore_eos": True}
    assert one.post(COMPLETIONS, json=body).status_code == 200
    error = one.post(COMPLETIONS, json=body).json()["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert "20 tokens a minute" in error["message"]
    assert one.post("/v1/embeddings", json={"input": "a"}).status_code == 429


def test_an_account_fills_up_again():
    now = [0.0]
    account = Account(Limits(requests_per_minute=2, tokens_per_minute=60, concurrent=1), lambda: now[0])
    account.enter()
    with pytest.raises(ApiError, match="1 requests of this key run already"):
        account.enter()
    account.leave()
    account.spend(90)  # beyond what there was: a debt of 30
    with pytest.raises(ApiError, match="60 tokens a minute") as refused:
        account.enter()
    assert refused.value.retry_after == pytest.approx(31)
    now[0] = 31.5
    account.enter()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[system", "is no TOML"),
        ("[sytem]\nprompt = 'a'", "sytem is no key; keys are system, filter, limits"),
        ("[system]\nvisible = false", "missing required field `prompt`"),
        ("[limits]\nconcurrent = 0", "limits.concurrent: expected `int` >= 1"),
        ("[limits]\nper_day = 1", "limits.per_day is no key; keys are requests_per_minute"),
        (
            "[[filter]]\nname='x'\non=['input']\naction='drop'\nwords=['a']",
            "filter[0].action: invalid enum value 'drop'",
        ),
        ("[[filter]]\nname='x'\non=['in']\naction='flag'\nwords=['a']", 'must be ["input"], ["output"] or both'),
        ("[[filter]]\nname='x'\non=['input']\naction='flag'", "neither words, pattern nor function"),
        ("[[filter]]\nname='x'\non=['input']\naction='flag'\npattern='a+'", "give longest"),
        (
            "[[filter]]\nname='x'\non=['input']\naction='flag'\nwords=['a']\nmessage='b'",
            'message goes with action = "refuse"',
        ),
        ("[[filter]]\nname='x'\non=['input']\naction='flag'\nfunction='nowhere:f'", 'give "module:function"'),
    ],
)
def test_what_is_wrong_in_the_file_is_said(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        Behaviour.read(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Behaviour.read(tmp_path / "none.toml")
