"""Chat completions as clients call them."""

import json
import re

import pytest

ASK = [{"role": "user", "content": "Name three colours."}]
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"max_tokens": 24, "ignore_eos": True}


def text_of(answer):
    assert answer.status == 200, answer.text
    return answer.body["choices"][0]["message"]["content"]


def test_an_answer_has_openais_form(server, client, model):
    answer = client.chat.completions.create(model=model, messages=CAPITAL, max_tokens=24, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.created > 1_700_000_000
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert "Paris" in choice.message.content
    assert answer.usage.prompt_tokens > 10
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_part_of_text_is_a_string(server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name three colours."}]}]
    given = server.chat(messages=parts)
    assert text_of(given) == text_of(server.chat(messages=ASK))
    assert given.body["usage"]["prompt_tokens"] == server.chat(messages=ASK).body["usage"]["prompt_tokens"]


def test_several_parts_are_one_message(server):
    parts = [{"type": "text", "text": "Name three"}, {"type": "text", "text": " colours."}]
    assert text_of(server.chat(messages=[{"role": "user", "content": parts}]))


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "nothing"}, {}, 3])
def test_parts_that_are_no_text_are_refused(server, part):
    assert server.chat(messages=[{"role": "user", "content": [part]}]).status in (400, 500)


def test_a_system_message_and_turns_reach_the_prompt(server):
    system = {"role": "system", "content": "Answer in French."}
    turns = [*ASK, {"role": "assistant", "content": "Red, green, blue."}, {"role": "user", "content": "Another one?"}]
    lengths = [server.chat(messages=one).body["usage"]["prompt_tokens"] for one in (ASK, turns, [system, *turns])]
    assert lengths[0] < lengths[1]
    assert lengths[2] != lengths[1]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens(server, name):
    answer = server.post("/v1/chat/completions", messages=ASK, **{name: 5})
    assert answer.body["usage"]["completion_tokens"] == 5
    assert answer.body["choices"][0]["finish_reason"] == "length"


def test_a_limit_beyond_the_context_ends_at_the_context(server):
    answer = server.chat("word " * 900, max_tokens=100_000, ignore_eos=True)
    assert answer.body["choices"][0]["finish_reason"] == "length"
    assert answer.body["usage"]["total_tokens"] <= 1024


def test_without_a_limit_an_answer_ends_by_itself(server):
    answer = server.post("/v1/chat/completions", messages=CAPITAL, temperature=0)
    assert answer.body["choices"][0]["finish_reason"] == "stop"


