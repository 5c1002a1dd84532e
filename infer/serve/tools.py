"""Tools: what the chat template is given, calls in the model's text, and grammars that make it call.

The one form that is read is that of Hermes, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, which the templates
of Qwen, Hermes and many others write.
"""

import dataclasses
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import anyio.to_thread

from infer.grammar import GrammarConstraint, Grammars, json_rule
from infer.serve.errors import ApiError
from infer.serve.served import Served
from model.errors import InputError
from model.tokenizer import Tokenizer

BEGIN, END = "<tool_call>", "</tool_call>"
_OTHER_FORMS = {
    "[TOOL_CALLS]": "Mistral's [TOOL_CALLS]",
    "<|python_tag|>": "Llama's <|python_tag|>",
    "<function=": "the XML of <function=…>",
    "<arg_key>": "the XML of <arg_key>",
    "<｜tool▁calls▁begin｜>": "DeepSeek's <｜tool▁calls▁begin｜>",
    "<|tool_call|>": "Granite's <|tool_call|>",
    "functools[": "Phi's functools[…]",
}
_MOST_CALLS = 8  # in one answer that has to call
_NAME = re.compile(r"[\w.:-]{1,128}")
_AS_JSON = re.compile(r"arguments\s*\|\s*tojson")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool; arguments: JSON."""

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{secrets.token_hex(12)}", compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the call in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request. given: as the template reads them. parameters: schema of each tool's arguments.

    choice: "auto" lets the model decide, "required" makes it call. most_calls: of one answer; None: any number.
    """

    given: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Mapping[str, Any]]
    choice: Literal["auto", "required"] = "auto"
    most_calls: int | None = None

    def parser(self) -> "ToolParser":
        """Return a parser of one answer."""
        return ToolParser(self.parameters, self.most_calls)

    def constraint(self, grammars: Grammars) -> GrammarConstraint:
        """Return the constraint of an answer that has to call. Raises InputError for schemas that are refused."""
        return grammars.lark(self._grammar(), "the schema of the tools")

    def _grammar(self) -> str:
        more = min(self.most_calls or _MOST_CALLS, _MOST_CALLS) - 1
        again = f' ("\\n" one){{0,{more}}}' if more else ""
        numbers = range(len(self.parameters))
        rules = [f"start: one{again}", f'one: "{BEGIN}\\n" call "\\n{END}"']
        rules.append("call: " + " | ".join(f"call_{number}" for number in numbers))
        for number, (name, schema) in enumerate(self.parameters.items()):
            start = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
            rules.append(f'call_{number}: {start} args_{number} "}}"')
            rules.append(f"args_{number}: {json_rule({'type': 'object', **schema})}")
        return "\n".join(rules)


def tools_of(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
    tokenizer: Tokenizer,
) -> Tools | None:
    """Return the tools of a request; None if there are none or the model must not call any.

    choice: OpenAI's tool_choice. parallel: False allows one call in an answer. Raises ApiError for fields that are
    wrong, and for a chat template that writes no tools or writes them in another form.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    parameters = {}
    for index, tool in enumerate(tools):
        name, schema = _function(tool, f"tools[{index}]")
        if name in parameters:
            raise ApiError(400, f"two tools have the name {name!r}", param=f"tools[{index}].function.name")
        parameters[name] = schema
    kind, wanted = _choice(choice, parameters)
    if kind == "none":
        return None
    _check_template(tokenizer)
    most = 1 if parallel is False or wanted is not None else None
    allowed = parameters if wanted is None else {wanted: parameters[wanted]}
    return Tools(tools, allowed, "auto" if kind == "auto" else "required", most)


async def calls_only(tools: Tools, served: Served, other: object) -> Callable[[], GrammarConstraint]:
    """Return what makes the constraint of each answer that has to call; other: that of response_format.

    Raises ApiError if there is another one, or for a schema that cannot be enforced.
    """
    if other is not None:
        raise ApiError(
            400, "an answer that has to call a tool has no response_format; leave one out", param="tool_choice"
        )

    def make() -> GrammarConstraint:
        return tools.constraint(served.grammars)

    try:
        await anyio.to_thread.run_sync(make)  # compiled outside of the event loop; later ones are copies
    except InputError as error:
        raise ApiError(400, str(error), param="tools") from error
    return make


def _function(tool: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the schema of the arguments of a tool in OpenAI's form."""
    function = tool.get("function")
    if tool.get("type", "function") != "function":
        raise ApiError(400, f"{where}.type must be 'function'; other tools are not supported", param=f"{where}.type")
    if not isinstance(function, Mapping):
        raise ApiError(400, f"{where}.function must be an object with name and parameters", param=f"{where}.function")
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ApiError(
            400,
            f"{where}.function.name must be 1 to 128 letters, digits, '_', '-', '.' or ':'",
            param=f"{where}.function.name",
        )
    if schema is not None and not isinstance(schema, Mapping):
        raise ApiError(400, f"{where}.function.parameters must be a JSON schema", param=f"{where}.function.parameters")
    return name, schema or {"type": "object", "properties": {}, "additionalProperties": False}


