"""From examples to token ids and a mask of what is trained, by the tokenizer's chat template."""

import bisect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer.control import NONCHARACTERS, ChatText, names_pattern
from train.data.examples.formats import Content, Message, UnusableError

REFUSED = "refused by the chat template"
FILLED = "prompts that fill max_tokens"
UNTRAINABLE = "no trained token"
_WORTH_MARKING = 3  # answers, from which on one rendering with marks is faster than two for each answer


@dataclass(frozen=True)
class Rendered:
    """The text of one document, and (start, end) of the characters that are trained.

    is_chat: whether names of special tokens are read in it. end: the id to add at the end, trained too. left_out:
    assistant turns that are not trained, since the template writes them differently when others follow, or because
    nothing stands before them.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    is_chat: bool = False
    end: int | None = None
    left_out: int = 0

    @property
    def places(self) -> list[int]:
        """Where the spans begin and end, in order."""
        return [place for span in self.spans for place in span]

    def part(self, start: int, end: int) -> str:
        """Return a part of the text, in which messages are still told from the template's own text."""
        return self.text.cut(start, end) if isinstance(self.text, ChatText) else self.text[start:end]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The ids of one document; trained: 1 for each token that is predicted. bytes: of its text as UTF-8."""

    ids: Int32[np.ndarray, " tokens"]
    trained: UInt8[np.ndarray, " tokens"]
    bytes: int
    truncated: bool
    left_out: int = field(default=0)


class Renderer:
    """Write examples as a tokenizer's chat template has them.

    An answer is trained up to and with the token that ends its turn; the header before it is not, nor is what stands
    after that token, such as a line break.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._names = names_pattern(tokenizer.special_tokens.values())
        assert tokenizer.eos_id is not None
        self._end_id = tokenizer.eos_id
        self._end_name = tokenizer.special_tokens.get(self._end_id, "")

    def conversation(self, messages: Sequence[Message], first: int, variables: Mapping[str, Any]) -> Rendered:
        """Render a conversation in which every assistant turn from number `first` on is trained.

        Where all turns are trained and the template marks what is generated, its marks are what is trained.
        """
        whole = self._render(messages, False, variables)
        if first == 0 and whole.generated:
            ended = [(start, self._end(whole, whole.cut(0, end), start)) for start, end in whole.generated]
            return Rendered(whole, tuple((start, end) for start, end in ended if end is not None), True)
        answers = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
        if len(answers) > _WORTH_MARKING and (marked := self._marked(whole, messages, answers, variables)):
            return Rendered(whole, marked, True)
        spans = [self._answer(whole, messages, i, i + 1, variables) for i in answers]
        found = tuple(span for span in spans if span is not None)
        return Rendered(whole, found, True, left_out=len(spans) - len(found))

    def _marked(
        self, whole: ChatText, messages: Sequence[Message], answers: Sequence[int], variables: Mapping[str, Any]
    ) -> tuple[tuple[int, int], ...] | None:
        """Return the spans of the answers by one rendering in which each of them stands between two marks.

        `_answer` renders a conversation twice for each of its answers. None where the marks change anything else, as in
        a template that trims, or where the first and the last span are not those of `_answer`.
        """
        opening, closing = [mark for mark in NONCHARACTERS if mark not in whole][:2]
        marked_messages = list(messages)
        for i in answers:
            content = messages[i].get("content")
            if not isinstance(content, str):
                return None
            marked_messages[i] = {**messages[i], "content": opening + content + closing}
        try:
            text = str(self._render(marked_messages, False, variables))
        except UnusableError:
            return None
        if text.replace(opening, "").replace(closing, "") != whole or text.count(opening) != len(answers):
            return None
        spans: list[tuple[int, int]] = []
        place = 0
        for number, part in enumerate(text.split(opening)):
            if number:
                content = part.partition(closing)[0]
                end = self._end(whole, whole.cut(0, place + len(content)), place)
                if end is None:
                    return None
                spans.append((place, end))
            place += len(part) - part.count(closing)
        for number in (0, -1):
            i = answers[number]
            if self._answer(whole, messages, i, i + 1, variables) != spans[number]:
                return None
        return tuple(spans)

    def answer(self, prompt: Content, answer: Content, variables: Mapping[str, Any]) -> Rendered:
        """Render a prompt and its answer, which is trained as a whole; both plain text or both turns.

        Plain text is followed by one end token. An answer of several turns is trained from the assistant's first turn
        to the last turn.
        """
        if isinstance(prompt, str) or isinstance(answer, str):
            assert isinstance(prompt, str)
            assert isinstance(answer, str)
            text = prompt + (answer.removesuffix(self._end_name) if self._end_name else answer)
            return Rendered(text, ((len(prompt), len(text)),), end=self._end_id)
        messages = [*prompt, *answer]
        whole = self._render(messages, False, variables)
        first = next(number for number, message in enumerate(answer) if message["role"] == "assistant")
        span = self._answer(whole, messages, len(prompt) + first, len(messages), variables)
        if span is None:
            raise UnusableError(REFUSED)
        return Rendered(whole, (span,), True)

    def prompt(self, prompt: Content, variables: Mapping[str, Any]) -> Rendered:
        """Render a prompt that a model is to answer; nothing of it is trained."""
        if isinstance(prompt, str):
            return Rendered(prompt)
        return Rendered(self._render(prompt, True, variables), is_chat=True)

    def _render(self, messages: Sequence[Message], opens_answer: bool, variables: Mapping[str, Any]) -> ChatText:
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=opens_answer, **variables)
        except InputError as error:
            raise UnusableError(REFUSED, str(error)) from error

    def _answer(
        self, whole: ChatText, messages: Sequence[Message], first: int, last: int, variables: Mapping[str, Any]
    ) -> tuple[int, int] | None:
        """Return where messages first to last stand in the whole text; None where the template writes them otherwise.

        An answer begins where the prompt that opens it ends. If the template writes another opening once the answer is
        there, it begins where the two differ.
        """
        try:
            before = self._render(messages[:first], True, variables)
            after = whole if last == len(messages) else self._render(messages[:last], False, variables)
            start = len(before)
            if not after.startswith(before):
                closed = self._render(messages[:first], False, variables)
                if not after.startswith(closed):
                    return None
                start = max(len(closed), _common(before, after))
        except UnusableError:
            return None
        end = self._end(whole, after, start)
        return None if end is None else (start, end)

    def _end(self, whole: ChatText, answered: ChatText, start: int) -> int | None:
        """Return where the answer that begins at `start` ends, its end token included.

        answered: the text up to the answer, with what the template writes after it. That is the last special token
        that only special tokens and blanks follow, and from which on the whole text may differ. Without one, a special
        token that directly follows in the whole text ends the turn. None where the whole text has another answer.
        """
        ends: list[int] = []
        stop = len(answered)
        for match in reversed(list(self._names.finditer(answered.masked, start)) if self._names else []):
            if answered[match.end() : stop].strip():
                break
            ends.append(match.end())
            stop = match.start()
        if ends:
            return next((end for end in ends if whole.startswith(answered[:end])), None)
        if not whole.startswith(answered):
            return None
        following = self._names.match(whole.masked, stop) if self._names else None
        return following.end() if following else stop


