"""/v1/completions: continue prompts."""

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from msgspec import UNSET
from starlette.requests import Request

from infer.completion import Update
from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.generation import Generation, attended, collect, run, sampling_of
from infer.serve.logprobs import TokenNames, characters
from infer.serve.prompts import prompts_of
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.sse import DONE, EventStream, event
from infer.serve.types import Completion, CompletionChoice, CompletionRequest, Usage

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoint of completions."""

    async def complete(request: Request, body: CompletionRequest) -> Any:
        call = await _Call.create(body, registry.get(body.model))
        if body.stream:
            return EventStream(call.events(), call.generation.close)
        return await attended(request, call.whole())

    return [
        Endpoint(
            "POST",
            "/v1/completions",
            complete,
            "Continue prompts.",
            request=CompletionRequest,
            response=Completion,
            events=Completion,
            errors=(404, 429, 503),
        )
    ]


class _Call:
    """A request that has been queued."""

    def __init__(self, body: CompletionRequest, served: Served, prompts: list[list[int]], generation: Generation):
        self.body, self.served, self.prompts, self.generation = body, served, prompts, generation
        self.names = TokenNames(served.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self.common: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        self.completion_tokens = 0
        self.offsets = [0] * (len(prompts) * (body.n or 1))

    @classmethod
    async def create(cls, body: CompletionRequest, served: Served) -> "_Call":
        served.need_service()
        if body.echo or body.prompt_logprobs is not None:
            name = "echo" if body.echo else "prompt_logprobs"
            raise ApiError(400, f"{name} is not supported here; leave it out", param=name)
        prompts = await prompts_of(body, served)
        sampling = sampling_of(body, served, body.logprobs or 0)
        most = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        generation = await run(served, prompts, sampling, most, n=body.n or 1, param="prompt")
        return cls(body, served, prompts, generation)

    async def whole(self) -> Completion:
        """Return the whole continuations."""
        choices = []
        for index, output in enumerate(await collect(self.generation)):
            update = Update(output.text, output.tokens, output.logprobs, output.top_logprobs, output.finish_reason)
            choices.append(self._choice(index, update))
        return Completion(choices=choices, usage=self.usage(), **self.common)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        options = self.body.stream_options
        usage: Any = None if options is not None and options.include_usage else UNSET
        with self.generation:
            async for ready in self.generation:
                yield b"".join(event(self._chunk([self._choice(*one)], usage)) for one in ready)
        if usage is None:
            yield event(self._chunk([], self.usage()))
        yield DONE

    def _choice(self, index: int, update: Update) -> CompletionChoice:
        self.completion_tokens += len(update.tokens)
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self.names.completion(
                update.tokens, update.logprobs, update.top_logprobs, self.body.logprobs, self.offsets[index]
            )
            self.offsets[index] += sum(characters(self.names.bytes(token)) for token in update.tokens)
        return CompletionChoice(
            index,
            update.text,
            logprobs,
            update.finish_reason,  # type: ignore[arg-type]
            token_ids=update.tokens if self.body.return_token_ids else UNSET,
        )

    def _chunk(self, choices: list[CompletionChoice], usage: Any) -> Completion:
        return Completion(choices=choices, usage=usage, **self.common)

    def usage(self) -> Usage:
        """Return the numbers of tokens so far."""
        prompt_tokens = sum(map(len, self.prompts))
        return Usage(prompt_tokens, self.completion_tokens, prompt_tokens + self.completion_tokens)
