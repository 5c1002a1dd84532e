"""/v1/chat/completions: answer a conversation."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from msgspec import UNSET
from starlette.requests import Request

from infer.completion import Update
from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.generation import Generation, attended, run, sampling_of
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
    Usage,
)


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoint of chat completions."""

    async def chat(request: Request, body: ChatRequest) -> Any:
        call = await _Call.create(body, registry.get(body.model))
        if body.stream:
            return EventStream(call.events(), call.generation.close)
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
        self.body, self.served, self.prompt, self.generation = body, served, prompt, generation
        self.names = TokenNames(served.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self.common: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        self.completion_tokens = 0

    @classmethod
    async def create(cls, body: ChatRequest, served: Served) -> "_Call":
        served.need_service()
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, f"top_logprobs={body.top_logprobs} needs logprobs=true", param="top_logprobs")
        if body.tools:
            raise ApiError(400, "tools are not supported here; leave them out", param="tools")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        template = None if served.tokenizer is None else served.tokenizer.chat_template
        prompt = await chat_prompt(body, served, plain_messages(body.messages, template))
        sampling = sampling_of(body, served, body.top_logprobs or 0)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return cls(body, served, prompt, await run(served, [prompt], sampling, most, n=body.n or 1))

    async def whole(self) -> ChatCompletion:
        """Return the whole answers."""
        choices = [ChatChoice(i, AnswerMessage("assistant", ""), None, "stop") for i in range(self.body.n or 1)]
        if self.body.logprobs:
            for choice in choices:
                choice.logprobs = ChatLogprobs([])
        with self.generation:
            async for ready in self.generation:
                for index, update in ready:
                    self._append(choices[index], update)
        return ChatCompletion(choices=choices, usage=self.usage(), **self.common)

    def _append(self, choice: ChatChoice, update: Update) -> None:
        added = self._choice(choice.index, update)
        choice.message.content = (choice.message.content or "") + (added.delta.content or "")
        if choice.logprobs is not None and added.logprobs is not None:
            choice.logprobs.content += added.logprobs.content
        if added.token_ids is not UNSET:
            choice.token_ids = [*(choice.token_ids or ()), *added.token_ids]
        if added.finish_reason is not None:
            choice.finish_reason = added.finish_reason

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        options = self.body.stream_options
        usage: Any = None if options is not None and options.include_usage else UNSET
        with self.generation:
            numbers = range(self.body.n or 1)
            yield b"".join(event(self._chunk([ChunkChoice(index, Delta("assistant", ""))], usage)) for index in numbers)
            async for ready in self.generation:
                yield b"".join(event(self._chunk([self._choice(*one)], usage)) for one in ready)
        if usage is None:
            yield event(self._chunk([], self.usage()))
        yield DONE

    def _choice(self, index: int, update: Update) -> ChunkChoice:
        self.completion_tokens += len(update.tokens)
        logprobs = None
        if self.body.logprobs and update.tokens:
            count = self.body.top_logprobs or 0
            logprobs = self.names.chat(update.tokens, update.logprobs, update.top_logprobs, count)
        return ChunkChoice(
            index,
            Delta(content=update.text) if update.text else Delta(),
            logprobs,
            update.finish_reason,  # type: ignore[arg-type]
            update.tokens if self.body.return_token_ids else UNSET,
        )

    def _chunk(self, choices: Sequence[ChunkChoice], usage: Any) -> ChatChunk:
        return ChatChunk(choices=list(choices), usage=usage, **self.common)

    def usage(self) -> Usage:
        """Return the numbers of tokens so far."""
        return Usage(len(self.prompt), self.completion_tokens, len(self.prompt) + self.completion_tokens)
