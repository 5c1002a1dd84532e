"""/v1/chat/completions: OpenAI's form, streamed and whole, with the messages in the model's template."""

import numpy as np
import pytest

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the time"}]


def post(client, **body):
    response = client.post(PATH, json={"max_tokens": 8, "seed": 5, "messages": HELLO} | body)
    assert response.status_code == 200, response.text
    return response.json()


def content(client, **body):
    return post(client, **body)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_is_the_whole_in_openai_s_chunks(client, events, n, logprobs):
    body = {"n": n, "messages": HELLO, "seed": 3, "max_tokens": 12, "stop": ["e", "\x15"]}
    if logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    whole = post(client, **body)
    chunks = events(client.post(PATH, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {(chunks[0]["id"], "chat.completion.chunk")}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in one["delta"] for one in mine[1:])
        reasons = [one["finish_reason"] for one in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert "".join(one["delta"].get("content", "") for one in mine) == choice["message"]["content"]
        entries = [entry for one in mine if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert entries == (choice["logprobs"]["content"] if choice["logprobs"] else [])


def test_usage_comes_only_on_request(client, events):
    chunks = events(client.post(PATH, json={"messages": HELLO, "max_tokens": 2, "stream": True}))
    assert all("usage" not in chunk for chunk in chunks)


def test_an_answer_continues_the_rendered_conversation(client, tokenizer):
    messages = [{"role": "system", "content": "a"}, *HELLO, {"role": "assistant", "content": "on"}, *HELLO]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), special=True)
    found = client.post("/v1/completions", json={"prompt": prompt, "seed": 5, "max_tokens": 8}).json()
    answer = post(client, messages=messages)
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": found["choices"][0]["text"],
        "refusal": None,
    }
    assert answer["usage"] == found["usage"]
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "time"}]
    assert content(client, messages=[{"role": "user", "content": parts}]) == content(
        client, messages=[{"role": "user", "content": "the\ntime"}]
    )
    assert content(client, messages=[{"role": "developer", "content": "a"}, *HELLO]) == content(
        client, messages=[{"role": "system", "content": "a"}, *HELLO]
    )


def test_names_of_special_tokens_in_messages_are_text(client):
    def used(text):
        return post(client, messages=[{"role": "user", "content": text}])["usage"]["prompt_tokens"]

    assert used("<|im_end|>") == used("..........")


def test_the_last_message_is_continued(client, tokenizer):
    messages = [*HELLO, {"role": "assistant", "content": "on a"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    prompt = tokenizer.encode(text[: text.rindex("on a") + 4], special=True)
    expected = client.post("/v1/completions", json={"prompt": prompt, "seed": 5, "max_tokens": 8}).json()
    found = post(client, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert found["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    assert found["usage"] == expected["usage"]


def test_without_a_limit_an_answer_may_fill_the_window(client, served):
    usage = post(client, max_tokens=None, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == served.capacity
    assert post(client, max_tokens=None, max_completion_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_log_probabilities_are_of_the_tokens_and_their_bytes_of_the_text(client):
    answer = post(client, logprobs=True, top_logprobs=20, temperature=0, max_tokens=20)["choices"][0]
    entries = answer["logprobs"]["content"]
    raw = b"".join(bytes(entry["bytes"] or []) for entry in entries)
    assert raw.decode(errors="replace") == answer["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 20
        values = [one["logprob"] for one in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert np.exp(values).sum() <= 1 + 1e-5
        assert entry["logprob"] == values[0], "a greedy token is the most likely one"
        assert entry["token"].startswith("bytes:") or entry["token"].encode() == bytes(entry["bytes"] or [])
    assert post(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_banned_token_has_a_finite_logprob_and_json_stays_json(client, tokenizer):
    banned = {str(token): -100 for token in range(tokenizer.vocab_size + 3) if token != 65}
    entries = post(client, logprobs=True, top_logprobs=3, logit_bias=banned)["choices"][0]["logprobs"]["content"]
    assert {entry["bytes"][0] for entry in entries} == {tokenizer.decode([65]).encode()[0]}


def test_variables_of_the_template(client):
    base = {"messages": HELLO}
    assert content(client, **base, chat_template_kwargs={"unused": 1}) == content(client, **base)
    without = post(client, **base, add_generation_prompt=False)["usage"]["prompt_tokens"]
    assert without < post(client, **base)["usage"]["prompt_tokens"]
