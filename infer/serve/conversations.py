"""/api: the conversations of the chat page.

Whoever may use the server reads and changes all of them. Requests that change something must come from the server's
own page or from no page: a browser names the page in Origin.
"""

import enum
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from infer.serve import tree
from infer.serve.answers import Answers, Event, Started, TokenRecord
from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.generation import run, sampling_of
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.sse import EventStream
from infer.serve.store import Store
from infer.serve.types import ChatRequest
from infer.serve.window import Fitted, Turn, fit

_Title = Annotated[str, Meta(max_length=500)]
_ALTERNATIVES = 5  # most likely tokens that are stored with each


class ServedModel(Struct, kw_only=True):
    """A model that may answer.

    window: tokens of prompt and answer together. chats: whether it has a chat template. system: the server's system
    prompt, which stands before that of a conversation; "" for none, and for one that is hidden.
    """

    name: str
    parameters: int
    layers: int
    window: int
    weights: str
    chats: bool
    system: str


class ModelNames(Struct, kw_only=True):
    """The models of the server, the default first. stored: whether conversations outlast the server."""

    models: list[ServedModel]
    stored: bool


class Conversations(Struct, kw_only=True):
    """Conversations, the last changed first."""

    conversations: list[tree.Summary]


class Changes(Struct, kw_only=True):
    """Properties of a conversation; those left out stay as they are."""

    title: _Title | None = None
    system: str | None = None
    model: _Title | None = None


class AnswerSettings(Struct, kw_only=True, omit_defaults=True):
    """How the tokens of an answer are drawn: see /v1/chat/completions. logprobs: keep those of the tokens,
    unless the server filters its output."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=1000)]], Meta(max_length=64)] | None = None
    logprobs: bool = True


class AnswerRequest(Struct, kw_only=True):
    """What is answered.

    content: a new message of the user, below the message `parent` (null: the first; left out: the end of the branch
    that is shown). Without content, the user's message `parent` is answered again, or with continue=true the answer
    `parent` is continued. model: by default that of the conversation.
    """

    content: str | None = None
    parent: int | UnsetType | None = UNSET
    again: bool = msgspec.field(name="continue", default=False)
    model: str | None = None
    settings: AnswerSettings = msgspec.field(default_factory=AnswerSettings)


class Form(enum.Enum):
    """Form of an export."""

    JSON = "json"
    MARKDOWN = "markdown"


class Choice(Struct, kw_only=True):
    """A message whose branch is shown."""

    message: int


class Done(Struct, kw_only=True):
    """Whether there was something to do."""

    done: bool


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoints of conversations. Raises InputError if their file cannot be opened."""
    return _Api(registry, Store(settings.conversations), settings.conversations is not None).endpoints()


