"""Conversations: stored before they are shown, trees of versions, exports, and what leaves the window."""

import dataclasses
import json
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from infer.serve import tree
from infer.serve.app import create_app
from infer.serve.behaviour import Behaviour, SystemPrompt
from infer.serve.filters import Filter, Pattern, Words
from infer.serve.served import Registry
from infer.serve.settings import Settings
from infer.serve.store import Store
from model.errors import InputError

API = "/api/conversations"


@pytest.fixture
def chat(client):
    """A function that begins a conversation."""

    def begin(**changes):
        return Chat(client, client.post(API, json=changes).json()["id"])

    return begin


class Chat:
    """A conversation as the page uses it."""

    def __init__(self, client, id):
        self.client, self.path = client, f"{API}/{id}"

    def answer(self, **body):
        """The events of an answer of at most 4 tokens."""
        body["settings"] = {"max_tokens": 4, "seed": 1} | body.get("settings", {})
        response = self.client.post(f"{self.path}/answer", json=body)
        assert response.status_code == 200, response.text
        return [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n") if block]

    def ended(self, **body):
        """The answer as it is stored."""
        return self.answer(**body)[-1]["message"]

    def refused(self, **body):
        response = self.client.post(f"{self.path}/answer", json=body)
        assert response.status_code >= 400
        return response.status_code, response.json()["error"]["message"]

    @property
    def now(self):
        return self.client.get(self.path).json()

    @property
    def contents(self):
        return [message["content"] for message in self.now["messages"]]


def test_answer_is_streamed_and_stored(chat):
    one = chat(system="Be brief.")
    start, *parts, end = one.answer(content="Hello there,\nmodel")
    assert [event["type"] for event in (start, end)] == ["start", "end"]
    assert {event["type"] for event in parts} == {"text"}
    user, answer = start["conversation"]["messages"]
    assert (user["role"], user["content"], user["parent"]) == ("user", "Hello there,\nmodel", None)
    assert (answer["content"], answer["running"], answer["finish_reason"]) == ("", True, "partial")
    message = end["message"]
    assert message["content"] == "".join(event["text"] for event in parts)
    assert message["completion_tokens"] == sum(event["tokens"] for event in parts) <= 4
    assert message["finish_reason"] in ("stop", "length")
    assert not message["running"]
    assert 0 < message["first_token_seconds"] <= message["seconds"]
    assert one.now["messages"] == [user, message]
    assert one.now["title"] == "Hello there, model"
    tokens = one.client.get(f"{one.path}/messages/{message['id']}/logprobs").json()
    assert len(tokens) == message["completion_tokens"]
    for text, logprob, top in tokens:
        assert isinstance(text, str)
        assert logprob <= 0
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        assert len(top) == 5


def test_settings_are_those_of_the_engine(chat):
    one = chat()
    greedy = {"temperature": 0, "max_tokens": 8}
    first = one.ended(content="a", settings=greedy)
    assert first["settings"]["temperature"] == 0
    again = one.ended(parent=first["parent"], settings=greedy | {"seed": 7})
    assert again["content"] == first["content"]
    biased = one.ended(parent=first["parent"], settings=greedy | {"presence_penalty": 2, "frequency_penalty": 2})
    assert biased["content"] != first["content"]
    assert one.refused(content="b", settings={"top_p": 2}) == (400, "settings.top_p: expected `float` <= 1.0")


def test_edit_branches_and_regenerate_adds_a_sibling(chat):
    one = chat()
    first = one.ended(content="one")
    second = one.ended(content="two")
    other = one.ended(parent=second["parent"], settings={"seed": 2})
    assert other["siblings"] == [second["id"], other["id"]]
    assert one.now["messages"][-1]["id"] == other["id"]
    edited = one.ended(content="deux", parent=first["id"])
    assert one.contents == ["one", first["content"], "deux", edited["content"]]
    assert len(one.now["messages"][2]["siblings"]) == 2
    # An edit of the first message is a root of its own.
    root = one.ended(content="un", parent=None)
    assert one.contents == ["un", root["content"]]
    # Back to where the two answers are: the branch that was added to last.
    chosen = one.client.post(f"{one.path}/branch", json={"message": second["parent"]}).json()
    assert [message["id"] for message in chosen["messages"]][-1] == other["id"]
    chosen = one.client.post(f"{one.path}/branch", json={"message": second["id"]}).json()
    assert [message["id"] for message in chosen["messages"]][-1] == second["id"]
    everything = one.client.get(f"{one.path}/export").json()
    assert [message["content"] for message in everything["messages"] if message["role"] == "user"] == [
        "one",
        "two",
        "deux",
        "un",
    ]


def test_continue_appends(chat):
    one = chat()
    first = one.ended(content="a", settings={"max_tokens": 3})
    assert first["finish_reason"] == "length"
    more = one.ended(**{"parent": first["id"], "continue": True})
    assert more["id"] == first["id"]
    assert more["content"].startswith(first["content"])
    assert more["completion_tokens"] > first["completion_tokens"]
    assert more["seconds"] > first["seconds"]
    assert more["first_token_seconds"] == first["first_token_seconds"]


def test_the_window_drops_the_oldest_turns_and_says_which(chat):
    one = chat(system="s")
    for number in range(4):
        last = one.ended(content=f"{number}" * 8)
    # The window has 96 tokens; the template takes about 8 of each message.
    ids = [message["id"] for message in one.now["messages"]]
    assert last["dropped"]
    assert last["dropped"] == ids[: len(last["dropped"])]
    assert len(last["dropped"]) % 2 == 0
    assert last["prompt_tokens"] <= 96 - 4
    assert len(one.now["messages"]) == 8
    status, message = one.refused(content="z" * 100)
    assert status == 400
    assert "leave no room for an answer in the window of 'tiny', 96 tokens; shorten the message" in message
    assert len(one.now["messages"]) == 8


def test_export_and_delete(chat):
    one = chat(title="Ünder / the “hood”", system="Be kind.")
    message = one.ended(content="Hello")
    response = one.client.get(f"{one.path}/export?format=json")
    assert response.headers["content-disposition"] == 'attachment; filename="nder-the-hood.json"'
    assert response.json()["messages"][1] == message
    text = one.client.get(f"{one.path}/export?format=markdown").text
    assert text.startswith(
        "# Ünder / the “hood”\n\n## System\n\nBe kind.\n\n## User\n\nHello\n\n## Assistant (tiny)\n\n"
    )
    assert one.client.get(f"{one.path}/export?format=xml").status_code == 400
    assert one.client.delete(one.path).json() == {"done": True}
    for path in (one.path, f"{one.path}/export", f"{one.path}/messages/{message['id']}/logprobs"):
        assert one.client.get(path).status_code == 404
    assert one.refused(content="a")[0] == 404


def test_search_and_rename(chat):
    one = chat(title="Zebra 100%")
    one.ended(content="quagga")

    def found(search):
        listed = one.client.get(API, params={"search": search}).json()["conversations"]
        return f"{API}/{listed[0]['id']}" == one.path if listed else False

    assert found("zebra 100%")
    assert found("QUAGGA")
    assert not found("zebra_100")
    one.client.patch(one.path, json={"title": "Horse"})
    assert found("horse")
    assert not found("zebra")


def test_wrong_requests_are_told_what_to_do(chat):
    one = chat()
    assert one.refused(content=" ")[1] == "content is empty; write a message"
    assert one.refused() == (400, "without content, parent must be a message of the user")
    assert one.refused(content="a", parent=10**9)[0] == 404
    user = one.ended(content="a")["parent"]
    assert "below an answer" in one.refused(content="b", parent=user)[1]
    assert "needs an answer" in one.refused(**{"parent": user, "continue": True})[1]
    assert one.refused(content="b", model="other")[0] == 404
    assert one.client.get(f"{API}/{'9' * 40}").status_code == 404
    assert one.client.get(f"{API}/x").status_code == 404


def test_other_pages_change_nothing(client):
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://testserver", 200)):
        assert client.post(API, json={}, headers={"origin": origin}).status_code == status


def test_one_answer_at_a_time(client, chat, paused, served):
    one = chat()
    with ThreadPoolExecutor() as pool:
        with paused():
            running = pool.submit(one.answer, content="a", settings={"max_tokens": 64})
            while not served.service.load().waiting:
                time.sleep(0.001)
            assert one.refused(content="b")[0] == 409
            assert client.post(f"{one.path}/branch", json={"message": 1}).status_code == 409
            assert client.post(f"{one.path}/stop", json={}).json() == {"done": True}
        events = running.result(30)
    assert events[-1]["message"]["finish_reason"] == "cancelled"
    assert client.post(f"{one.path}/stop", json={}).json() == {"done": False}


def test_conversations_outlast_the_server(registry, tmp_path):
    path = tmp_path / "new" / "conversations.sqlite"
    with TestClient(create_app(registry, Settings(conversations=path))) as client:
        one = Chat(client, client.post(API, json={}).json()["id"])
        one.ended(content="Remember me")
        before = one.now
    with TestClient(create_app(registry, Settings(conversations=path))) as client:
        assert client.get("/api/models").json()["stored"]
        assert client.get(one.path).json() == before


def test_behaviour_of_the_server_holds_for_conversations(served):
    system = SystemPrompt("Say a.")
    refusing = Filter("all", Pattern("(?s)."), "refuse")
    behaviour = Behaviour(system=system, inputs=(Filter("bad", Words(["bad"]), "refuse"),), outputs=(refusing,))
    other = Registry([dataclasses.replace(served, behaviour=behaviour)])  # its engine runs already
    with TestClient(create_app(other)) as client:
        assert client.get("/api/models").json()["models"][0]["system"] == "Say a."
        one = Chat(client, client.post(API, json={}).json()["id"])
        assert one.refused(content="a bad word")[0] == 400
        assert one.now["messages"] == []
        message = one.ended(content="a")
        assert message["finish_reason"] == "content_filter"
        assert message["settings"]["logprobs"] is False
        assert client.get(f"{one.path}/messages/{message['id']}/logprobs").json() == []


ANSWERING = """
import asyncio, sys
from pathlib import Path
from infer.completion import Update
from infer.serve import tree
from infer.serve.answers import Answers, Started
from infer.serve.store import Store

class Endless:
    "A generation of one token after the other."
    def close(self): pass
    async def __aiter__(self):
        number = 0
        while True:
            yield [(0, Update(f"{number} ", [number], [-1.0], [{}], None))]
            number += 1
            await asyncio.sleep(0)

async def main():
    store = Store(Path(sys.argv[1]))
    made = await store.run(tree.create)
    message = await store.run(tree.begin_answer, made.id, None, "Count.", model="m", settings={}, dropped=(),
                              prompt_tokens=1)
    started = Started(conversation=await store.run(tree.read, made.id, message))
    stream = Answers().begin(made.id).start(store, message, Endless(), None, started, False)
    async for event in stream._events:
        sys.stdout.buffer.write(event)
        sys.stdout.buffer.flush()

asyncio.run(main())
"""


def test_kill_in_mid_answer_loses_nothing_that_was_shown(tmp_path):
    path = tmp_path / "conversations.sqlite"
    shown = b""
    with subprocess.Popen([sys.executable, "-c", ANSWERING, path], stdout=subprocess.PIPE) as process:
        while shown.count(b"\n\n") < 200:
            shown += process.stdout.read1()
        process.send_signal(signal.SIGKILL)
        shown += process.stdout.read()
    events = [json.loads(block.removeprefix(b"data: ")) for block in shown.split(b"\n\n")[:-1]]
    text = "".join(event["text"] for event in events if event["type"] == "text")
    store = Store(path)
    conversation = store.submit(tree.read, events[0]["conversation"]["id"]).result()
    store.close()
    user, answer = conversation.messages
    assert user.content == "Count."
    assert answer.content.startswith(text)
    assert answer.finish_reason == "partial"
    assert answer.completion_tokens == answer.content.count(" ") >= 199


def test_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "text").write_text("Not a database, but a text of some length.\n" * 100)
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE things (id INTEGER)")
    Store(tmp_path / "newer").close()
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 99")
    for name, what in (
        ("text", "give a file of conversations"),
        ("other", "SQLite file of another program"),
        ("newer", "written by a newer isoflop"),
        ("text/below", "give a file of conversations"),
    ):
        with pytest.raises(InputError, match=what):
            Store(tmp_path / name)
