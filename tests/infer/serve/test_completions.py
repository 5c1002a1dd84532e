"""/v1/completions: a stream is the whole in parts, and the text is that of the engine."""

import re

import numpy as np
import pytest

from infer import Sampling, generate, score

PATH = "/v1/completions"


def post(client, **body):
    response = client.post(PATH, json={"max_tokens": 8, "seed": 5, "prompt": "the time"} | body)
    assert response.status_code == 200, response.text
    return response.json()


def counts(answer):
    """Return the numbers of tokens, without how many of them an earlier request left in the prefix cache."""
    return {name: value for name, value in answer["usage"].items() if name != "prompt_tokens_details"}


def joined(chunks):
    """Return {index: (text, finish reason, logprobs)} of a stream's chunks."""
    found = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text, reason, entries = found.get(choice["index"], ("", None, {}))
            assert reason is None, "no chunk comes after the one with the finish reason"
            for name, more in (choice["logprobs"] or {}).items():
                entries = entries | {name: entries.get(name, []) + more if more is not None else None}
            found[choice["index"]] = text + choice["text"], choice["finish_reason"], entries
    return found


def random_body(random):
    def maybe(value, other=None):
        return value if random.random() < 0.3 else other

    return {
        "prompt": [["the time", "a ", "inner"][: random.integers(1, 3)], "on the", [5, 6, 7], [[9, 10], [1]]][
            random.integers(4)
        ],
        "max_tokens": int(random.integers(0, 24)),
        "temperature": float(random.choice([0, 0.7, 1.5])),
        "n": int(random.integers(1, 4)),
        "seed": int(random.integers(-(2**40), 2**40)),
        "stop": maybe(["e", " a", "\x15\x15"]),
        "top_k": maybe(40, -1),
        "top_p": maybe(0.9),
        "min_p": maybe(0.05),
        "repetition_penalty": maybe(1.3),
        "presence_penalty": maybe(0.5),
        "frequency_penalty": maybe(-0.5),
        "logit_bias": maybe({"3": 5, "9": -100}),
        "stop_token_ids": maybe([40, 41, 42]),
        "ignore_eos": maybe(True),
        "logprobs": maybe(2, maybe(0)),
        "return_token_ids": maybe(True),
        "echo": maybe(True),
        "user": "someone",
    }


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_is_the_whole(client, events, seed):
    body = random_body(np.random.default_rng(seed))
    if body["echo"]:
        body["logprobs"] = None
    whole = post(client, **body)
    chunks = events(client.post(PATH, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert counts(chunks[-1]) == counts(whole)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    streamed = joined(chunks)
    assert len(streamed) == len(whole["choices"])
    for choice in whole["choices"]:
        expected = choice["text"], choice["finish_reason"], choice["logprobs"] or {}
        text, reason, entries = streamed[choice["index"]]
        assert (text, reason) == expected[:2]
        assert {name: value for name, value in entries.items() if value} == {k: v for k, v in expected[2].items() if v}


def test_the_text_is_that_of_generate(client, served, tokenizer):
    prompt = tokenizer.encode("the time", special=True)
    sampling = Sampling(temperature=0.9, seed=7, stop_ids=served.end_ids)
    expected = generate(served.config, served.params, [prompt], sampling, max_new_tokens=12, tokenizer=tokenizer)
    choice = post(client, temperature=0.9, seed=7, max_tokens=12, logprobs=0, return_token_ids=True)["choices"][0]
    assert choice["text"] == expected.text[0]
    assert choice["token_ids"] == expected.tokens[0]
    assert choice["finish_reason"] == expected.finish_reason[0]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], expected.logprobs[0], atol=1e-5)