class _Api:
    def __init__(self, registry: Registry, store: Store, stored: bool):
        self.registry, self.store, self.stored = registry, store, stored
        self.answers = Answers()

    def endpoints(self) -> list[Endpoint]:
        one = "/api/conversations/{conversation}"
        return [
            Endpoint("GET", "/api/models", self.models, "The models that may answer.", response=ModelNames),
            Endpoint(
                "GET",
                "/api/conversations",
                self.list_all,
                "All conversations, or those with a text.",
                response=Conversations,
                query={"search": str},
            ),
            Endpoint(
                "POST",
                "/api/conversations",
                _own(self.create),
                "Begin a conversation.",
                request=Changes,
                response=tree.Conversation,
            ),
            Endpoint(
                "GET",
                one,
                self.read,
                "A conversation with the branch that is shown.",
                response=tree.Conversation,
                errors=(404,),
            ),
            Endpoint(
                "PATCH",
                one,
                _own(self.update),
                "Rename a conversation, or change its system prompt or model.",
                request=Changes,
                response=tree.Conversation,
                errors=(404,),
            ),
            Endpoint("DELETE", one, _own(self.delete), "Delete a conversation.", response=Done, errors=(404,)),
            Endpoint(
                "GET",
                f"{one}/export",
                self.export,
                "A conversation as a file: JSON with all branches, or Markdown of the branch that is shown.",
                response=tree.Conversation,
                query={"format": Form},
                errors=(404,),
            ),
            Endpoint(
                "POST",
                f"{one}/answer",
                _own(self.answer),
                "Answer a message, with events: one part of the text each, stored before it is sent.",
                request=AnswerRequest,
                events=Event,
                media_type="text/event-stream",
                errors=(404, 409, 429, 503),
            ),
            Endpoint(
                "POST",
                f"{one}/stop",
                _own(self.stop),
                "Stop the answer that is being written; its text is kept.",
                response=Done,
                errors=(404,),
            ),
            Endpoint(
                "POST",
                f"{one}/branch",
                _own(self.choose),
                "Show the branch through a message.",
                request=Choice,
                response=tree.Conversation,
                errors=(404, 409),
            ),
            Endpoint(
                "GET",
                f"{one}/messages/{{message}}/logprobs",
                self.logprobs,
                "The tokens of an answer with their log-probabilities.",
                response=list[TokenRecord],
                errors=(404,),
            ),
        ]

    async def models(self, request: Request, body: None) -> ModelNames:
        return ModelNames(models=[_described(one) for one in self.registry if one.service], stored=self.stored)

    async def list_all(self, request: Request, body: None) -> Conversations:
        search = request.query_params.get("search", "")
        return Conversations(conversations=await self.store.run(tree.list_all, _encodable(search)))

    async def create(self, request: Request, body: Changes) -> tree.Conversation:
        return await self.store.run(tree.create, body.title or "", body.system or "", body.model or "")

    async def read(self, request: Request, body: None) -> tree.Conversation:
        id = _id(request)
        return await self.store.run(tree.read, id, self.answers.message_of(id))

    async def update(self, request: Request, body: Changes) -> tree.Conversation:
        return await self.store.run(tree.update, _id(request), body.title, body.system, body.model)

    async def delete(self, request: Request, body: None) -> Done:
        id = _id(request)
        self.answers.stop(id)
        await self.store.run(tree.delete, id)
        return Done(done=True)

    async def export(self, request: Request, body: None) -> Response:
        id, form = _id(request), request.query_params.get("format", "json")
        if form == "json":
            conversation = await self.store.run(tree.export, id)
            return _file(msgspec.json.format(msgspec.json.encode(conversation), indent=2), conversation, "json")
        if form == "markdown":
            conversation = await self.store.run(tree.read, id)
            messages = [
                ("User" if one.role == "user" else f"Assistant ({one.model})", one.content)
                for one in conversation.messages
            ]
            text = tree.markdown(conversation.title, conversation.system, messages)
            return _file(text.encode(), conversation, "md")
        raise ApiError(400, f"format={form[:40]!r} must be json or markdown", param="format")

    async def stop(self, request: Request, body: None) -> Done:
        return Done(done=self.answers.stop(_id(request)))

    async def choose(self, request: Request, body: Choice) -> tree.Conversation:
        id = _id(request)
        if self.answers.message_of(id) is not None:
            raise ApiError(409, "this conversation is being answered; stop the answer first", code="answer_running")
        return await self.store.run(tree.choose, id, body.message)

    async def logprobs(self, request: Request, body: None) -> Response:
        data = await self.store.run(tree.logprobs_of, _id(request), _id(request, "message"))
        return Response(data, media_type="application/json")

    async def answer(self, request: Request, body: AnswerRequest) -> EventStream:
        """Queue an answer, store its message, and return the stream of its events."""
        id = _id(request)
        answer = self.answers.begin(id)
        generation = None
        try:
            conversation = await self.store.run(tree.read, id)
            parent = conversation.leaf if body.parent is UNSET else body.parent
            turns = [Turn(one.id, one.role, one.content) for one in await self.store.run(tree.branch, id, parent)]
            _check(body, turns)
            served = self.registry.get(body.model or conversation.model or None)
            if served.behaviour is not None and served.behaviour.outputs:
                body.settings.logprobs = False  # tokens would show what the filters take out of the text
            drawn = body.settings
            if body.content is not None:
                turns.append(Turn(None, "user", body.content))
            fitted = await fit(served, conversation.system, turns, drawn.max_tokens, body.again)
            logprobs = drawn.logprobs and served.shows_tokens
            sampling = sampling_of(_request(drawn), served, _ALTERNATIVES if logprobs else 0)
            generation = await run(served, [fitted.prompt], sampling, fitted.room)
            message = await self._store_answer(id, parent, body, served, fitted)
            started = Started(conversation=await self.store.run(tree.read, id, message))
            return answer.start(self.store, message, generation, served, started, logprobs)
        except BaseException:
            if generation is not None:
                generation.close()
            answer.close()
            raise

    async def _store_answer(
        self, id: int, parent: int | None, body: AnswerRequest, served: Served, fitted: Fitted
    ) -> int:
        """Return the id of the message that the answer is written to."""
        if body.again and parent is not None:
            await self.store.run(tree.resume_answer, id, parent, fitted.dropped)
            return parent
        return await self.store.run(
            tree.begin_answer,
            id,
            parent,
            body.content,
            model=served.name,
            settings=msgspec.to_builtins(body.settings),
            dropped=fitted.dropped,
            prompt_tokens=len(fitted.prompt),
        )


