"""Detokenize generated ids as they arrive, in linear time, and end the text at the first stop string."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from model.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # U+FFFD, which decoders write for bytes that are not a whole UTF-8 character
_MOST_UNFINISHED = 3  # bytes, and so ids: a UTF-8 character has up to four bytes
_MOST_CONTEXT = 32  # ids
_DROP_FROM = 32  # pending ids from which bytes that are not text are dropped
_PROMPT_END = 256  # ids at the end of the prompt that are decoded


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text: `model.tokenizer.Tokenizer`, or any object with this method."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids."""


class IncrementalDecoder:
    """Decode the ids of a continuation chunk by chunk: decode(prompt + ids) without decode(prompt).

    A continuation decoded by itself is a different text: sentencepiece drops the space before its first word. Each id
    is therefore decoded after a short context of earlier ids whose own text is known, so that n ids cost O(n).

    Ids are pending until their text ends with a whole character. Example with one id per byte, of the text "aé":
    "a" is returned at once, 0xC3 is pending since it decodes to U+FFFD, and 0xA9 completes "é".
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = ()):
        self._decoder = decoder
        # Many models have more rows in their embedding than their tokenizer has tokens: ids from here on have no text.
        self._vocab_size = decoder.vocab_size if isinstance(decoder, Tokenizer) else None
        self._context: list[int] = []
        self._context_text = ""
        self._pending = self._with_token(prompt[-_PROMPT_END:])
        self._unfinished = 0  # number of pending ids after which the text is known to end within a character
        self._returned = 0  # characters of the pending ids' text that were returned already
        self._drop_from = _DROP_FROM
        self._settle()
        # What the prompt's last bytes decode to, usually "" or U+FFFD: the continuation may complete the character.
        self._prompt_rest = self._text_of(len(self._pending))[self._returned :]

    @property
    def has_pending(self) -> bool:
        """True if the text of the last ids is not complete."""
        return bool(self._pending)

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that these ids add, as far as no later id can change it."""
        self._pending += self._with_token(ids)
        return self._without_prompt_rest(self._settle())

    def finish(self) -> str:
        """Return the text of the pending ids as it is."""
        text = self._text_of(len(self._pending))[self._returned :]
        self._pending, self._unfinished, self._returned = [], 0, 0
        return self._without_prompt_rest(text)

    def _with_token(self, ids: Iterable[int]) -> list[int]:
        return [token for token in map(int, ids) if self._vocab_size is None or token < self._vocab_size]

    def _without_prompt_rest(self, text: str) -> str:
        """Remove from the start of the text what the prompt's last bytes decoded to, unless they were completed."""
        rest = self._prompt_rest
        while text and rest and text[0] == rest[0]:
            text, rest = text[1:], rest[1:]
        self._prompt_rest = "" if text else rest
        return text

    def _text_of(self, count: int) -> str:
        """Return the text that the first `count` pending ids add to the context."""
        if not count:
            return ""
        whole = self._decoder.decode(self._context + self._pending[:count])
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        # Some decoders turn a whole run of bytes into U+FFFD if one byte is invalid. Text already returned stays.
        return self._decoder.decode(self._pending[:count])

    def _settle(self) -> str:
        """Return the new text of the pending ids up to the last whole character.

        If the text is whole after one of the last few ids, the ids up to there are no longer pending. Otherwise the
        bytes are not UTF-8, and only the last three can still become part of a character.
        """
        pending = len(self._pending)
        if pending == self._unfinished:
            return ""
        texts = {}  # by number of ids
        fewest = max(self._unfinished, pending - _MOST_UNFINISHED - 1, 0)
        for count in range(pending, fewest, -1):
            texts[count] = self._text_of(count)
            if not texts[count].endswith(_REPLACEMENT):
                return self._release(count, texts[count], texts[pending])
        settled = pending - _MOST_UNFINISHED
        text = texts.get(settled) or self._text_of(max(settled, 0))
        # A token may end with the first bytes of a character: the text before those bytes is whole.
        text = max(text, texts[pending].rstrip(_REPLACEMENT), key=len)
        new = text[self._returned :]
        self._returned, self._unfinished = max(self._returned, len(text)), pending
        if pending >= self._drop_from:
            self._drop_invalid_bytes(texts[pending])
        return new

    def _release(self, count: int, text: str, text_of_all: str) -> str:
        """Remove the first `count` ids, which add `text`, from the pending ones; return the text not returned yet.

        The next id may begin with whole characters, such as a token "b" + 0xC3 after "a": then `text` is "a",
        `text_of_all` is "ab\\ufffd", and "b" is returned although its id stays pending.
        """
        if len(self._context) != 1 or not self._context_text.strip():
            self._choose_context(self._context + self._pending[:count], self._context_text + text)
        whole = text_of_all.rstrip(_REPLACEMENT)
        begun = whole[len(text) :] if whole.startswith(text) else ""
        new = (text + begun)[self._returned :]
        del self._pending[:count]
        self._unfinished, self._returned, self._drop_from = len(self._pending), len(begun), _DROP_FROM
        return new

    def _choose_context(self, ids: list[int], text: str) -> None:
        """Choose as context the last few of these ids, which decode to `text`.

        A context is long enough if it contains a visible character and decodes to the end of the text, ignoring leading
        spaces, which some decoders drop. It need not be the text directly before the pending ids.
        """
        for count in (1, 2, 4, 8, 16, _MOST_CONTEXT):
            tail = self._decoder.decode(ids[-count:])
            visible = tail.strip().strip(_REPLACEMENT)
            if (visible and text.endswith(tail.lstrip())) or count == _MOST_CONTEXT:
                self._context, self._context_text = ids[-count:], tail
                return
            if count >= len(ids):
                self._context, self._context_text = ids, text
                return
            if self._context_text.strip():  # the present context is good enough
                return

    def _drop_invalid_bytes(self, text: str) -> None:
        """Drop the first half of many pending bytes that are not text, so that n of them cost O(n).

        They are dropped at an id where the two halves, decoded separately, give the same `text` as all of them.
        """
        half = len(self._pending) // 2
        for count in range(half, half + 8):
            first = self._text_of(count)
            second = self._decoder.decode(self._context + self._pending[count:]).removeprefix(self._context_text)
            if first + second == text and len(first) <= self._returned:
                del self._pending[:count]
                self._unfinished, self._returned = len(self._pending), self._returned - len(first)
                return
        self._drop_from *= 2


