"""/v1/chat/completions: answer a conversation."""

from collections.abc import AsyncGenerator
from typing import Any

import anyio.to_thread
import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from infer.completion import Update
from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.generation import Generation, answered, constraint_of, identity, room, run, sampling_of
from infer.serve.logprobs import TokenNames
from infer.serve.prompts import chat_prompt, plain_messages
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.sse import DONE, event
from infer.serve.tools import ToolParser, Tools, calls_only, template_messages, tools_of
from infer.serve.types import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    FunctionCall,
    PromptLogprobs,
    ToolCall,
)
from infer.serve.usage import usage_of, wants_usage


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoint of chat completions."""

    async def chat(request: Request, body: ChatRequest) -> Any:
        call = await _Call.create(body, registry.get(body.model))
        return await answered(request, call, body.stream)

    return [
        Endpoint(
            "POST",
            "/v1/chat/completions",
            chat,
            "Answer a conversation.",
            request=ChatRequest,
            response=ChatCompletion,
            events=ChatChunk,
            errors=(404, 429, 503),
        )
    ]


class _Call:
    """A request that has been queued."""

    def __init__(
        self, body: ChatRequest, served: Served, prompt: list[int], generation: Generation, tools: Tools | None
    ):
        self._parsers = None if tools is None else [tools.parser() for _ in range(body.n or 1)]
        self.body, self.prompt, self.generation = body, prompt, generation
        self._names = TokenNames(served, as_ids=bool(body.return_tokens_as_token_ids)) if body.logprobs else None
        self._common = identity("chatcmpl", served)
        self._completion_tokens = 0
        self._prompt_logprobs: PromptLogprobs | UnsetType = UNSET

    @classmethod
    async def create(cls, body: ChatRequest, served: Served) -> "_Call":
        """Queue the request. Raises ApiError."""
        served.need_service()
        wants_usage(body)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, f"top_logprobs={body.top_logprobs} needs logprobs=true", param="top_logprobs")
        if body.prompt_logprobs is not None and body.stream:
            raise ApiError(400, "prompt_logprobs goes without stream", param="prompt_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        sampling = sampling_of(body, served, body.top_logprobs or 0)
        tools, prompt = await conversation(body, served)
        constraint = await constraint_of(body, served)
        if tools is not None and tools.choice == "required":
            constraint = await calls_only(tools, served, constraint)
        if body.logprobs or body.prompt_logprobs is not None:
            await anyio.to_thread.run_sync(lambda: served.token_bytes)  # read once, which takes up to a second
        room(served, prompt, None, "messages")
        scored = None
        if body.prompt_logprobs is not None:
            [scored] = await served.reading.logprobs([prompt], body.prompt_logprobs)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        generation = await run(served, [prompt], sampling, most, n=body.n or 1, constraint=constraint)
        call = cls(body, served, prompt, generation, tools)
        if scored is not None:
            names = TokenNames(served, as_ids=bool(body.return_tokens_as_token_ids))
            call._prompt_logprobs = names.prompt(prompt, scored, body.prompt_logprobs or 0)
        return call

    async def whole(self) -> ChatCompletion:
        """Return the whole answers."""
        choices = [
            ChatChoice(index, AnswerMessage("assistant", ""), ChatLogprobs([]) if self.body.logprobs else None, "stop")
            for index in range(self.body.n or 1)
        ]
        async for ready in self.generation:
            for index, update in ready:
                _append(choices[index], self._choice(index, update))
        for choice in choices:
            if choice.message.tool_calls is not UNSET:
                choice.message.content = choice.message.content or None
        completion = ChatCompletion(choices=choices, usage=self._usage(), **self._common)
        completion.prompt_logprobs = self._prompt_logprobs
        if self.body.return_token_ids:
            completion.prompt_token_ids = self.prompt
        return completion

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        usage: Any = None if wants_usage(self.body) else UNSET
        starts = [ChunkChoice(index, Delta("assistant", "")) for index in range(self.body.n or 1)]
        first = self._chunk(starts[:1], usage)
        if self.body.return_token_ids:
            first.prompt_token_ids = self.prompt
        yield b"".join([event(first), *(event(self._chunk([one], usage)) for one in starts[1:])])
        async for ready in self.generation:
            choices = [self._choice(*one) for one in ready]
            yield b"".join(event(self._chunk([one], usage)) for one in choices if not one.is_empty)
        if usage is None:
            yield event(self._chunk([], self._usage()))
        yield DONE

    def _choice(self, index: int, update: Update) -> ChunkChoice:
        """Return what an update adds to an answer."""
        self._completion_tokens += len(update.tokens)
        choice = ChunkChoice(index, Delta(), finish_reason=update.finish_reason)  # type: ignore[arg-type]
        if self._parsers is None:
            text: str = update.text
        else:
            text = _parsed(self._parsers[index], update, choice)
        if text:
            choice.delta.content = text
        if self._names is not None and update.tokens:
            count = self.body.top_logprobs or 0
            choice.logprobs = self._names.chat(update.tokens, update.logprobs, update.top_logprobs, count)
        if self.body.return_token_ids:
            choice.token_ids = update.tokens
        return choice

    def _chunk(self, choices: list[ChunkChoice], usage: Any) -> ChatChunk:
        return ChatChunk(choices=choices, usage=usage, **self._common)

    def _usage(self) -> Any:
        return usage_of([self.prompt], self._completion_tokens, self.generation)


async def conversation(body: ChatRequest, served: Served) -> tuple[Tools | None, list[int]]:
    """Return the tools that the model may call, and the ids of the conversation. Raises ApiError."""
    tokenizer = served.need_tokenizer("messages")
    tools = tools_of(body.tools, body.tool_choice, body.parallel_tool_calls, tokenizer)
    if tools is None:
        body = msgspec.structs.replace(body, tools=None)
    messages = template_messages(plain_messages(body.messages, tokenizer.chat_template), tokenizer.chat_template)
    return tools, await chat_prompt(body, served, messages)


def _parsed(parser: ToolParser, update: Update, choice: ChunkChoice) -> str:
    """Give a chunk the calls that an update completes; return the text beside them."""
    known = len(parser.calls)
    parts = parser.push(update.text)
    if update.finish_reason is not None:
        parts += parser.finish()
    calls = enumerate(parser.calls[known:], known)
    if found := [
        ToolCall(FunctionCall(call.arguments, call.name), call.id, "function", index) for index, call in calls
    ]:
        choice.delta.tool_calls = found
    if update.finish_reason == "stop" and parser.calls:
        choice.finish_reason = "tool_calls"
    return "".join(part for part in parts if isinstance(part, str))


def _append(choice: ChatChoice, added: ChunkChoice) -> None:
    """Append what an update adds to an answer."""
    if added.delta.tool_calls is not UNSET:
        calls = [msgspec.structs.replace(call, index=UNSET) for call in added.delta.tool_calls]
        choice.message.tool_calls = [*(choice.message.tool_calls or ()), *calls]
    choice.message.content = (choice.message.content or "") + (added.delta.content or "")
    if choice.logprobs is not None and added.logprobs is not None:
        choice.logprobs.content += added.logprobs.content
    if added.token_ids is not UNSET:
        choice.token_ids = [*(choice.token_ids or ()), *added.token_ids]
    if added.finish_reason is not None:
        choice.finish_reason = added.finish_reason