def _check(body: AnswerRequest, turns: list[Turn]) -> None:
    """Raise ApiError unless the request fits the message that it names."""
    last = turns[-1].role if turns else None
    if body.content is not None:
        if body.again:
            raise ApiError(400, "content goes without continue: a message is answered, or an answer continued")
        if not body.content.strip():
            raise ApiError(400, "content is empty; write a message", param="content")
        if last == "user":
            raise ApiError(400, "parent is a message of the user; a new one stands below an answer", param="parent")
    elif body.again:
        if last != "assistant" or not turns[-1].content.strip():
            raise ApiError(400, "continue needs an answer with some text as parent", param="parent")
    elif last != "user":
        raise ApiError(400, "without content, parent must be a message of the user", param="parent")


def _own(handler: Callable[[Request, Any], Awaitable[Any]]) -> Callable[[Request, Any], Awaitable[Any]]:
    """Return the handler for requests of the server's own page, or of no page. Others get ApiError 403."""

    async def checked(request: Request, body: Any) -> Any:
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise ApiError(403, "conversations are changed by the server's own page only", code="wrong_origin")
        return await handler(request, body)

    return checked


def _id(request: Request, name: str = "conversation") -> int:
    given = request.path_params[name]
    if not re.fullmatch("[0-9]{1,18}", given):
        raise ApiError(404, f"there is no {name} {given[:40]!r}", code=f"{name}_not_found")
    return int(given)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _request(drawn: AnswerSettings) -> ChatRequest:
    fields = msgspec.structs.asdict(drawn)
    return ChatRequest(messages=[], **{name: fields[name] for name in fields.keys() - {"max_tokens", "logprobs"}})


def _described(served: Served) -> ServedModel:
    from model.accounting import parameters

    template = None if served.tokenizer is None else served.tokenizer.chat_template
    system = None if served.behaviour is None else served.behaviour.system
    return ServedModel(
        name=served.name,
        parameters=parameters(served.config).total,
        layers=served.config.num_layers,
        window=served.capacity,
        weights=served.weights,
        chats=template is not None,
        system=system.prompt if system is not None and system.visible else "",
    )


def _file(data: bytes, conversation: tree.Conversation, suffix: str) -> Response:
    name = re.sub(r"[^a-z0-9]+", "-", conversation.title.lower()).strip("-")[:50] or "conversation"
    headers = {"content-disposition": f'attachment; filename="{name}.{suffix}"'}
    media_type = "application/json" if suffix == "json" else "text/markdown; charset=utf-8"
    return Response(data, headers=headers, media_type=media_type)