def test_choices_have_seeds_of_their_own_and_the_first_has_the_request_s(client):
    three = [choice["text"] for choice in post(client, n=3)["choices"]]
    assert three == [choice["text"] for choice in post(client, n=3)["choices"]]
    assert len(set(three)) == 3
    assert post(client)["choices"][0]["text"] == three[0]
    assert post(client, seed=6)["choices"][0]["text"] != three[0]
    unseeded = {post(client, seed=None)["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) > 1, "without a seed every request draws one"


def test_prompts_as_texts_and_as_ids_are_the_same(client, tokenizer):
    texts = ["the time", "a on"]
    ids = [tokenizer.encode(text, special=True) for text in texts]
    expected = [choice["text"] for choice in post(client, prompt=texts)["choices"]]
    assert [choice["text"] for choice in post(client, prompt=ids)["choices"]] == expected
    for text, one, wanted in zip(texts, ids, expected, strict=True):
        assert post(client, prompt=text)["choices"][0]["text"] == wanted
        assert post(client, prompt=one)["choices"][0]["text"] == wanted
    named = tokenizer.encode("<|im_start|>a", special=True)
    assert len(named) == 2, "names of special tokens in a prompt are these tokens"
    assert post(client, prompt="<|im_start|>a")["choices"] == post(client, prompt=named)["choices"]


def test_biases_ban_and_force(client, tokenizer):
    [the] = tokenizer.encode("the")
    forced = post(client, logit_bias={str(the): 100}, max_tokens=4)["choices"][0]
    assert forced["text"] == "the" * 4
    banned = post(client, logit_bias={str(the): -100}, logprobs=1, temperature=0)["choices"][0]
    assert "the" not in banned["logprobs"]["tokens"]


def test_the_text_ends_before_a_stop_string_or_an_end_token(client, tokenizer):
    [the] = tokenizer.encode("the")
    always = {str(the): 100}
    ended = post(client, logit_bias=always, stop=["het"])["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("t", "stop")
    ended = post(client, logit_bias=always, stop_token_ids=[the], logprobs=0)["choices"][0]
    assert (ended["text"], ended["finish_reason"], ended["logprobs"]["tokens"]) == ("", "stop", [])
    end = {str(tokenizer.eos_id): 100}
    assert post(client, logit_bias=end)["choices"][0]["finish_reason"] == "stop"
    assert post(client, logit_bias=end, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def test_bytes_of_tokens_are_those_of_the_text(client, served):
    choice = post(client, temperature=1.5, max_tokens=40, ignore_eos=True, logprobs=3, return_token_ids=True)[
        "choices"
    ][0]
    logprobs, text = choice["logprobs"], choice["text"]
    assert len(logprobs["tokens"]) == 40
    assert b"".join(served.token_bytes[token] for token in choice["token_ids"]).decode(errors="replace") == text
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith(("bytes:", "<|")) or text[offset:].startswith(token)
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    named = post(client, max_tokens=2, logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True)
    ids = named["choices"][0]["token_ids"]
    assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]


def test_a_text_does_not_end_before_min_tokens(client, tokenizer):
    likely = {str(tokenizer.eos_id): 50}
    assert post(client, logit_bias=likely)["usage"]["completion_tokens"] == 0
    ended = post(client, logit_bias=likely, min_tokens=3)
    assert ended["usage"]["completion_tokens"] == 3
    assert ended["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "meets"),
    [
        ({"response_format": {"type": "regex", "pattern": "(ab|cd){2}"}}, "(ab|cd){2}"),
        ({"guided_regex": "[a-f]{3}"}, "[a-f]{3}"),
        ({"structured_outputs": {"regex": "[a-f]{3}"}}, "[a-f]{3}"),
        ({"structured_outputs": {"choice": ["a.b", "(c) d|e-#~&"]}}, r"a\.b|\(c\) d\|e-#~&"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["a", 7]}}}}, '"a"|7'),
        ({"guided_json": '{"enum": [1, 2]}'}, "1|2"),
        ({"response_format": {"type": "json_object", "schema": {"type": "object", "maxProperties": 0}}}, r"\{\}"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 1}, r"\{\}?"),
    ],
)
def test_a_constrained_text_has_its_form(client, fields, meets):
    whole = post(client, **{"temperature": 1.5, "max_tokens": 20, "n": 2} | fields)
    for choice in whole["choices"]:
        assert re.fullmatch(meets, choice["text"])
        assert choice["finish_reason"] == ("length" if "max_tokens" in fields else "stop")


def test_default_number_of_tokens_and_none(client):
    assert post(client, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16
    nothing = post(client, max_tokens=0)
    assert nothing["choices"][0]["text"] == ""
    assert nothing["choices"][0]["finish_reason"] == "length"
    assert nothing["usage"]["completion_tokens"] == 0


def test_an_empty_prompt_begins_a_document(client, tokenizer):
    assert post(client, prompt="")["choices"] == post(client, prompt=[tokenizer.eos_id])["choices"]


def test_echo_scores_the_prompt(client, served, tokenizer):
    prompt = tokenizer.encode("the time")
    expected = score(served.config, served.params, [(prompt[:1], prompt[1:])], top_k=2)
    choice = post(client, prompt=[prompt], echo=True, logprobs=2, max_tokens=1)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith("the time")
    assert len(found["tokens"]) == len(prompt) + 1
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    np.testing.assert_allclose(found["token_logprobs"][1:-1], expected.tokens[0], atol=1e-5)
    for top, wanted in zip(found["top_logprobs"][1:-1], expected.top_logprobs[0], strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(wanted.values()), abs=1e-5)
    only = post(client, prompt=[prompt], echo=True, logprobs=2, max_tokens=0)["choices"][0]["logprobs"]
    assert only["token_logprobs"] == found["token_logprobs"][:-1]


@pytest.mark.parametrize("chat", [False, True])
def test_log_probabilities_of_a_prompt(client, served, chat):
    fields = {"max_tokens": 1, "prompt_logprobs": 2, "return_token_ids": True}
    if chat:
        messages = [{"role": "user", "content": "the"}]
        answer = client.post("/v1/chat/completions", json={"messages": messages} | fields).json()
        prompt, found = answer["prompt_token_ids"], answer["prompt_logprobs"]
    else:
        choice = post(client, **fields)["choices"][0]
        prompt, found = choice["prompt_token_ids"], choice["prompt_logprobs"]
    expected = score(served.config, served.params, [(prompt[:1], prompt[1:])], top_k=2)
    assert found[0] is None
    for token, entry, logprob, top in zip(
        prompt[1:], found[1:], expected.tokens[0], expected.top_logprobs[0], strict=True
    ):
        assert entry[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-5)
        assert {int(one) for one in entry} == {*top, token}
        ranks = {one["rank"] for one in entry.values()}
        assert ranks - {None} == {1, 2}
