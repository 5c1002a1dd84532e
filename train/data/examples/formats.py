"""The formats of rows: which keys each kind of data has, and what an example is whatever format it came in."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Content = str | tuple[Message, ...]
"""Plain text, or the turns of a conversation."""

BROKEN = "broken lines"
UNKNOWN_ROLE = "unknown roles"
EMPTY = "empty turns"
NO_ANSWER = "no assistant turn"
NO_QUESTION = "no user turn at the end"
EQUAL = "equal pairs"
TWO_PROMPTS = "pairs whose prompts differ"

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
}

EXPECTED = {
    "chat": "messages; conversations; instruction and output; or prompt and completion",
    "preference": "prompt, chosen and rejected; chosen and rejected; or prompt, responses and ranks",
    "rated": "prompt, completion and label",
    "prompts": "prompt; or messages",
}
"""The keys of a row of each kind."""


class UnusableError(Exception):
    """A row that gives no example. reason: what it is counted under; detail: more about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Example:
    """What one prompt has of answers: none of kind=prompts, two of kind=preference, the chosen one first, else one.

    prompt: empty for a conversation in which every assistant turn is trained. variables: what the chat template gets
    besides the messages. margin: None where the row gives none; label: 1 for a good answer.
    """

    prompt: Content
    answers: tuple[Content, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    margin: float | None = None
    label: int = 0

    @property
    def identity(self) -> str:
        """All of it as JSON, the same for equal examples."""
        return canonical([self.prompt, self.answers, self.variables, self.margin, self.label])

    @property
    def prompts_differ(self) -> bool:
        """Whether it is a pair of conversations that differ before the assistant answers, for a reward model alone."""
        first = [as_turns(answer, "assistant")[0]["role"] for answer in self.answers]
        return len(first) == 2 and first != ["assistant", "assistant"]

    @property
    def split_by(self) -> str:
        """Key of the split, as JSON: the prompt; of a conversation its system turn and first user turn.

        Where the prompts of a pair differ it is the whole pair, since all rows may share a system turn.
        """
        if self.prompts_differ:
            return canonical([self.prompt, self.answers])
        if self.prompt != () or isinstance(self.answers[0], str):
            return canonical(self.prompt)
        first = {message["role"]: message for message in reversed(self.answers[0])}
        return canonical([first[role] for role in ("system", "user") if role in first])


def canonical(value: Any) -> str:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def kinds_of(names: Collection[str]) -> tuple[str, ...]:
    """Return the kinds that a row with keys of these names may be of."""
    has = lambda *keys: all(key in names for key in keys)
    kinds = []
    if has("messages"):
        kinds += ["chat", "prompts"]
    if has("conversations") or has("instruction", "output"):
        kinds.append("chat")
    if has("chosen", "rejected") or has("prompt", "responses", "ranks"):
        kinds.append("preference")
    elif has("prompt", "completion", "label"):
        kinds.append("rated")
    elif has("prompt", "completion"):
        kinds.append("chat")
    elif has("prompt"):
        kinds.append("prompts")
    return tuple(dict.fromkeys(kinds))


def examples_of(row: Mapping[str, Any], kind: str) -> list[Example]:
    """Return the examples of a row that has the keys of this kind; a ranking of responses gives several.

    Raises UnusableError where the row gives none.
    """
    tools = row.get("tools")
    variables = {"tools": tools} if isinstance(tools, list) and tools else {}
    if kind == "chat":
        return [_conversation(row, variables)]
    if kind == "prompts":
        prompt = _content(row["prompt"] if row.get("prompt") is not None else row["messages"])
        if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
            raise UnusableError(NO_QUESTION)
        return [Example(prompt, variables=variables)]
    if kind == "rated":
        prompt, (answer,) = _aligned(row["prompt"], [row["completion"]])
        return [Example(prompt, (answer,), variables, label=_label(row["label"]))]
    if row.get("chosen") is not None:
        pair = [row["chosen"], row["rejected"]]
        prompt, answers = _shared_prompt(pair) if row.get("prompt") is None else _aligned(row["prompt"], pair)
        if answers[0] == answers[1]:
            raise UnusableError(EQUAL)
        return [Example(prompt, tuple(answers), variables, margin=_margin(row.get("margin")))]
    return _ranked(row, variables)


def _conversation(row: Mapping[str, Any], variables: Mapping[str, Any]) -> Example:
    """Return a row of kind=chat, in whichever of the four formats it is."""
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if turns is not None:
        messages = _messages(turns)
        if all(message["role"] != "assistant" for message in messages):
            raise UnusableError(NO_ANSWER)
        return Example((), (messages,), variables)
    if row.get("instruction") is not None:
        instruction, given, output = row["instruction"], row.get("input") or "", row["output"]
        if not all(isinstance(part, str) for part in (instruction, given, output)):
            raise UnusableError(BROKEN)
        asked = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return Example((), (_messages(turns),), variables)
    prompt, (answer,) = _aligned(row["prompt"], [row["completion"]])
    return Example(prompt, (answer,), variables)


def _ranked(row: Mapping[str, Any], variables: Mapping[str, Any]) -> list[Example]:
    """Return all pairs of unequal rank, rank 1 the best."""
    responses, ranks = row["responses"], row["ranks"]
    are_lists = isinstance(responses, list) and isinstance(ranks, list) and len(responses) == len(ranks)
    if not are_lists or len(ranks) < 2 or not all(map(_is_number, ranks)):
        raise UnusableError(BROKEN)
    prompt, answers = _aligned(row["prompt"], responses)
    pairs = [
        (answers[better], answers[worse])
        for better in range(len(ranks))
        for worse in range(len(ranks))
        if ranks[better] < ranks[worse] and answers[better] != answers[worse]
    ]
    if not pairs:
        raise UnusableError(EQUAL)
    return [Example(prompt, pair, variables) for pair in pairs]


def _aligned(prompt: Any, answers: Sequence[Any]) -> tuple[Content, list[Content]]:
    """Return a prompt and its answers, all as plain text, or all as turns where one of them is.

    A prompt that every answer repeats at its beginning is taken off the answers.
    """
    begun, ended = _content(prompt), [_content(answer) for answer in answers]
    if all(isinstance(part, str) for part in (begun, *ended)):
        return begun, ended
    asked, turns = as_turns(begun, "user"), [as_turns(answer, "assistant") for answer in ended]
    if all(answer[: len(asked)] == asked for answer in turns):
        turns = [answer[len(asked) :] for answer in turns]
    return asked, [_answer(answer) for answer in turns]


def _shared_prompt(pair: Sequence[Any]) -> tuple[Content, list[Content]]:
    """Return the beginning that two conversations share, and the rest of each, which may begin with a user turn."""
    if any(isinstance(conversation, str) for conversation in pair):
        raise UnusableError(BROKEN)
    chosen, rejected = map(_messages, pair)
    if chosen == rejected:
        raise UnusableError(EQUAL)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    rests: list[Content] = [chosen[shared:], rejected[shared:]]
    if any(all(message["role"] != "assistant" for message in turns[shared:]) for turns in (chosen, rejected)):
        raise UnusableError(NO_ANSWER)
    return chosen[:shared], rests


def _answer(turns: tuple[Message, ...]) -> Content:
    if not turns or turns[0]["role"] != "assistant":
        raise UnusableError(NO_ANSWER)
    return turns


def as_turns(content: Content, role: str) -> tuple[Message, ...]:
    """Return plain text as one turn of this role, and turns as they are."""
    return ({"role": role, "content": content},) if isinstance(content, str) else content


def _content(value: Any) -> Content:
    if not isinstance(value, str):
        return _messages(value)
    if not value.strip():
        raise UnusableError(EMPTY)
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UnusableError(BROKEN)
    return tuple(_message(message) for message in value)


def _message(value: Any) -> Message:
    """Return {"role", "content"} and what else a message has, of OpenAI's or ShareGPT's keys."""
    if not isinstance(value, Mapping):
        raise UnusableError(BROKEN)
    if "role" not in value and "from" in value:
        role, content, more = _SHAREGPT_ROLES.get(str(value["from"])), value.get("value"), {}
    else:
        role = value.get("role") if value.get("role") in _ROLES else None
        content = value.get("content")
        more = {key: part for key, part in value.items() if key not in ("role", "content") and part is not None}
    if role is None:
        raise UnusableError(UNKNOWN_ROLE if "role" in value or "from" in value else BROKEN)
    if content is not None and not isinstance(content, str):
        raise UnusableError(BROKEN)
    calls = role == "assistant" and more.get("tool_calls")
    if not calls and (content is None or not content.strip()):
        raise UnusableError(EMPTY)
    return {"role": role, "content": content or "", **more}


def _label(value: Any) -> int:
    if not isinstance(value, bool) and not (_is_number(value) and value in (0, 1)):
        raise UnusableError(BROKEN)
    return int(value)


def _margin(value: Any) -> float | None:
    if value is not None and not _is_number(value):
        raise UnusableError(BROKEN)
    return None if value is None else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
