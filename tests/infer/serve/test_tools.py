"""Calls of tools: read from text however it is cut, forced by a grammar, and written by templates."""

import dataclasses
import json

import numpy as np
import pytest
from starlette.testclient import TestClient

from infer.serve.app import create_app
from infer.serve.errors import ApiError
from infer.serve.served import Registry
from infer.serve.tools import Call, ToolParser, template_messages, tools_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Köln"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def call(name: str, **arguments) -> Call:
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def written(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


CASES = [
    ("no call at all, 1 < 2 <tool", ["no call at all, 1 < 2 <tool"]),
    (f"Let me see.\n\n{written('a', x=1)}", ["Let me see.", call("a", x=1)]),
    (f"{written('a', x=1)}\n{written('b')} \n", [call("a", x=1), call("b")]),
    (f"{written('a')} so.", [call("a"), " so."]),
    (written("a", x='</tool_call> "<tool_call>'), [call("a", x='</tool_call> "<tool_call>')]),
    ('<tool_call>{"name": "b"}', [call("b")]),
    ('<tool_call>{"name": "b", "argum', ['<tool_call>{"name": "b", "argum']),
    ("<tool_call>{'name': 'a'}</tool_call> x", ["<tool_call>{'name': 'a'}</tool_call> x"]),
    (f"{written('unknown')}{written('a')}", [written("unknown"), call("a")]),
    ('<tool_call>{"name": ["a"]}</tool_call>', ['<tool_call>{"name": ["a"]}</tool_call>']),
    ('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', [call("a", x=1)]),
    ('<tool_call>[1]</tool_call>"', ['<tool_call>[1]</tool_call>"']),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_calls_are_read_however_the_text_is_cut(text, expected):
    def read(pieces):
        parser, found = ToolParser({"a": {}, "b": {}}), []
        for piece in pieces:
            found += parser.push(piece)
        joined = []
        for part in [*found, *parser.finish()]:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        return joined

    assert read([text]) == read(text) == expected
    generator = np.random.default_rng(0)
    for _ in range(20):
        cuts = sorted(generator.integers(0, len(text) + 1, 4))
        assert read([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == expected


def test_text_before_a_call_never_shows_a_part_of_the_tag():
    parser = ToolParser({"a": {}})
    shown = [part for piece in f"x {written('a')}" for part in parser.push(piece)]
    assert shown == ["x", call("a")]
    one = ToolParser({"a": {}}, most_calls=1)
    assert one.push(written("a") * 2 + " more") + one.finish() == [call("a")]


def test_arguments_of_earlier_calls_are_as_the_template_reads_them():
    messages = [{"role": "assistant", "content": "", "tool_calls": [call("a", x="ü").as_dict()]}]
    for template, shown in ((TEMPLATE, {"x": "ü"}), ("{{ call.arguments }}", '{"x": "ü"}')):
        (message,) = template_messages(messages, template)
        assert message["tool_calls"][0]["function"]["arguments"] == shown
    for wrong in ("x", [3], [{"function": {"name": "a", "arguments": "{"}}]):
        with pytest.raises(ApiError, match="tool_calls"):
            template_messages([{"role": "assistant", "tool_calls": wrong}], TEMPLATE)


@pytest.fixture(scope="module")
def with_tools(served):
    return dataclasses.replace(served, tokenizer=served.tokenizer.with_chat_template(TEMPLATE))


def test_wrong_tools_are_refused(with_tools, tokenizer):
    def refused(tools=(WEATHER,), choice=None, tokenizer=with_tools.tokenizer):
        with pytest.raises(ApiError) as error:
            tools_of(tools, choice, None, tokenizer)
        return error.value.body.param

    assert refused(tokenizer=tokenizer) == "tools"
    assert refused(tokenizer=tokenizer.with_chat_template(TEMPLATE + "[TOOL_CALLS]")) == "tools"
    assert refused([{"type": "function"}]) == "tools[0].function"
    assert refused([{"type": "web_search"}]) == "tools[0].type"
    assert refused([WEATHER, WEATHER]) == "tools[1].function.name"
    assert refused([{"function": {"name": "no spaces"}}]) == "tools[0].function.name"
    assert refused([{"function": {"name": "a", "parameters": 3}}]) == "tools[0].function.parameters"
    assert refused(choice="some") == refused(choice={"function": {"name": "other"}}) == "tool_choice"
    assert refused([], "required") == "tool_choice"
    assert tools_of([WEATHER], "none", None, tokenizer) is None
    assert tools_of([WEATHER], "auto", False, with_tools.tokenizer).most_calls == 1


def test_a_random_model_calls_what_it_has_to(served, registry, events):
    short = served.tokenizer.with_chat_template("{#<tool_call>#}{{ messages[-1].content }}")
    client = TestClient(create_app(Registry([dataclasses.replace(served, tokenizer=short)])))
    schema = {"type": "object", "properties": {"c": {"enum": [1, 2]}}, "required": ["c"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "w", "parameters": schema}}, TIME]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools, "temperature": 1.5, "seed": 1}
    body["tool_choice"] = {"type": "function", "function": {"name": "w"}}
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    (made,) = answer["message"]["tool_calls"]
    assert made["type"] == "function"
    assert made["function"]["name"] == "w"
    assert json.loads(made["function"]["arguments"])["c"] in (1, 2)
    chunks = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    deltas = [one["delta"] for chunk in chunks for one in chunk["choices"]]
    streamed = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert [one["function"] for (one,) in streamed] == [made["function"]]
    assert streamed[0][0]["index"] == 0
    history = [*body["messages"], answer["message"], {"role": "tool", "tool_call_id": made["id"], "content": "sun"}]
    after = client.post("/v1/chat/completions", json=body | {"messages": history, "tool_choice": "auto"})
    assert after.status_code == 200, after.text


def test_the_template_that_is_given_by_name(tokenizer):
    """Its calls are those that are read, and a system message is written once, above the tools."""
    from model.tokenizer.templates import read_template

    named = tokenizer.with_chat_template(read_template("hermes"))
    assert tools_of([WEATHER, TIME], None, None, named) is not None
    calls = [call("get_weather", city="Köln"), call("time")]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the time"},
        {"role": "assistant", "content": "", "tool_calls": [one.as_dict() for one in calls]},
        {"role": "tool", "content": "sun"},
    ]
    turns = template_messages(messages, named.chat_template)
    text = named.apply_chat_template(turns, add_generation_prompt=True, tools=[WEATHER, TIME])
    assert text.count("Be brief.") == text.count("<|im_start|>system") == 1
    assert json.dumps(WEATHER, ensure_ascii=False) in text
    answer = text.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
    assert pushed(answer, {"get_weather": {}, "time": {}}) == calls
    assert text.endswith("<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    plain = named.apply_chat_template(messages[:2], add_generation_prompt=True)
    assert plain == tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)


def pushed(text, names):
    """What a parser makes of a whole text."""
    parser = ToolParser(names)
    return parser.push(text) + parser.finish()
