"""From texts and messages to ids of tokens, long ones outside of the event loop."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import anyio.to_thread
import msgspec

from infer.serve.errors import ApiError
from infer.serve.served import Served
from infer.serve.types import ChatRequest, CompletionRequest, Message, TextOrIds
from model.errors import InputError
from model.tokenizer.control import ChatText

Result = TypeVar("Result")
_LONG = 4096  # characters, which take about a millisecond


async def off_loop(length: int, function: Callable[..., Result], *args: Any) -> Result:
    """Call a function of a text of this length, in a thread if it is long."""
    return function(*args) if length < _LONG else await anyio.to_thread.run_sync(function, *args)


async def ids_of(given: TextOrIds, served: Served, param: str, around: bool | None = None) -> list[list[int]]:
    """Return the ids of each text; param: the field that holds them. around: see `encode_text`.

    Raises ApiError for a mixture of ids and texts, or for texts without a tokenizer.
    """
    if isinstance(given, str):
        parts: list[str | list[int]] = [given]
    elif all(isinstance(one, int) for one in given):
        parts = [given]  # type: ignore[list-item]
    elif any(isinstance(one, int) for one in given):
        raise ApiError(400, f"{param} mixes ids of tokens with texts or lists of ids", param=param)
    else:
        parts = list(given)  # type: ignore[arg-type]
    texts = [one for one in parts if isinstance(one, str)]
    if not texts:
        return parts  # type: ignore[return-value]

    def encode() -> list[list[int]]:
        return [encode_text(served, one, around) if isinstance(one, str) else one for one in parts]

    served.need_tokenizer(param)
    try:
        return await off_loop(sum(map(len, texts)), encode)
    except InputError as error:
        raise ApiError(400, str(error), param=param) from error


async def filtered(body: CompletionRequest, served: Served) -> CompletionRequest:
    """Return a completion whose prompts have passed the filters of input. Raises ApiError if one refuses them."""
    behaviour, tokenizer = served.behaviour, served.tokenizer
    if behaviour is None or not behaviour.inputs or tokenizer is None:
        return body
    given: list[Any] = list(body.prompt) if isinstance(body.prompt, list) else [body.prompt]
    if all(isinstance(one, int) for one in given):
        given = [given]
    prompts = []
    for one in given:
        ids = isinstance(one, list)
        text = tokenizer.decode([token for token in one if token < tokenizer.vocab_size]) if ids else str(one)
        found = await behaviour.filtered_input(text, "prompt")
        prompts.append(one if ids and found == text else found)
    return msgspec.structs.replace(body, prompt=prompts)


async def prompts_of(body: CompletionRequest, served: Served) -> list[list[int]]:
    """Return the ids of each prompt of a completion; an empty text is the end token, which begins a document."""
    found = await ids_of(body.prompt, served, "prompt", body.add_special_tokens)
    begin = [] if served.tokenizer is None else list(served.tokenizer.eos_ids[:1])
    return [ids or begin for ids in found]


def encode_text(served: Served, text: str, around: bool | None = None) -> list[int]:
    """Return the ids of a text, in which names of special tokens are read as these.

    around: add what the model was trained with around a text; None: if it has a begin token, or an encoder.
    """
    tokenizer = served.need_tokenizer("prompt")
    if around is None:
        around = served.config.stack != "decoder" or tokenizer.bos_id is not None
    return tokenizer.encode(text, special=True, add_special_tokens=around)


async def chat_prompt(body: ChatRequest, served: Served, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return the ids of a conversation in the form of the model's template. Raises ApiError if it has none."""
    tokenizer = served.need_tokenizer("messages")
    if tokenizer.chat_template is None:
        raise ApiError(
            400,
            f"the model {served.name!r} has no chat template; send a prompt to /v1/completions, or start the server "
            "with --chat-template chatml",
            param="messages",
            code="no_chat_template",
        )
    if served.behaviour is not None:
        messages = await served.behaviour.messages(messages)
    again = bool(body.continue_final_message)
    if again and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message goes without add_generation_prompt: the last message is continued, or answered",
            param="continue_final_message",
        )
    begin = not again if body.add_generation_prompt is None else body.add_generation_prompt
    variables = dict(body.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt"):
        if name in variables:
            raise ApiError(400, f"chat_template_kwargs cannot set {name}", param="chat_template_kwargs")
    if body.tools:
        variables["tools"] = body.tools

    def encode() -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=begin, **variables)
        if again:
            text = _without_end(text, messages[-1])
        return tokenizer.encode(text, special=True, add_special_tokens=bool(body.add_special_tokens))

    length = sum(len(str(message.get("content", ""))) for message in messages)
    try:
        return await off_loop(length, encode)
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error


def _without_end(text: ChatText, message: dict[str, Any]) -> ChatText:
    """Return the conversation up to the end of its last message's content, which templates may strip."""
    content = str(message.get("content", ""))
    for wanted in (content, content.rstrip(), content.strip()):
        start = text.rfind(wanted)
        if start >= 0 and wanted:
            return text.cut(0, start + len(wanted))
    raise ApiError(
        400,
        "the chat template does not write the last message's content as it is, so it cannot be continued",
        param="continue_final_message",
    )


def plain_messages(messages: Sequence[Message], template: str | None) -> list[dict[str, Any]]:
    """Return messages as templates read them: parts joined by line ends, "developer" as "system".

    Raises ApiError for a part that is no text, and for a message without content.
    """
    return [_plain(message, index, template or "") for index, message in enumerate(messages)]


def _plain(message: Message, index: int, template: str) -> dict[str, Any]:
    where = f"messages[{index}].content"
    plain = {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}
    if message.role == "developer" and "developer" not in template:
        plain["role"] = "system"
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text":
                raise ApiError(
                    400,
                    f"{where}[{number}] is of type {part.type[:40]!r}; only text is supported",
                    param=f"{where}[{number}].type",
                    code="unsupported_content",
                )
            if part.text is None:
                raise ApiError(400, f"{where}[{number}].text is missing", param=f"{where}[{number}].text")
        plain["content"] = "\n".join(part.text or "" for part in content)
    elif content is None:
        if not message.tool_calls:
            raise ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
        plain["content"] = ""
    return plain