def test_several_choices(server, client, model):
    answer = client.chat.completions.create(model=model, messages=ASK, max_tokens=8, n=3, temperature=1, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens <= 24


def test_a_seed_repeats_the_text(server):
    first, second = (server.chat(messages=ASK, temperature=1.5, seed=11, **LONG) for _ in range(2))
    assert text_of(first) == text_of(second)


def test_other_seeds_give_other_texts(server):
    texts = {text_of(server.chat(messages=ASK, temperature=1.5, seed=seed, **LONG)) for seed in range(3)}
    assert len(texts) == 3


def test_a_seed_repeats_all_of_its_choices(server):
    def texts():
        answer = server.chat(messages=ASK, temperature=1.5, seed=5, n=2, max_tokens=12)
        return [choice["message"]["content"] for choice in answer.body["choices"]]

    assert texts() == texts()


def test_temperature_zero_is_one_text(server):
    assert text_of(server.chat(messages=ASK, **LONG)) == text_of(server.chat(messages=ASK, seed=9, **LONG))


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-4}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_filters_are_greedy(server, fields):
    expected = text_of(server.chat(messages=CAPITAL))
    assert text_of(server.chat(messages=CAPITAL, temperature=1.5, seed=3, **fields)) == expected


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_text_before_it(server, as_list):
    whole = text_of(server.chat(messages=CAPITAL, max_tokens=24))
    answer = server.chat(messages=CAPITAL, max_tokens=24, stop=["~~~", "Paris"] if as_list else "Paris")
    assert text_of(answer) == whole[: whole.index("Paris")]
    assert answer.body["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_across_tokens(server):
    whole = text_of(server.chat(messages=CAPITAL, max_tokens=24))
    start = whole.index("capital") + 3
    stop = whole[start : start + 9]
    assert text_of(server.chat(messages=CAPITAL, max_tokens=24, stop=stop)) == whole[: whole.index(stop)]


def test_a_bias_bans_a_token(server):
    paris = server.post("/tokenize", content=" Paris", prompt=" Paris", add_special_tokens=False).body["tokens"]
    answer = server.chat(messages=CAPITAL, max_tokens=24, logit_bias={str(token): -100 for token in paris})
    assert " Paris" not in text_of(answer)


def test_a_bias_forces_a_token(server):
    (token, *_) = server.post("/tokenize", content=" green", prompt=" green", add_special_tokens=False).body["tokens"]
    assert text_of(server.chat(messages=CAPITAL, max_tokens=3, logit_bias={str(token): 100})) == " green" * 3


def test_log_probabilities(server, client, model):
    answer = client.chat.completions.create(
        model=model, messages=CAPITAL, max_tokens=6, temperature=0, logprobs=True, top_logprobs=4
    )
    (choice,) = answer.choices
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert "".join(one.token for one in content) == choice.message.content
    for one in content:
        assert one.logprob <= 0
        assert bytes(one.bytes).decode(errors="replace") == one.token
        assert len(one.top_logprobs) == 4
        values = [top.logprob for top in one.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert one.top_logprobs[0].token == one.token
        assert one.logprob == pytest.approx(values[0], abs=1e-4)


def test_log_probabilities_without_alternatives(server):
    answer = server.chat(messages=CAPITAL, logprobs=True)
    assert all(not one["top_logprobs"] for one in answer.body["choices"][0]["logprobs"]["content"])


def test_without_request_there_are_no_log_probabilities(server):
    assert not server.chat(messages=CAPITAL).body["choices"][0].get("logprobs")


def test_log_probabilities_of_banned_tokens_are_json(server):
    tokens = server.post("/tokenize", content="The", prompt="The", add_special_tokens=False).body["tokens"]
    bias = {str(token): -100 for token in tokens}
    answer = server.chat(messages=CAPITAL, logprobs=True, top_logprobs=20, logit_bias=bias)
    assert answer.status == 200  # the text was parsed without NaN and infinities


@pytest.mark.parametrize("count", [-1, 21, "many"])
def test_top_logprobs_out_of_range_are_refused(ours, count):
    assert ours.chat(logprobs=True, top_logprobs=count).error["param"] == "top_logprobs"


def test_top_logprobs_need_logprobs(server):
    assert server.chat(top_logprobs=3).status == 400


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "string",
        [],
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "user", "content": 123}],
        [{"role": "stranger", "content": "Hello"}],
        [*ASK, {}],
    ],
    ids=str,
)
def test_messages_that_are_none_are_refused(ours, messages):
    answer = ours.chat(messages=messages)
    assert answer.status == 400
    assert answer.error["param"].startswith("messages")


