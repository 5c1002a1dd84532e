"""A tiny random model with a byte-level tokenizer and a chat template, served by an engine that all tests share."""

import json

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
CAPACITY = 96


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
    options = {"slots": 3, "capacity": CAPACITY, "steps": 4, "chunk": 32, "most_waiting": 16}
    return Served.create("tiny", model_config, random_params(model_config, seed=1), tokenizer, **options)


@pytest.fixture(scope="session")
def registry(served):
    with Registry([served]) as registry:
        yield registry


@pytest.fixture(scope="session")
def client(registry):
    with TestClient(create_app(registry), raise_server_exceptions=False) as client:
        yield client
