"""Calls of tools: from the request to the answer of the tool."""

import json

import pytest

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
ONE = {"parallel_tool_calls": False}  # a small model does not know when to stop calling
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def call_of(answer):
    assert answer.status == 200, answer.text
    (choice,) = answer.body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"]
    return call


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_call_that_is_required_is_made(tooled, choice):
    call = call_of(tooled.chat(messages=ASK, tools=TOOLS, tool_choice=choice, max_tokens=80, **ONE))
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def test_no_call_where_none_is_wanted(tooled):
    answer = tooled.chat(messages=ASK, tools=TOOLS, tool_choice="none")
    assert answer.body["choices"][0]["message"]["content"]
    assert not answer.body["choices"][0]["message"].get("tool_calls")


def test_an_answer_or_a_call(tooled):
    answer = tooled.chat(messages=ASK, tools=TOOLS, max_tokens=80)
    message = answer.body["choices"][0]["message"]
    assert message.get("content") or message.get("tool_calls")


def test_the_result_of_a_tool_is_read(tooled):
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    result = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"weather": "sunny"}'},
    ]
    answer = tooled.chat(messages=[*ASK, *result], tools=TOOLS)
    assert answer.status == 200, answer.text
    assert answer.body["choices"][0]["message"]["content"]


def test_a_streamed_call_is_the_whole_one(tooled):
    fields = {"messages": ASK, "tools": TOOLS, "tool_choice": "required", "max_tokens": 80, "temperature": 0} | ONE
    call = call_of(tooled.post("/v1/chat/completions", **fields))
    events = tooled.events("/v1/chat/completions", **fields)[:-1]
    parts = [part for e in events for c in e["choices"] for part in c["delta"].get("tool_calls") or []]
    assert {part["index"] for part in parts} == {0}
    assert parts[0]["function"]["name"] == "get_weather"
    assert "".join(part["function"].get("arguments") or "" for part in parts) == call["function"]["arguments"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_openais_client_makes_the_round(tooled):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    asked = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=80, temperature=0, **ONE
    )
    message = asked.choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*ASK, message, result]
    told = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert told.choices[0].message.content


@pytest.mark.parametrize("tools", [[{}], [{"type": "function"}], [{"type": "function", "function": {}}], [5]], ids=str)
def test_tools_that_are_none_are_refused(tooled, tools):
    assert tooled.chat(tools=tools, tool_choice="required").status in (400, 500)


def test_a_choice_of_a_tool_that_is_none_is_refused(ours_with_tools):
    choice = {"type": "function", "function": {"name": "get_time"}}
    assert ours_with_tools.chat(tools=TOOLS, tool_choice=choice).error["param"] == "tool_choice"
    assert ours_with_tools.chat(tools=TOOLS, tool_choice="maybe").error["param"] == "tool_choice"


def test_a_template_without_tools_refuses_them_by_name(ours):
    error = ours.chat(messages=ASK, tools=TOOLS).error
    assert error["param"] == "tools"
    assert "--chat-template hermes" in error["message"]
