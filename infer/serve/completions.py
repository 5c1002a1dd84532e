"""/v1/completions: continue prompts."""

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import anyio.to_thread
from msgspec import UNSET
from starlette.requests import Request

from infer.completion import Update
from infer.reader import Score
from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.generation import Generation, answered, constraint_of, identity, room, run, sampling_of
from infer.serve.logprobs import Place, TokenNames
from infer.serve.prompts import filtered, prompts_of
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.sse import DONE, event
from infer.serve.types import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from infer.serve.usage import usage_of, wants_usage

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoint of completions."""

    async def complete(request: Request, body: CompletionRequest) -> Any:
        call = await _Call.create(body, registry.get(body.model))
        return await answered(request, call, body.stream)

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


class _Prompt(NamedTuple):
    """A prompt; text: None unless it is echoed; scores: one per token, None for the first, or None altogether."""

    ids: list[int]
    text: str | None
    scores: list[Score | None] | None


class _Call:
    """A request that has been queued. Choice p · n + i is the i-th of prompt p."""

    def __init__(self, body: CompletionRequest, served: Served, prompts: list[_Prompt], generation: Generation):
        self.body, self.prompts, self.generation = body, prompts, generation
        self._n = body.n or 1
        self._names = TokenNames(served, as_ids=bool(body.return_tokens_as_token_ids))
        self._common = identity("cmpl", served)
        self._completion_tokens = 0
        self._places = [Place(len(prompt.text or "")) for prompt in prompts for _ in range(self._n)]
        self._ends: tuple[int, ...] = ()

    @classmethod
    async def create(cls, body: CompletionRequest, served: Served) -> "_Call":
        """Queue the request. Raises ApiError."""
        served.need_service()
        wants_usage(body)
        most = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if body.prompt_logprobs is not None and body.stream:
            raise ApiError(400, "prompt_logprobs goes without stream", param="prompt_logprobs")
        sampling = sampling_of(body, served, body.logprobs or 0)
        constraint = await constraint_of(body, served)
        body = await filtered(body, served)
        ids = await prompts_of(body, served)
        for one in ids:
            room(served, one, most, "prompt")
        prompts = await _read(body, served, ids)
        ends: tuple[int, ...] = ()
        if body.echo and body.logprobs is not None and most == 1 and constraint is None:
            # Clients that score a text drop the last entry, which must be there even where the model ends the text.
            ends, sampling = sampling.stop_ids or (), dataclasses.replace(sampling, stop_ids=(), min_tokens=0)
        generation = await run(served, ids, sampling, most, n=body.n or 1, constraint=constraint, param="prompt")
        call = cls(body, served, prompts, generation)
        call._ends = ends
        return call

    async def whole(self) -> Completion:
        """Return the whole continuations."""
        choices = self._first_choices()
        async for ready in self.generation:
            for index, update in ready:
                _append(choices[index], self._choice(index, update))
        return self._completion(choices, self._usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        usage: Any = None if wants_usage(self.body) else UNSET
        if self.body.echo:
            yield b"".join(event(self._completion([choice], usage)) for choice in self._first_choices())
        async for ready in self.generation:
            choices = [self._choice(*one) for one in ready]
            yield b"".join(event(self._completion([one], usage)) for one in choices if not one.is_empty)
        if usage is None:
            yield event(self._completion([], self._usage()))
        yield DONE

    def _first_choices(self) -> list[CompletionChoice]:
        """Return all choices before the first token: with the prompt, if it is echoed."""
        return [
            self._first_choice(number * self._n + choice, prompt)
            for number, prompt in enumerate(self.prompts)
            for choice in range(self._n)
        ]

    def _first_choice(self, index: int, prompt: _Prompt) -> CompletionChoice:
        choice = CompletionChoice(index, prompt.text or "", None, None)
        count = self.body.logprobs
        if count is not None and self.body.echo and prompt.scores is not None:
            # Aligned at the end: the first token may have a space, or a name, that the text lacks.
            begin = len(prompt.text or "") - self._names.length(prompt.ids)
            logprobs = [score and score[0] for score in prompt.scores]
            choice.logprobs = self._names.completion(
                prompt.ids, logprobs, [score and score[1] for score in prompt.scores], count, Place(begin)
            )
            choice.logprobs.text_offset = [max(0, one) for one in choice.logprobs.text_offset]
        elif count is not None:
            choice.logprobs = CompletionLogprobs([], [], [] if count else None, [])
        if self.body.prompt_logprobs is not None and prompt.scores is not None:
            choice.prompt_logprobs = self._names.prompt(prompt.ids, prompt.scores, self.body.prompt_logprobs)
        if self.body.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = [], prompt.ids
        return choice

    def _choice(self, index: int, update: Update) -> CompletionChoice:
        """Return what an update adds to a choice."""
        self._completion_tokens += len(update.tokens)
        if self._ends and update.tokens and update.tokens[-1] in self._ends:
            update = dataclasses.replace(update, text="", finish_reason="stop")
        choice = CompletionChoice(index, update.text, None, update.finish_reason)  # type: ignore[arg-type]
        if self.body.logprobs is not None:
            choice.logprobs = self._names.completion(
                update.tokens, update.logprobs, update.top_logprobs, self.body.logprobs, self._places[index]
            )
        if self.body.return_token_ids:
            choice.token_ids = update.tokens
        return choice

    def _completion(self, choices: list[CompletionChoice], usage: Any) -> Completion:
        return Completion(choices=choices, usage=usage, **self._common)

    def _usage(self) -> Any:
        return usage_of([prompt.ids for prompt in self.prompts], self._completion_tokens, self.generation)


def _append(choice: CompletionChoice, more: CompletionChoice) -> None:
    """Append what an update adds to a choice."""
    choice.text += more.text
    choice.finish_reason = more.finish_reason
    if choice.logprobs is not None and more.logprobs is not None:
        for name in ("tokens", "token_logprobs", "text_offset"):
            getattr(choice.logprobs, name).extend(getattr(more.logprobs, name))
        if choice.logprobs.top_logprobs is not None:
            choice.logprobs.top_logprobs += more.logprobs.top_logprobs or []
    if choice.token_ids is not UNSET and more.token_ids is not UNSET:
        choice.token_ids += more.token_ids


async def _read(body: CompletionRequest, served: Served, ids: list[list[int]]) -> list[_Prompt]:
    """Return the prompts with the texts and log-probabilities that were requested of them."""
    texts: list[str | None] = [None] * len(ids)
    if body.echo:
        given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        tokenizer = served.tokenizer
        texts = [
            one if isinstance(one, str) else "" if tokenizer is None else tokenizer.decode(_known(tokenizer, tokens))
            for one, tokens in zip(given if len(given) == len(ids) else ids, ids, strict=True)
        ]
    counts = [body.prompt_logprobs, body.logprobs if body.echo else None]
    if body.logprobs is not None:
        await anyio.to_thread.run_sync(lambda: served.token_bytes)  # read once, which takes up to a second
    asked = [count for count in counts if count is not None]
    if not asked:
        return [_Prompt(one, text, None) for one, text in zip(ids, texts, strict=True)]
    scores = await served.reading.logprobs(ids, max(asked))
    return [_Prompt(*one) for one in zip(ids, texts, scores, strict=True)]


def _known(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the ids that have a token: many models have more rows in their embedding."""
    return [token for token in ids if token < tokenizer.vocab_size]
