"""From parsed requests to the engine and back: submit them, hear of their output in the event loop, cancel them."""

import asyncio
import contextlib
import dataclasses
import math
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import anyio.to_thread
import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest

from infer.completion import Update
from infer.constraint import Constraint
from infer.engine import MOST_STOP_IDS
from infer.prompts import Prompt
from infer.request import Request
from infer.sampling import Sampling
from infer.serve.behaviour import push
from infer.serve.errors import ApiError
from infer.serve.filters import Chain
from infer.serve.limits import ACCOUNT, spend
from infer.serve.served import Served
from infer.serve.sse import EventStream, until_gone
from infer.serve.types import ChatRequest, GenerationRequest, StructuredOutputs
from model.errors import InputError

Result = TypeVar("Result")
CLIENT_LEFT = 499  # a status that no one sees
_BAN = -100.0  # a bias that bans, as OpenAI's documentation says of it
_MARKS = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")  # of regular expressions
# Fields of `Sampling` that the API calls otherwise.
_FIELDS = {"stop_strings": "stop", "stop_ids": "stop_token_ids"}


class Generation:
    """Requests that were submitted together, and their output as it arrives; they are numbered from 0.

    Created in the event loop that reads it. `close` cancels what has not ended; whoever creates a Generation closes it.
    """

    def __init__(self, served: Served):
        self._service = served.need_service()
        self._distributions = served.distributions
        self._filters = () if served.behaviour is None else served.behaviour.outputs
        self._chains: dict[int, Chain] = {}  # of the requests that have begun, if there are filters
        self._account = ACCOUNT.get()
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[Request, Update]] = deque()
        self._wake = asyncio.Event()
        self._posted = False  # the loop has been told of `_arrived`
        self._numbers: dict[Request, int] = {}  # of the requests that have not ended
        self._firsts: set[Request] = set()  # of each prompt, until its first output
        self._without_tokens: list[int] = []
        self.cached_tokens = 0
        """Tokens of the prompts that the prefix cache held; known with the first output of each prompt."""

    def submit(
        self,
        prompt: Prompt,
        samplings: Sequence[Sampling],
        max_new_tokens: int,
        constraints: Sequence[Constraint | None],
    ) -> None:
        """Submit the next requests, with one prompt. Requests for no tokens end at once."""
        number = len(self._numbers) + len(self._without_tokens)
        if max_new_tokens == 0:
            self._without_tokens += range(number, number + len(samplings))
            return
        spend(self._account, len(prompt))
        requests = self._service.submit_many(prompt, samplings, max_new_tokens, self._hear, constraints)
        self._numbers |= {request: number + index for index, request in enumerate(requests)}
        self._firsts.add(requests[0])

    def _hear(self, request: Request, update: Update) -> None:
        """Pass output on, in the engine's thread: the loop is woken once for all that it has not read."""
        if update.finish_reason is not None:
            for distribution in self._distributions:
                distribution.observe(request)
        self._arrived.append((request, update))
        if not self._posted:
            self._posted = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._wake.set)

    def close(self) -> None:
        """Cancel the requests that have not ended."""
        for request in self._numbers:
            self._service.cancel(request)
        self._numbers.clear()

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Update]]]:
        """Yield lists of (number of a request, its new output) until all have ended.

        Raises ApiError if the engine ended a request otherwise than by "stop" or "length".
        """
        if self._without_tokens:
            yield [(number, Update("", [], [], [], "length")) for number in self._without_tokens]
        while self._numbers:
            await self._wake.wait()
            self._wake.clear()
            self._posted = False
            arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
            ready = [(self._numbers[request], update) for request, update in arrived if request in self._numbers]
            spend(self._account, sum(len(update.tokens) for _, update in ready))
            for request, update in arrived:
                if request not in self._numbers:  # a filter ended it
                    continue
                if request in self._firsts:
                    self._firsts.remove(request)
                    self.cached_tokens += request.prefix_hits
                if update.finish_reason is not None:
                    self._numbers.pop(request, None)
                if update.finish_reason == "cancelled":
                    raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
                if update.finish_reason == "error":
                    raise ApiError(500, "the engine failed; the server's log says why", code="engine_failed")
            if self._filters:
                ready = [one for given in ready if (one := await self._filtered(*given)) is not None]
            if ready:
                yield ready

    async def _filtered(self, number: int, update: Update) -> tuple[int, Update] | None:
        """Return an update as the filters let it through, None after they ended its request."""
        chain = self._chains.setdefault(number, Chain(self._filters))
        if chain.refused is not None:
            return None
        text = await push(chain, update.text, update.finish_reason is not None)
        if chain.refused is None:
            return number, dataclasses.replace(update, text=text)
        for request, other in list(self._numbers.items()):
            if other == number:
                self._service.cancel(request)
                del self._numbers[request]
        return number, dataclasses.replace(update, text=text, finish_reason="content_filter")


