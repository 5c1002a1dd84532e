"""A tiny random model with a byte-level tokenizer and a chat template, served by an engine that all tests share."""

import contextlib
import json
import threading
import time

import pytest
import tokenizers
from starlette.testclient import TestClient
from tokenizers import decoders, models, pre_tokenizers

from infer.serve.app import create_app
from infer.serve.served import Registry, Served
from model import ModelConfig
from model.tokenizer import load_tokenizer
from model.tokenizer.templates import CHATML

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("i", "n"), ("o", "n"), ("e", "r"))
CAPACITY, SLOTS, MOST_WAITING = 96, 3, 16


def write_tokenizer(folder):
    """Write a tokenizer of bytes and a few words, with ChatML as its template."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES), *SPECIAL]
    library = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(MERGES)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(SPECIAL))
    library.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def model_config(tokenizer):
    return ModelConfig(
        vocab_size=tokenizer.vocab_size + 3,  # more rows than tokens, as many models have
        d_model=16,
        num_layers=1,
        num_heads=2,
        max_seq_len=CAPACITY,
        eos_token_ids=tokenizer.eos_ids,
    )


@pytest.fixture(scope="session")
def served(tokenizer, model_config, random_params):
    """The model; its engine is started by `registry`."""
    options = {"slots": SLOTS, "capacity": CAPACITY, "steps": 4, "chunk": 32, "most_waiting": MOST_WAITING}
    return Served.create("tiny", model_config, random_params(model_config, seed=1), tokenizer, **options)


@pytest.fixture(scope="session")
def registry(served):
    with Registry([served]) as registry:
        yield registry


@pytest.fixture(scope="session")
def app(registry):
    return create_app(registry)


@pytest.fixture(scope="session")
def client(app):
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def paused(served, registry):
    """() → a context in which the engine does nothing, so that requests stay in the queue."""

    @contextlib.contextmanager
    def pause():
        begun, release = threading.Event(), threading.Event()
        served.service.call(lambda: (begun.set(), release.wait(30)))
        assert begun.wait(30)
        try:
            yield
        finally:
            release.set()

    return pause


@pytest.fixture
def idle(served):
    """() → wait until the engine has nothing left."""

    def wait(seconds=30.0):
        end = time.monotonic() + seconds
        while (load := served.service.load()).running or load.waiting:
            assert time.monotonic() < end, f"not idle: {load}"
            time.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def events():
    """Response → the JSON of its events, of which the last is [DONE]."""

    def read(response):
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *lines, last, end = response.text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        assert all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    return read
