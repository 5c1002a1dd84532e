"""Answers that are being written: each part is stored before it is sent, and at most one runs in a conversation."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future

import msgspec

from infer.completion import Update
from infer.serve import tree
from infer.serve.errors import ApiError
from infer.serve.generation import Generation
from infer.serve.logprobs import TokenNames, finite, first
from infer.serve.served import Served
from infer.serve.sse import EventStream, event
from infer.serve.store import Store

_LOG = logging.getLogger(__name__)


class TokenRecord(msgspec.Struct, array_like=True):
    """A token of an answer: its text, its log-probability, and the most likely tokens in its place with theirs."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


class Started(msgspec.Struct, tag="start", kw_only=True):
    """The first event: the conversation's branch, whose last message is the answer, still empty unless continued."""

    conversation: tree.Conversation


class Written(msgspec.Struct, tag="text", kw_only=True):
    """The next part of the text. tokens: how many more there are."""

    text: str
    tokens: int


class Ended(msgspec.Struct, tag="end", kw_only=True):
    """The last event: the answer as it is stored."""

    message: tree.StoredMessage


Event = Started | Written | Ended


class Answers:
    """The answers that run, by conversation. For the event loop only."""

    def __init__(self) -> None:
        self._running: dict[int, Answer] = {}

    def begin(self, conversation: int) -> "Answer":
        """Reserve a conversation for an answer. Raises ApiError 409 if one runs in it."""
        if conversation in self._running:
            raise ApiError(
                409,
                "this conversation is being answered already, perhaps in another window; stop that answer, or wait",
                code="answer_running",
            )
        answer = self._running[conversation] = Answer(self, conversation)
        return answer

    def message_of(self, conversation: int) -> int | None:
        """Return the id of the message that is being written, if any."""
        answer = self._running.get(conversation)
        return None if answer is None else answer.message

    def stop(self, conversation: int) -> bool:
        """Stop the answer in a conversation, and return whether there was one."""
        answer = self._running.get(conversation)
        if answer is not None:
            answer.stop()
        return answer is not None

    def forget(self, answer: "Answer") -> None:
        """Free the conversation of an answer."""
        if self._running.get(answer.conversation) is answer:
            del self._running[answer.conversation]


@dataclasses.dataclass(frozen=True)
class _Work:
    """What an answer consists of once it is queued. names: None if no log-probabilities are kept."""

    store: Store
    message: int
    generation: Generation
    names: TokenNames | None


class Answer:
    """One answer, from the reservation of its conversation to its end."""

    def __init__(self, answers: Answers, conversation: int):
        self._answers, self.conversation = answers, conversation
        self._work: _Work | None = None
        self._stopped = self._ended = False
        self._begun = time.perf_counter()
        self._first_token: float | None = None

    @property
    def message(self) -> int | None:
        """The id of the message that is being written; None before it is stored."""
        return None if self._work is None else self._work.message

    def start(
        self, store: Store, message: int, generation: Generation, served: Served, started: Started, logprobs: bool
    ) -> EventStream:
        """Return the response that writes a generation to a stored message. logprobs: keep those of its tokens."""
        names = TokenNames(served) if logprobs else None
        self._work = _Work(store, message, generation, names)
        if self._stopped:
            generation.close()
        return EventStream(self._events(self._work, started), self.close)

    def stop(self) -> None:
        """End the answer; its text is kept."""
        self._stopped = True
        if self._work is not None:
            self._work.generation.close()

    def close(self) -> None:
        """Free the conversation; an answer that has not ended stays partial. Further calls do nothing."""
        self._end("cancelled" if self._stopped else tree.PARTIAL)

    async def _events(self, work: _Work, started: Started) -> AsyncGenerator[bytes, None]:
        reason: str | None = None
        try:
            yield event(started)
            try:
                async for ready in work.generation:
                    for _, update in ready:
                        reason = update.finish_reason or reason
                        if update.text or update.tokens:
                            yield await self._write(work, update)
            except ApiError as error:
                if not self._stopped:
                    self._end(tree.PARTIAL if error.status == 503 else "error")
                    raise
            ending = self._end("cancelled" if self._stopped else reason or tree.PARTIAL)
            message = None if ending is None else await asyncio.wrap_future(ending)
            if message is None:
                raise tree.deleted()
            yield event(Ended(message=message))
        finally:
            self.close()

    async def _write(self, work: _Work, update: Update) -> bytes:
        """Store the next part and return its event."""
        if update.tokens and self._first_token is None:
            self._first_token = time.perf_counter() - self._begun
        logprobs = "" if work.names is None else _records(work.names, update)
        await work.store.run(tree.append, work.message, update.text, len(update.tokens), logprobs)
        return event(Written(text=update.text, tokens=len(update.tokens)))

    def _end(self, reason: str) -> "Future[tree.StoredMessage | None] | None":
        """End the answer in the store, without waiting: what is read later is read after it."""
        if self._ended:
            return None
        self._ended = True
        self._answers.forget(self)
        if self._work is None:
            return None
        self._work.generation.close()
        seconds = time.perf_counter() - self._begun
        ending = self._work.store.submit(tree.finish, self._work.message, reason, self._first_token, seconds)
        ending.add_done_callback(_log_failure)
        return ending


def _records(names: TokenNames, update: Update) -> str:
    """Return the JSON of an update's tokens, without the brackets of the list."""
    records = []
    for token, logprob, top in zip(update.tokens, update.logprobs, update.top_logprobs, strict=True):
        others = [(names.name(one), round(finite(value), 4)) for one, value in first(top, len(top))]
        records.append(TokenRecord(names.name(token), round(finite(logprob), 4), others))
    return msgspec.json.encode(records).decode()[1:-1]


def _log_failure(ending: "Future[tree.StoredMessage | None]") -> None:
    if not ending.cancelled() and (error := ending.exception()) is not None:
        _LOG.error("an answer was not ended in the store, and stays partial: %s", error)