class _Character(NamedTuple):
    """A character that may belong to a stop string. is_text: False in the name of a special token."""

    character: str
    is_text: bool
    id_index: int  # of the id that it begins in


class Detokenizer:
    """The text that a continuation adds to its prompt, up to the first stop string.

    `push` takes new ids; `finish` ends the text. Ids without a token, and special tokens, have no text.

    Stop strings are searched in the text with the names of special tokens inserted, so they may contain such names. The
    text ends where the first stop string begins. "First" is by its beginning: if a stop string is complete that begins
    within a possible earlier one, the search waits until the earlier one is complete or impossible.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()):
        self.ids_before_stop: int | None = None
        """Number of ids that the text before the stop string consists of; None while no stop string was found.

        The last of these ids may extend into the stop string. An id that begins with the stop string is not counted.
        """
        self._decoder, self._stop_strings = IncrementalDecoder(decoder, prompt), tuple(stop_strings)
        self._special: Mapping[int, str] = decoder.special_tokens if isinstance(decoder, Tokenizer) else {}
        self._taken: list[str] = []  # parts of `text` that `take` returned
        self._parts: list[str] = []  # of `text` after those
        self._pushed = 0  # ids
        self._pending_from = 0  # index of the first id whose text is not complete
        self._undecided: deque[_Character] = deque()  # end of the text, which may begin a stop string
        self._decided_ids = 0  # ids up to the last one with a decided character

    @property
    def text(self) -> str:
        """The part of the text that no later id can change; after `finish` the whole text.

        Before that it lacks a character whose last byte has not arrived, and characters that may begin a stop string
        (at most its length − 1).
        """
        return "".join([*self._taken, *self._parts])

    @property
    def decided_ids(self) -> int:
        """The number of ids that no stop string can remove any more."""
        return self._decided_ids if self._stop_strings else self._pushed

    def take(self) -> str:
        """Return the part of `text` that was not returned by an earlier call."""
        new = "".join(self._parts)
        self._taken.append(new)
        self._parts.clear()
        return new

    def push(self, ids: Sequence[int]) -> None:
        """Append the next ids of the continuation. Ids after a stop string are ignored."""
        if not self._stop_strings:
            self._pushed += len(ids)
            self._parts.append(self._decoder.push(ids))
            return
        for token in ids:
            if self.ids_before_stop is not None:
                return
            self._push_one(int(token))
            self._search()

    def finish(self) -> None:
        """End the text: release what was held back, in which a stop string may still be found."""
        if self.ids_before_stop is not None:
            return
        self._append(self._decoder.finish())
        self._search(final=True)

    def _push_one(self, token: int) -> None:
        index, self._pushed = self._pushed, self._pushed + 1
        if not self._decoder.has_pending:
            self._pending_from = index
        self._append(self._decoder.push([token]))
        self._undecided.extend(_Character(character, False, index) for character in self._special.get(token, ""))

    def _append(self, text: str) -> None:
        """Append text that the newest id completed; its first character begins in the first pending id."""
        if not self._stop_strings:
            self._parts.append(text)
            return
        newest = self._pushed - 1
        for place, character in enumerate(text):
            self._undecided.append(_Character(character, True, newest if place else self._pending_from))

    def _search(self, final: bool = False) -> None:
        """Move characters that cannot belong to a stop string to the text; end the text where a stop string begins.

        final: no more characters will come, so that no stop string is left incomplete.
        """
        undecided = "".join(one.character for one in self._undecided)
        for start in range(len(undecided)):
            if any(undecided.startswith(stop, start) for stop in self._stop_strings):
                self.ids_before_stop = max(self._decided_ids, self._undecided[0].id_index)
                self._undecided.clear()
                return
            if not final and any(stop.startswith(undecided[start:]) for stop in self._stop_strings):
                return
            decided = self._undecided.popleft()
            self._decided_ids = decided.id_index + 1
            if decided.is_text:
                self._parts.append(decided.character)


def continuation_text(decoder: Decoder, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that these ids add to the prompt's: see `Detokenizer`."""
    words = Detokenizer(decoder, prompt)
    words.push(ids)
    words.finish()
    return words.text