async def run(
    served: Served,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    max_tokens: int | None = None,
    *,
    n: int = 1,
    constraint: Callable[[], Constraint] | None = None,
    param: str = "messages",
) -> Generation:
    """Submit n requests for each prompt and return once all are queued; request p · n + i is choice i of prompt p.

    sampling: choice 0 has its seed (None draws one), and those of the others are derived from that. max_tokens: None
    for what fits. constraint: makes the constraint of one request. param: the field that the prompts came from.
    Raises ApiError if a prompt does not fit, a setting is out of range, or the queue is full.
    """
    seed = engine_seed(sampling.seed)
    samplings = [dataclasses.replace(sampling, seed=_seed_of_choice(seed, choice)) for choice in range(n)]
    rooms = [room(served, prompt, max_tokens, param) for prompt in prompts]
    service = served.need_service()
    most = service.most_waiting + service.engine.slots
    if len(prompts) * n > most:
        raise ApiError(
            400,
            f"{len(prompts)} prompts × n={n} are more than the {most} requests that this server holds; send fewer at a "
            "time",
            param="n" if n > 1 else param,
        )
    generation = Generation(served)
    try:
        for prompt, most_tokens in zip(prompts, rooms, strict=True):
            constraints = [None if constraint is None else constraint() for _ in samplings]
            generation.submit(prompt, samplings, most_tokens, constraints)
    except InputError as error:
        generation.close()
        raise ApiError(400, str(error), param=param_of(error, param)) from error
    except BaseException:
        generation.close()
        raise
    return generation


def room(served: Served, prompt: Prompt, max_tokens: int | None, param: str) -> int:
    """Return the most new tokens of a prompt: max_tokens, or fewer if the window ends before. None: all that fit.

    Raises ApiError if the prompt itself, with one token more unless max_tokens is 0, does not fit.
    """
    used = 1 if served.config.stack == "encoder-decoder" else len(prompt)
    if max(len(prompt), used + (max_tokens != 0)) > served.capacity:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens, but the window of {served.name!r} is {served.capacity} tokens, "
            "prompt and output together",
            param=param,
            code="context_length_exceeded",
        )
    left = served.capacity - used
    return left if max_tokens is None else min(max_tokens, left)


def engine_seed(seed: int | None) -> int:
    """Return the engine's seed, of 32 bits, for a client's, of 64 bits with sign; None draws one."""
    if seed is not None and 0 <= seed < 2**32:
        return seed
    entropy = None if seed is None else seed % 2**64
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _seed_of_choice(seed: int, choice: int) -> int:
    """Return the seed of choice i; choice 0 has the seed itself, as a request with n=1."""
    return seed if choice == 0 else int(np.random.SeedSequence([seed, choice]).generate_state(1)[0])