def test_missing_messages_are_refused(server):
    answer = server.post("/v1/chat/completions", max_tokens=4)
    assert answer.status == 400
    assert "messages" in answer.error["message"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_roles_of_instructions(server, role):
    assert text_of(server.chat(messages=[{"role": role, "content": "Be short."}, *ASK]))


def test_an_empty_message_is_a_message(server):
    assert server.chat(messages=[{"role": "user", "content": ""}]).status == 200


def test_text_of_any_script(server):
    assert text_of(server.chat("Répète: 日本語 👩‍👩‍👧 \u0000 ‮ <|im_end|>"))


def test_the_last_message_is_continued(server):
    begun = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    answer = server.chat(messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert re.match(r"\s*Paris", text_of(answer))


def test_a_continued_message_and_a_new_one_exclude_each_other(server):
    begun = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    assert server.chat(messages=begun, continue_final_message=True, add_generation_prompt=True).status == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_p", 2),
        ("n", 0),
        ("n", 10**9),
        ("max_tokens", -3),
        ("max_tokens", 2.5),
        ("max_tokens", 10**30),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("stop", 7),
        ("seed", "x"),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", [1]),
        ("top_k", -7),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("stream", "yes"),
        ("stream_options", 4),
        ("response_format", "json"),
        ("tools", "hammer"),
        ("model", 5),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(ours, name, value):
    answer = ours.chat(**{name: value})
    assert answer.status == 400
    assert answer.error["param"].split(".")[0].split("[")[0] == name
    assert name in answer.error["message"]


def test_known_fields_are_accepted_without_a_warning(ours):
    fields = {"user": "me", "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    answer = ours.chat(frequency_penalty=0.5, stop=None, parallel_tool_calls=True, **fields)
    assert answer.status == 200
    assert "x-isoflop-ignored" not in answer.headers


def test_unknown_fields_are_ignored_with_a_warning(ours):
    answer = ours.chat(flavour="sweet")
    assert answer.status == 200
    assert answer.headers["x-isoflop-ignored"] == "flavour"


@pytest.mark.parametrize("name", ["functions", "prediction", "audio", "best_of", "logits_processors"])
def test_known_fields_without_support_are_refused_by_name(ours, name):
    answer = ours.chat(**{name: 3 if name == "best_of" else {"x": 1}})
    assert answer.status == 400
    assert answer.error["param"] == name


def test_an_unknown_model_is_named(ours):
    answer = ours.chat(model="gpt-4")
    assert answer.status == 404
    assert (answer.error["param"], answer.error["code"]) == ("model", "model_not_found")
    assert "gpt-4" in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_before_a_stream_begins(server, stream):
    answer = server.chat("word " * 3000, stream=stream)
    assert answer.status == 400
    assert re.search(r"\d{4}", answer.error["message"].replace(",", "")), "numbers of tokens"


def test_the_code_of_a_prompt_beyond_the_context(ours):
    assert ours.chat("word " * 3000).error["code"] == "context_length_exceeded"


def test_stop_token_ids_end_the_text(ours):
    (dot,) = ours.post("/tokenize", prompt=".", add_special_tokens=False).body["tokens"]
    answer = ours.chat(messages=CAPITAL, max_tokens=24, stop_token_ids=[dot])
    assert text_of(answer).endswith("Paris")
    assert answer.body["choices"][0]["finish_reason"] == "stop"


def test_ignore_eos_runs_to_the_limit(server):
    answer = server.chat(messages=CAPITAL, max_tokens=40, ignore_eos=True)
    assert answer.body["usage"]["completion_tokens"] == 40
    assert answer.body["choices"][0]["finish_reason"] == "length"


def test_min_tokens_keep_the_end_away(ours):
    short = ours.chat(messages=CAPITAL, max_tokens=60).body["usage"]["completion_tokens"]
    assert short < 20
    assert ours.chat(messages=CAPITAL, max_tokens=60, min_tokens=30).body["usage"]["completion_tokens"] >= 30


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "number": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "number"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"type": "json_schema", "json_schema": {"schema": {"const": "42"}}}, r'"42"'),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "foooooo"}}}, r'"foooooo"'),
        ({"type": "json_object", "schema": {"const": "42"}}, r'"42"'),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, r"\{.*\}"),
        ({"type": "text"}, r".*"),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_response_format_is_kept(server, wanted, pattern, temperature):
    answer = server.chat(messages=CAPITAL, max_tokens=64, temperature=temperature, seed=1, response_format=wanted)
    content = text_of(answer)
    assert re.fullmatch(pattern, content, re.DOTALL), content
    if wanted["type"] != "text":
        assert answer.body["choices"][0]["finish_reason"] == "stop"
    if "strict" in str(wanted):
        value = json.loads(content)
        assert value["city"] in ("Paris", "Rome")
        assert 0 <= value["number"] <= 9


def test_a_json_object_is_one(server):
    answer = server.chat("Describe Paris as JSON.", max_tokens=200, response_format={"type": "json_object"})
    if answer.body["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text_of(answer)), dict)
    else:
        assert text_of(answer).startswith("{")


def test_a_streamed_response_format_is_the_same(server):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    fields = {"messages": CAPITAL, "max_tokens": 64, "temperature": 0, "response_format": wanted}
    events = server.events("/v1/chat/completions", **fields)[:-1]
    streamed = "".join(one["choices"][0]["delta"].get("content") or "" for one in events if one["choices"])
    assert streamed == text_of(server.chat(**fields))


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "sound"},
        {"type": "json_object", "schema": 123},
        {"type": "json_object", "schema": {"type": 123}},
        {"type": "json_object", "schema": {"type": "hiccup"}},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "hiccup"}}},
    ],
    ids=str,
)
def test_response_formats_that_are_none_are_refused(server, wanted):
    answer = server.chat(response_format=wanted)
    assert answer.status == 400
    assert answer.error


def test_a_client_that_leaves_frees_its_slot(ours):
    import socket

    body = json.dumps({"messages": ASK, "max_tokens": 900, "ignore_eos": True, "stream": False}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", ours.port)) as connection:
        connection.sendall(head + body)
        for _ in range(200):
            if ours.metric("num_requests_running"):
                break
        else:
            raise AssertionError("the request never ran")
    assert ours.wait_until_idle() < 5
