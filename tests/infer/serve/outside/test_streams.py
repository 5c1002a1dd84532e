"""Streams of server-sent events, as clients read them."""

import json
import socket
import time

import pytest

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
FIELDS = {"messages": CAPITAL, "max_tokens": 24, "temperature": 0}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def text_of(events, index=0):
    """The text of one choice."""
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    parts = [one.get("text") or one.get("delta", {}).get("content") for one in choices if one["index"] == index]
    return "".join(part for part in parts if part)


def test_the_form_of_a_chat_stream(server):
    *events, done = server.events(CHAT, **FIELDS)
    assert done == "[DONE]"
    assert len({event["id"] for event in events}) == 1
    assert len({event["created"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert not choices[0]["delta"].get("content")
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert not any("role" in choice["delta"] for choice in choices[1:])


def test_a_streamed_chat_is_the_whole_one(server):
    whole = server.post(CHAT, **FIELDS).body["choices"][0]["message"]["content"]
    assert text_of(server.events(CHAT, **FIELDS)) == whole


def test_openais_client_reads_a_stream(server, client, model):
    with client.chat.completions.create(
        model=model, stream=True, stream_options={"include_usage": True}, **FIELDS
    ) as s:
        chunks = list(s)
    *_, last, usage = chunks
    assert last.choices[0].finish_reason == "stop"
    assert not usage.choices
    assert usage.usage.completion_tokens > 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}], ids=str)
def test_without_request_there_is_no_usage(server, options):
    assert not any(event.get("usage") for event in server.events(CHAT, **FIELDS, **options)[:-1])


def test_usage_is_that_of_the_whole(ours):
    events = ours.events(CHAT, **FIELDS, stream_options={"include_usage": True})
    whole = ours.post(CHAT, **FIELDS).body["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert events[-2]["usage"][name] == whole[name]


def test_several_choices_stream_side_by_side(ours):
    fields = {"messages": CAPITAL, "max_tokens": 10, "temperature": 1.2, "n": 3, "seed": 5}
    events = ours.events(CHAT, **fields)
    whole = ours.post(CHAT, **fields).body["choices"]
    for index in range(3):
        assert text_of(events, index) == whole[index]["message"]["content"]
        ends = [c["finish_reason"] for e in events[:-1] for c in e["choices"] if c["index"] == index]
        assert ends[-1] in ("stop", "length")
        assert not any(ends[:-1])


@pytest.mark.parametrize("stop", ["Paris", "is Par", ["is Par", "capital of"]], ids=str)
def test_a_stop_string_is_never_shown(server, stop):
    shown = text_of(server.events(CHAT, **FIELDS, stop=stop))
    whole = server.post(CHAT, **FIELDS).body["choices"][0]["message"]["content"]
    stops = [stop] if isinstance(stop, str) else stop
    assert shown == whole[: min(whole.index(one) for one in stops if one in whole)]


def test_streamed_log_probabilities_are_those_of_the_whole(server):
    fields = FIELDS | {"logprobs": True, "top_logprobs": 3}
    events = server.events(CHAT, **fields)[:-1]
    parts = [choice["logprobs"]["content"] for e in events for choice in e["choices"] if choice.get("logprobs")]
    streamed = [one for part in parts for one in part or []]
    whole = server.post(CHAT, **fields).body["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in streamed] == [one["token"] for one in whole]
    assert [one["logprob"] for one in streamed] == pytest.approx([one["logprob"] for one in whole], abs=1e-3)


def test_characters_are_whole(server):
    """Each chunk is text; characters of several tokens come whole."""
    (events) = server.events(CHAT, messages=[{"role": "user", "content": "Write five emoji."}], max_tokens=60)
    assert "\ufffd" not in text_of(events).rstrip("\ufffd")
    ids = server.post("/tokenize", content="日本語", prompt="日本語", add_special_tokens=False).body["tokens"]
    assert len(ids) > 3
    for token in ids[:2]:
        events = server.events(COMPLETIONS, prompt="x", max_tokens=4, logit_bias={str(token): 100}, temperature=0)
        assert all(isinstance(choice["text"], str) for event in events[:-1] for choice in event["choices"])


def test_the_form_of_a_stream_of_completions(server):
    fields = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    *events, done = server.events(COMPLETIONS, **fields)
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert text_of(events) == server.post(COMPLETIONS, **fields).body["choices"][0]["text"]
    ends = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert ends == [None] * (len(ends) - 1) + ["length"]


def test_tokens_come_as_they_are_generated(ours):
    """The first part of a long answer arrives long before the last."""
    fields = {"messages": CAPITAL, "max_tokens": 200, "ignore_eos": True, "stream": True}
    body = json.dumps(fields).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    times = []
    with socket.create_connection(("127.0.0.1", ours.port)) as connection:
        connection.sendall(head + body)
        while b"[DONE]" not in connection.recv(65536):
            times.append(time.monotonic())
    assert len(times) > 10


@pytest.mark.parametrize("fields", [{"max_tokens": "x"}, {"model": "gpt-4"}, {"messages": []}], ids=str)
def test_errors_before_the_first_byte_have_a_status(ours, fields):
    answer = ours.post(CHAT, **(FIELDS | {"stream": True} | fields))
    assert answer.status in (400, 404)
    assert answer.error


def test_a_client_that_leaves_a_stream_frees_its_slot(ours):
    body = json.dumps({"messages": CAPITAL, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", ours.port)) as connection:
        connection.sendall(head + body)
        ours.wait_until_running()
    assert ours.wait_until_idle() < 5
