"""`isoflop chat` answers what is typed, obeys its commands, and outlives Ctrl-C."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.commands.chat import _CONTROL

OPTIONS = {"--capacity": 256, "--max-tokens": 6, "--temperature": 0}


@pytest.fixture
def chat(isoflop, llama_folder, monkeypatch):
    """(lines, options) → what was printed."""

    def talk(*lines, **options):
        given = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code, text, error = isoflop("chat", llama_folder, *itertools.chain(*given.items()))
        assert code == 0, error
        return text

    return talk


def test_turns_and_commands(chat, tmp_path):
    json_file, markdown = tmp_path / "chat.json", tmp_path / "chat.md"
    text = chat(
        "/system Be brief.",
        "the people",
        "two\\",
        "lines",
        "/undo",
        "another",
        f"/save {json_file}",
        "/undo",
        "/retry",
        f"/save {json_file}",
        f"/save {markdown}",
        "/system none",
        "/unknown",
        "/undo",
        "/undo",
        "/retry",
        "/save",
        "/help",
        "/exit",
        "never read",
    )
    assert "(system prompt: Be brief.)\n> the people\n" in text
    assert "> two\n… lines\n" in text
    assert "(the last message is now: the people)" in text
    assert "(the conversation is empty)" in text
    for told in ("there is no command /unknown", "nothing to undo", "nothing to answer again", "give a file"):
        assert told in text
    assert "never read" not in text
    messages = json.loads(json_file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "the people"
    said = text.split("> the people\n")[1].split("\n> two")[0]
    assert messages[2]["content"].translate(_CONTROL).strip() in said
    assert markdown.read_text().startswith(
        "# Conversation\n\n## System\n\nBe brief.\n\n## User\n\nthe people\n\n## Ass"
    )
    assert "exists; give another name" in chat("a", f"/save {json_file}")


def test_seeds_repeat_a_conversation(chat):
    first, again, other = (chat("a", "b", temperature=1.5, top_p=1, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_window_drops_the_oldest_turns(chat):
    text = chat(*["the people of the time"] * 12, capacity=96)
    assert "outside of the window; this answer was written without)" in text
    assert "leave no room for an answer in the window" in chat("x" * 400, capacity=96)


def test_what_a_model_writes_does_not_command_the_terminal():
    assert "a\x1b[2J\x07\x9b\r\n\tb".translate(_CONTROL) == "a␛[2J␇\N{REPLACEMENT CHARACTER}␍\n\tb"


def test_wrong_calls_are_explained(isoflop, tmp_path):
    code, _, error = isoflop("chat", tmp_path)
    assert code == 2
    assert "is not a model" in error


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_the_extra_is_named_where_it_is_missing(isoflop, monkeypatch, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = isoflop(command, "model.gguf")
    assert code == 2
    assert error.strip().endswith("needs starlette, uvicorn, msgspec; install the extra: pip install 'isoflop[serve]'")


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(llama_folder, tmp_path):
    options = ["--capacity", "4096", "--max-tokens", "0", "--temperature", "1.5", "--seed", "1"]
    command = [sys.executable, "-m", "experiments.cli", "chat", str(llama_folder), *options]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "XDG_DATA_HOME": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env, "cwd": root}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write("the people\n")
        process.stdin.flush()
        assert process.stdout.readline() == "> the people\n"
        process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        rest, _ = process.communicate("/undo\n/exit\n", timeout=120)
    assert process.returncode == 0
    assert "(stopped)" in rest
    assert "(the conversation is empty)" in rest
