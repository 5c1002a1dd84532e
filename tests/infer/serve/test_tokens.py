"""/tokenize and /detokenize."""

import pytest

TEXT = "the thin <|im_end|> on  日本"


def post(client, path, **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_tokens_are_those_of_a_completion(client, tokenizer, served):
    ids = tokenizer.encode(TEXT, special=True)
    answer = post(client, "/tokenize", prompt=TEXT)
    assert answer == {"count": len(ids), "max_model_len": served.capacity, "tokens": ids, "token_strs": None}
    completion = client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1, "return_token_ids": True}).json()
    assert completion["choices"][0]["prompt_token_ids"] == ids
    assert post(client, "/tokenize", content=TEXT)["tokens"] == ids
    assert post(client, "/tokenize", content=TEXT, prompt=TEXT)["tokens"] == ids
    assert post(client, "/tokenize", prompt="")["tokens"] == []


def test_the_names_of_tokens(client, tokenizer):
    answer = post(client, "/tokenize", prompt="the<|im_end|>", return_token_strs=True)
    assert answer["token_strs"] == [tokenizer.token_name(token) for token in answer["tokens"]]
    assert answer["token_strs"][-1] == "<|im_end|>"


def test_a_conversation_is_tokenized_as_it_is_answered(client):
    messages = [{"role": "user", "content": "the"}]
    for more in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"x": 1}}):
        chat = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
        expected = client.post("/v1/chat/completions", json=chat | more).json()["prompt_token_ids"]
        assert post(client, "/tokenize", messages=messages, **more)["tokens"] == expected
    whole = post(client, "/tokenize", messages=messages)["tokens"]
    open_turn = post(client, "/tokenize", messages=messages, continue_final_message=True)["tokens"]
    assert whole[: len(open_turn)] == open_turn
    assert len(open_turn) < len(whole)


def test_text_comes_back(client, tokenizer):
    text = "the thin on  日本"
    answer = post(client, "/detokenize", tokens=post(client, "/tokenize", prompt=text)["tokens"])
    assert answer == {"prompt": text, "content": text}
    assert post(client, "/detokenize", tokens=[])["prompt"] == ""


def test_what_the_tokenizer_puts_around_texts(client, tokenizer):
    info = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": tokenizer.chat_template}
    assert client.get("/tokenizer_info").json() == client.get("/tokenizer_info?model=tiny").json() == info
    assert client.get("/tokenizer_info?model=x").status_code == 404


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "content": "b"}, "content"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True, "add_special": False}, "add_special"),
        ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(client, path, fields, param):
    response = client.post(path, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