def encode(tokenizer: Tokenizer, documents: Sequence[Rendered], max_tokens: int | None) -> list[Encoded | str]:
    """Return ids and mask of each document, or the reason why it has none.

    A token is trained if it lies in a span: the first one of a span is the first in which the ids of the whole text
    differ from those of the text before the span. A document keeps its first max_tokens tokens (None: all); one of
    whose answer nothing is left has no ids, nor has a prompt that is longer. The first token of a document is never
    trained, for nothing stands before it.
    """
    names = names_pattern(tokenizer.special_tokens.values())
    pieces = [_pieces(document, names) for document in documents]
    ids_of: dict[bool, Iterator[list[int]]] = {}
    for is_chat in (False, True):
        texts = [
            text
            for document, (_, parts) in zip(documents, pieces, strict=True)
            if document.is_chat is is_chat
            for text in (document.text, *(part for _, part in parts))
        ]
        ids_of[is_chat] = iter(tokenizer.encode_batch(texts, special=is_chat) if texts else [])
    results: list[Encoded | str] = []
    for document, (count, parts) in zip(documents, pieces, strict=True):
        encoded = ids_of[document.is_chat]
        whole = next(encoded)
        befores = [(special, next(encoded)) for special, _ in parts]
        borders = _borders(tokenizer, document, whole, count, befores)
        results.append(_masked(tokenizer, document, whole, borders, max_tokens))
    return results


def _pieces(document: Rendered, names: re.Pattern[str] | None) -> tuple[int, list[tuple[int, str]]]:
    """Return (special tokens in the text, what stands before each place where a span begins or ends).

    What stands before is (number of special tokens, text from the last of them on): special tokens cut a text into
    parts that are encoded by themselves, so all before the last one has the same ids as in the whole.
    """
    masked = document.text.masked if isinstance(document.text, ChatText) else ""
    found = list(names.finditer(masked)) if names and document.is_chat else []
    ends = [match.end() for match in found]
    parts = []
    for place in document.places:
        special = bisect.bisect_right(ends, place)
        parts.append((special, document.part(found[special - 1].start() if special else 0, place)))
    return len(found), parts


def _borders(
    tokenizer: Tokenizer, document: Rendered, whole: list[int], count: int, befores: list[tuple[int, list[int]]]
) -> list[int]:
    """Return how many ids of the whole are those of the text before each place where a span begins or ends."""
    special = tokenizer.special_tokens
    places = [place for place, i in enumerate(whole) if i in special] if document.is_chat else []
    if len(places) != count:  # a special token that the library reads otherwise than by its name
        return [
            _common(whole, tokenizer.encode(document.part(0, place), special=document.is_chat))
            for place in document.places
        ]
    borders = []
    for number, ids in befores:
        start = places[number - 1] if number else 0
        borders.append(start + _common(whole[start : start + len(ids)], ids))
    return borders


def _masked(
    tokenizer: Tokenizer, document: Rendered, whole: list[int], borders: list[int], max_tokens: int | None
) -> Encoded | str:
    ids = np.array(whole if document.end is None else [*whole, document.end], np.int32)
    trained = np.zeros(len(ids), np.uint8)
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        trained[begin:end] = 1
    trained[len(whole) :] = 1
    trained[:1] = 0
    size, truncated = len(document.text.encode()), max_tokens is not None and len(ids) > max_tokens
    is_prompt = not document.spans and document.left_out == 0
    if truncated:
        if is_prompt or not trained[:max_tokens].any():
            return FILLED if is_prompt or trained.any() else UNTRAINABLE
        ids, trained = ids[:max_tokens], trained[:max_tokens]
        size = len(tokenizer.decode(ids.tolist()).encode())
    if not len(ids) or not (is_prompt or trained.any()):
        return UNTRAINABLE
    return Encoded(ids, trained, size, truncated, document.left_out)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many characters, or ids, both begin with."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])
