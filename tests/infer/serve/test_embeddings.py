"""/v1/embeddings: the mean of the final hidden states, whatever else is read."""

import base64

import jax.numpy as jnp
import numpy as np
import pytest

import infer.reader
from infer.reader import Reader
from infer.scoring import score
from infer.serve.served import Registry, Served
from model import forward
from model.transformer import sentence_embedding

PATH = "/v1/embeddings"


def embed(client, given, **fields):
    response = client.post(PATH, json={"input": given} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def mean_of(config, params, ids):
    # A decoder's states do not depend on what comes after: all lengths share one program.
    row = np.zeros((1, 96 if config.stack == "decoder" else len(ids)), np.int32)
    row[0, : len(ids)] = ids
    hidden = forward(config, params, jnp.array(row), outputs=("final_hidden",)).final_hidden[0, : len(ids)]
    mean = np.asarray(hidden, np.float64).mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 96])
def test_an_embedding_is_the_mean_of_the_final_hidden_states(client, served, length):
    ids = np.random.default_rng(length).integers(0, served.config.vocab_size, length).tolist()
    answer = embed(client, ids)
    [one] = answer["data"]
    np.testing.assert_allclose(one["embedding"], mean_of(served.config, served.params, ids), atol=1e-5)
    assert answer["usage"] == {"prompt_tokens": length, "total_tokens": length}


def test_texts_ids_and_lists_of_them_are_the_same(client, tokenizer):
    texts = ["the time", "a on" * 12]
    ids = [tokenizer.encode(text, special=True) for text in texts]
    together = embed(client, texts)["data"]
    assert [one["index"] for one in together] == [0, 1]
    for given, expected in (
        ([texts[0]], together[:1]),
        (texts[0], together[:1]),
        (ids[0], together[:1]),
        (ids, together),
    ):
        assert embed(client, given)["data"] == expected


def test_base64_is_of_the_same_numbers(client):
    [floats], [packed] = (embed(client, "the", encoding_format=form)["data"] for form in ("float", "base64"))
    unpacked = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
    np.testing.assert_array_equal(unpacked, np.array(floats["embedding"], np.float32))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": []}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [[1], [10**6]]}, "input[1]"),
        ({"input": "x" * 97}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ({}, "input"),
    ],
)
def test_what_is_wrong_is_named(client, fields, param):
    response = client.post(PATH, json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_dimensions_of_the_model_are_no_wish(client, served):
    assert len(embed(client, "a", dimensions=served.config.d_model, user="x")["data"][0]["embedding"]) == 16


def test_an_engine_that_stopped_is_a_503(client, served):
    from starlette.testclient import TestClient

    from infer.serve.app import create_app

    options = {"config": served.config, "params": served.params, "capacity": 96, "tokenizer": served.tokenizer}
    stopped = Served.create("stopped", served.config, served.params, served.tokenizer, slots=1, capacity=96)
    registry = Registry([Served(name="stopped", service=stopped.service, **options)])
    with registry:
        pass
    with TestClient(create_app(registry)) as other:
        assert other.post(PATH, json={"input": "a"}).status_code == 503


@pytest.mark.parametrize("stack", ["encoder", "encoder-decoder"])
def test_encoders_embed_too(model_config, random_params, stack):
    head = {"head": "masked-language-model"} if stack == "encoder" else {"num_encoder_layers": 1}
    config = model_config.replace(stack=stack, eos_token_ids=(), **head)
    params = random_params(config, seed=2)
    ids = list(range(1, 40))
    found = Reader(config, params).embedding(ids)
    if stack == "encoder":
        expected = sentence_embedding(config, params, jnp.array([ids]))[0]
    else:
        from model.transformer import encode

        hidden = np.asarray(encode(config, params, jnp.array([ids])))[0].mean(0)
        expected = hidden / np.linalg.norm(hidden)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_log_probabilities_are_those_of_scoring(served):
    reader = Reader(served.config, served.params, 96)
    ids = np.random.default_rng(0).integers(0, served.config.vocab_size, 90).tolist()
    expected = score(served.config, served.params, [(ids[:1], ids[1:])], top_k=3)
    for count in (0, 1, 3):
        first, *others = reader.logprobs(ids, count)
        assert first is None
        np.testing.assert_allclose([one[0] for one in others], expected.tokens[0], atol=1e-5)
        assert all(len(one[1]) == count for one in others)
    for (_, found), wanted in zip(others, expected.top_logprobs[0], strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    assert reader.logprobs(ids[:1], 1) == [None]


def test_texts_of_any_length_share_a_few_programs(served):
    reader = Reader(served.config, served.params, 96)

    def read(lengths):
        for length in lengths:
            reader.embedding([7] * length)
            reader.logprobs([7] * length, 1)
        return infer.reader._sum_block._cache_size(), infer.reader._score_block._cache_size()

    assert read((10, 40, 96)) == read(range(1, 97, 9))