def sampling_of(body: GenerationRequest, served: Served, logprobs: int) -> Sampling:
    """Return the settings of a request; logprobs: number of most likely tokens. Raises ApiError with the field."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, f"best_of={body.best_of} must be n={body.n or 1}, or left out", param="best_of")
    if body.min_tokens and dict(_forms(body)):
        raise ApiError(400, "min_tokens goes without a response_format, which says where it ends", param="min_tokens")
    if served.behaviour is not None:
        fields = ("return_token_ids", "prompt_logprobs", "logprobs")
        asked = {name: getattr(body, name, None) for name in fields} | ({"logprobs": logprobs} if logprobs else {})
        served.behaviour.check_shown(list(asked.items()), isinstance(body, ChatRequest))
    if body.stop and served.tokenizer is None:
        served.need_tokenizer("stop")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    try:
        return Sampling(
            **{name: value for name, value in given.items() if value is not None},
            top_k=max(body.top_k or 0, 0),
            logit_bias=_biases(body, served),
            stop_ids=_stop_ids(body, served),
            stop_strings=tuple(dict.fromkeys(stops)),
            logprobs=logprobs,
            seed=engine_seed(body.seed),
            min_tokens=body.min_tokens or 0,
        )
    except InputError as error:
        raise ApiError(400, str(error), param=param_of(error, None)) from error


def _stop_ids(body: GenerationRequest, served: Served) -> tuple[int, ...]:
    """Return the tokens that end the text: the model's, those of its tokenizer, and the request's own."""
    ends = () if body.ignore_eos else served.end_ids
    stop_ids = tuple(dict.fromkeys([*ends, *(body.stop_token_ids or ())]))
    if len(stop_ids) > MOST_STOP_IDS:
        most = MOST_STOP_IDS - len(ends)
        raise ApiError(400, f"stop_token_ids has more than {most} ids; give fewer", param="stop_token_ids")
    return stop_ids


async def constraint_of(body: GenerationRequest, served: Served) -> Callable[[], Constraint] | None:
    """Return what makes the constraint of each text; None if the text is free.

    Raises ApiError with the field if the schema or the pattern is refused.
    """
    asked = dict(_forms(body))
    if len(asked) > 1:
        raise ApiError(400, f"{' and '.join(asked)} exclude each other; give one of them", param=list(asked)[-1])
    if not asked:
        return None
    ((param, (kind, value)),) = asked.items()
    served.need_tokenizer(param)

    def make() -> Constraint:
        grammars = served.grammars
        if kind == "json_object":
            return grammars.json_object()
        return grammars.regex(value) if kind == "regex" else grammars.json_schema(value)

    try:
        await anyio.to_thread.run_sync(make)  # compiles it, which takes milliseconds
    except InputError as error:
        raise ApiError(400, str(error), param=param) from error
    return make


def _forms(body: GenerationRequest) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield (field, (kind, schema or pattern)) of each constraint of a request."""
    form = body.response_format
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format.json_schema is missing", param="response_format.json_schema")
        yield "response_format", ("json_schema", form.json_schema.schema)
    elif form is not None and form.type == "json_object":
        yield "response_format", ("json_object", None) if form.schema is None else ("json_schema", form.schema)
    elif form is not None and form.type == "regex":
        if form.pattern is None:
            raise ApiError(400, "response_format.pattern is missing", param="response_format.pattern")
        yield "response_format", ("regex", form.pattern)
    if body.guided_json is not None:
        yield "guided_json", ("json_schema", _schema(body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        yield "guided_regex", ("regex", body.guided_regex)
    if body.guided_choice is not None:
        yield "guided_choice", ("regex", _alternatives(body.guided_choice))
    if body.structured_outputs is not None:
        yield from _structured(body.structured_outputs)


def _structured(given: StructuredOutputs) -> Iterator[tuple[str, tuple[str, Any]]]:
    for name in ("grammar", "structural_tag", "whitespace_pattern"):
        if getattr(given, name) is not None:
            where = f"structured_outputs.{name}"
            raise ApiError(
                400, f"{where} is not supported here; leave it out", param=where, code="unsupported_parameter"
            )
    if given.json is not None:
        yield "structured_outputs.json", ("json_schema", _schema(given.json, "structured_outputs.json"))
    if given.regex is not None:
        yield "structured_outputs.regex", ("regex", given.regex)
    if given.choice is not None:
        yield "structured_outputs.choice", ("regex", _alternatives(given.choice))
    if given.json_object:
        yield "structured_outputs.json_object", ("json_object", None)


def _schema(given: Any, param: str) -> Any:
    """Return a schema that may be given as its text."""
    if not isinstance(given, str):
        return given
    try:
        return msgspec.json.decode(given)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"{param} is no JSON: {error}", param=param) from error


def _alternatives(texts: Sequence[str]) -> str:
    """Return a regular expression that matches these texts."""
    return "|".join(_MARKS.sub(r"\\\g<0>", text) for text in texts)


def _biases(body: GenerationRequest, served: Served) -> dict[int, float]:
    biases = {}
    for name, bias in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 20 and int(name) < served.config.vocab_size):
            raise ApiError(
                400,
                f"logit_bias has the key {name[:40]!r}, which is no id of a token; ids are 0 to "
                f"{served.config.vocab_size - 1}",
                param="logit_bias",
            )
        biases[int(name)] = -math.inf if bias <= _BAN else bias
    return biases


def param_of(error: InputError, other: str | None) -> str | None:
    """Return the field that a message "name=value must be …" is about, `other` for other messages."""
    name = str(error).partition("=")[0]
    name = _FIELDS.get(name, name)
    return name if name in GenerationRequest.__struct_fields__ else other


class Call(Protocol):
    """A request that has been queued."""

    generation: Generation

    def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""

    async def whole(self) -> Any:
        """Return the whole response."""


async def answered(request: HttpRequest, call: Call, stream: bool | None) -> Any:
    """Return the response of a call: a stream of its events, or the whole. A client that leaves cancels it."""
    if stream:
        return EventStream(call.events(), call.generation.close)
    with call.generation:
        return await attended(request, call.whole())


def identity(prefix: str, served: Served) -> dict[str, Any]:
    """Return the fields that all chunks of a response share; prefix: of its id."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": served.fingerprint,
    }


async def attended(request: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, which is cancelled when the client leaves. Raises ApiError then."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(CLIENT_LEFT, "the client left")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
