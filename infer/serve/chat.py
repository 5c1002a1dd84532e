"""/v1/chat/completions: answer a conversation."""

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

import anyio.to_thread
from msgspec import UNSET
from starlette.requests import Request

from infer.completion import Update
from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.generation import Generation, attended, constraint_of, run, sampling_of
from infer.serve.logprobs import TokenNames
from infer.serve.prompts import chat_prompt, plain_messages
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.sse import DONE, EventStream, event
from infer.serve.types import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
)
from infer.serve.usage import usage_of, wants_usage


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoint of chat completions."""

    async def chat(request: Request, body: ChatRequest) -> Any:
        call = await _Call.create(body, registry.get(body.model))
        if body.stream:
            return EventStream(call.events(), call.generation.close)
        with call.generation:
            return await attended(request, call.whole())

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

    def __init__(self, body: ChatRequest, served: Served, prompt: list[int], generation: Generation):
        self.body, self.prompt, self.generation = body, prompt, generation
        self._names = TokenNames(served, as_ids=bool(body.return_tokens_as_token_ids)) if body.logprobs else None
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        self._completion_tokens = 0

    @classmethod
    async def create(cls, body: ChatRequest, served: Served) -> "_Call":
        """Queue the request. Raises ApiError."""
        served.need_service()
        wants_usage(body)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, f"top_logprobs={body.top_logprobs} needs logprobs=true", param="top_logprobs")
        if body.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs is a field of /v1/completions; leave it out", param="prompt_logprobs")
        if body.tools:
            raise ApiError(400, "tools are not supported here; leave them out", param="tools")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        sampling = sampling_of(body, served, body.top_logprobs or 0)
        constraint = await constraint_of(body, served)
        template = None if served.tokenizer is None else served.tokenizer.chat_template
        prompt = await chat_prompt(body, served, plain_messages(body.messages, template))
        if body.logprobs:
            await anyio.to_thread.run_sync(lambda: served.token_bytes)  # read once, which takes up to a second
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        generation = await run(served, [prompt], sampling, most, n=body.n or 1, constraint=constraint)
        return cls(body, served, prompt, generation)

    async def whole(self) -> ChatCompletion:
        """Return the whole answers."""
        choices = [
            ChatChoice(index, AnswerMessage("assistant", ""), ChatLogprobs([]) if self.body.logprobs else None, "stop")
            for index in range(self.body.n or 1)
        ]
        async for ready in self.generation:
            for index, update in ready:
                _append(choices[index], self._choice(index, update))
        completion = ChatCompletion(choices=choices, usage=self._usage(), **self._common)
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
        if update.text:
            choice.delta.content = update.text
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


def _append(choice: ChatChoice, added: ChunkChoice) -> None:
    """Append what an update adds to an answer."""
    choice.message.content = (choice.message.content or "") + (added.delta.content or "")
    if choice.logprobs is not None and added.logprobs is not None:
        choice.logprobs.content += added.logprobs.content
    if added.token_ids is not UNSET:
        choice.token_ids = [*(choice.token_ids or ()), *added.token_ids]
    if added.finish_reason is not None:
        choice.finish_reason = added.finish_reason