def _choice(choice: str | Mapping[str, Any] | None, names: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return none, auto or required, and the tool that has to be called."""
    if choice is None:
        return "auto", None
    if choice in ("none", "auto", "required"):
        return str(choice), None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ApiError(
            400,
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}',
            param="tool_choice",
        )
    if name not in names:
        raise ApiError(
            400, f"tool_choice names {name[:80]!r}; the tools are {', '.join(map(repr, names))}", param="tool_choice"
        )
    return "required", name


def _check_template(tokenizer: Tokenizer) -> None:
    template = tokenizer.chat_template or ""
    other = next((name for mark, name in _OTHER_FORMS.items() if mark in template), None)
    if other is None and BEGIN in template and BEGIN not in tokenizer.special_tokens.values():
        return
    found = "writes no tools" if other is None else f"writes tools in another form, {other}"
    raise ApiError(
        400,
        f"the model's chat template {found}; only Hermes's {BEGIN}{{…}}{END} is read: leave tools out, or start the "
        "server with --chat-template hermes",
        param="tools",
        code="unsupported_tools",
    )


def template_messages(messages: Sequence[Mapping[str, Any]], template: str | None) -> list[dict[str, Any]]:
    """Return messages whose calls have their arguments as the template wants them.

    Clients send arguments as JSON in a string. A template that writes them as JSON itself reads an object. Raises
    ApiError for calls in another form.
    """
    as_object = _AS_JSON.search(template or "") is not None
    found = [dict(message) for message in messages]
    for index, message in enumerate(found):
        if message.get("tool_calls"):
            where = f"messages[{index}].tool_calls"
            if not isinstance(message["tool_calls"], Sequence):
                raise ApiError(400, f"{where} must be a list", param=where)
            calls = enumerate(message["tool_calls"])
            message["tool_calls"] = [_past_call(call, f"{where}[{number}]", as_object) for number, call in calls]
    return found


def _past_call(call: Any, where: str, as_object: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where} must have function.name and function.arguments", param=where)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            place = f"{where}.function.arguments"
            raise ApiError(400, f"{place} is not valid JSON: {error}", param=place) from error
    shown = arguments if as_object else json.dumps(arguments, ensure_ascii=False)
    return {**call, "type": "function", "function": {**function, "arguments": shown}}


class ToolParser:
    """Separate the calls in an answer from its text, as it arrives. Nothing that is returned changes later.

    White space before calls is left out. Text that could be the beginning of a call is held back; what turns out to be
    no call of a known tool stays text.
    """

    def __init__(self, names: Mapping[str, Any], most_calls: int | None = None):
        self._names, self._most_calls = names, most_calls
        self._held = ""  # white space that a call may follow, and from BEGIN on a call that is not complete
        self._searched = 0  # characters of _held in which no END ends a call
        self.calls: list[Call] = []

    def push(self, text: str) -> list[str | Call]:
        """Return the text and the calls that these characters complete, in order."""
        self._held += text
        found: list[str | Call] = []
        while (part := self._next()) is not None:
            found += [part] if part != "" else []
        return found

    def finish(self) -> list[str | Call]:
        """Return the rest: a call without its END if it is complete otherwise, or text."""
        rest, self._held = self._held, ""
        start = rest.find(BEGIN)
        call = self._read(rest[start + len(BEGIN) :]) if start >= 0 else None
        if call is not None:
            return self._found(call)
        return [] if self._is_over or not rest or (self.calls and rest.isspace()) else [rest]

    @property
    def _is_over(self) -> bool:
        """True if the answer has all the calls that it may have: what follows is left out."""
        return self._most_calls is not None and len(self.calls) >= self._most_calls

    def _next(self) -> str | Call | None:
        """Remove the next part from what is held; "": a part without text. None: nothing is decided."""
        if self._is_over:
            self._held = ""
            return None
        start = self._held.find(BEGIN)
        if start < 0:
            return self._text_before(len(self._held) - _partial(self._held))
        before = self._held[:start].rstrip()
        if before:
            self._held = self._held[len(before) :]
            return before
        end = self._held.find(END, max(self._searched, start))
        if end < 0:
            self._searched = max(len(self._held) - len(END), 0)
            return None
        inside = self._held[start + len(BEGIN) : end]
        call = self._read(inside)
        if call is None and _ends_in_string(inside):
            self._searched = end + 1
            return ""
        whole, self._held, self._searched = self._held[: end + len(END)], self._held[end + len(END) :], 0
        if call is None:
            return whole
        self.calls.append(call)
        return call

    def _text_before(self, end: int) -> str | None:
        """Remove text up to `end`, without white space at its end, which is left out if a call follows."""
        text = self._held[:end].rstrip()
        self._held = self._held[len(text) :]
        return text or None

    def _found(self, call: Call) -> list[str | Call]:
        if self._is_over:
            return []
        self.calls.append(call)
        return [call]

    def _read(self, inside: str) -> Call | None:
        """Return the call in the text between BEGIN and END, None if it is none of a known tool."""
        try:
            value = json.loads(inside)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):  # some models write JSON in a string
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _partial(text: str) -> int:
    """Return the length of the longest end of the text that is a beginning of BEGIN."""
    return next((length for length in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:length])), 0)


def _ends_in_string(text: str) -> bool:
    """Return whether JSON that is cut after these characters is cut inside a string."""
    inside = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = inside
        elif character == '"':
            inside = not inside
    return inside
