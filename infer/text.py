"""Text of generated ids: decoded as they come, in linear time, and cut where a stop string begins."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from model.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character
LONGEST_UNFINISHED = 3  # bytes, and so ids at most: a UTF-8 character has up to four bytes
LONG = 32  # ids
PROMPT_END = 256  # ids of the prompt that are looked at


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that makes text: `model.tokenizer.Tokenizer`, or any object with this method."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these ids."""


class Detokenizer:
    """The text that a continuation adds to its prompt: decode(prompt + ids) without decode(prompt).

    Decoded alone, a continuation is another text: sentencepiece drops the space before its first word. `push` takes new
    ids and `finish` says that no more will come. Each id is decoded together with a few before it, enough to tell where
    its own text begins, so n ids cost O(n). Ids without a token and special tokens give no text.

    Stop strings are searched in the text with the names of special tokens in their places, so that they may name one.
    The text ends where the first stop string begins. "First" is by where it begins: if another one that began later is
    complete already, the search waits until the earlier one is complete or impossible.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()):
        self.ids_before_stop: int | None = None
        """Number of ids that the text before the stop string is made of; None as long as none came.

        The last of them may reach into the stop string. An id that begins with it is not counted.
        """
        self._decoder, self._stops = decoder, tuple(stop_strings)
        self._special: Mapping[int, str] = {}
        self._tokens: int | None = None  # ids from here on have no token
        if isinstance(decoder, Tokenizer):
            self._special, self._tokens = decoder.special_tokens, decoder.vocab_size
        self._parts: list[str] = []  # of `text`
        self._pushed = 0  # ids
        self._waiting_since = 0  # index of the first id whose text is not complete
        self._undecided: deque[tuple[str, bool, int]] = deque()  # (character, is it text, index of its id)
        self._decided_ids = 0  # ids that gave characters which are decided
        # Ids are decoded after a few others, the context, whose own text is known.
        self._context: list[int] = []
        self._context_text = ""
        self._waiting: list[int] = self._with_token(prompt[-PROMPT_END:])  # ids whose text is not complete
        self._tried = 0  # of them, whose text is known to end within a character
        self._given = 0  # characters of their text that were made already
        self._longest_waiting = LONG
        self._settle()
        self._prompts_own = self._added(len(self._waiting))[self._given :]  # what the continuation may still complete

    @property
    def text(self) -> str:
        """The part of the text that no later id can change; after `finish` all of it.

        Until then it lacks a character whose last byte has not come, and what may be the beginning of a stop string (at
        most its length − 1 characters).
        """
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, ids: Sequence[int]) -> None:
        """Take the next ids of the continuation. Ids after a stop string change nothing."""
        if not self._stops:
            self._pushed += len(ids)
            self._parts.append(self._text_of(self._with_token(ids)))
            return
        for token in ids:
            if self.ids_before_stop is not None:
                return
            self._push_one(int(token))
            self._decide()

    def finish(self) -> None:
        """Release what was held back; a stop string may still be found in it."""
        if self.ids_before_stop is not None:
            return
        made = self._added(len(self._waiting))[self._given :]
        self._waiting, self._tried, self._given = [], 0, 0
        self._add(self._without_prompts_own(made))
        self._decide(final=True)

    # ---- from ids to characters

    def _with_token(self, ids: Iterable[int]) -> list[int]:
        # Many models have more rows in their embedding than their tokenizer has tokens.
        has_token = lambda token: self._tokens is None or token < self._tokens
        return [token for token in map(int, ids) if has_token(token)]

    def _text_of(self, ids: list[int]) -> str:
        """The text that these ids add to what was made, as far as no later id can change it."""
        self._waiting += ids
        return self._without_prompts_own(self._settle())

    def _without_prompts_own(self, made: str) -> str:
        """Remove what the prompt's last bytes were decoded to, unless the continuation completed them."""
        own = self._prompts_own
        while made and own and made[0] == own[0]:
            made, own = made[1:], own[1:]
        self._prompts_own = "" if made else own
        return made

    def _added(self, count: int) -> str:
        """The text that the first ids that wait add to the context."""
        if not count:
            return ""
        whole = self._decoder.decode(self._context + self._waiting[:count])
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        # Some decoders give up a whole run of bytes for one that does not fit. What was made before stays.
        return self._decoder.decode(self._waiting[:count])

    def _settle(self) -> str:
        """Make the text of the ids that wait, all but a character at its end that is not whole.

        The ids up to the last place, of the last few, where a character ends no longer wait. If there is no such place
        the bytes are no text, and only the last of them can still become part of a character.
        """
        waiting = len(self._waiting)
        if waiting == self._tried:
            return ""
        texts = {}  # by number of ids
        for count in range(waiting, max(self._tried, waiting - LONGEST_UNFINISHED - 1, 0), -1):
            texts[count] = self._added(count)
            if not texts[count].endswith(UNFINISHED):
                return self._release(count, texts[count], texts[waiting])
        settled = waiting - LONGEST_UNFINISHED
        text = texts.get(settled) or self._added(max(settled, 0))
        # A token may end with the first bytes of a character: what stands before it is whole.
        text = max(text, texts[waiting].rstrip(UNFINISHED), key=len)
        made, self._given, self._tried = text[self._given :], max(self._given, len(text)), waiting
        if waiting >= self._longest_waiting:
            self._drop_bytes(texts[waiting])
        return made

    def _release(self, count: int, text: str, text_of_all: str) -> str:
        """Take this many ids, which add `text`, off those that wait; what of their text was not made yet."""
        if len(self._context) != 1 or not self._context_text.strip():
            self._choose_context(self._context + self._waiting[:count], self._context_text + text)
        begun = text_of_all.rstrip(UNFINISHED)  # of the next id: "a" and the first byte of "é"
        begun = begun[len(text) :] if begun.startswith(text) else ""
        made = (text + begun)[self._given :]
        del self._waiting[:count]
        self._tried, self._given, self._longest_waiting = len(self._waiting), len(begun), LONG
        return made

    def _choose_context(self, ids: list[int], text: str) -> None:
        """Take as context the last few of these ids, which decode to `text`.

        Enough are those that hold a visible character and decode to the end of the text, but for spaces at the
        beginning, which some decoders drop. Their text need not be the one just before that of the ids to come.
        """
        for count in (1, 2, 4, 8, 16, LONG):
            tail = self._decoder.decode(ids[-count:])
            if (tail.strip().strip(UNFINISHED) and text.endswith(tail.lstrip())) or count == LONG:
                self._context, self._context_text = ids[-count:], tail
                return
            if count >= len(ids):
                self._context, self._context_text = ids, text
                return
            if self._context_text.strip():  # it will do
                return

    def _drop_bytes(self, text: str) -> None:
        """Forget the first half of many bytes that are no text, at a place where the halves give the text of all."""
        half = len(self._waiting) // 2
        for count in range(half, half + 8):
            first = self._added(count)
            rest = self._decoder.decode(self._context + self._waiting[count:]).removeprefix(self._context_text)
            if first + rest == text and len(first) <= self._given:
                del self._waiting[:count]
                self._tried, self._given = len(self._waiting), self._given - len(first)
                return
        self._longest_waiting *= 2

    # ---- from characters to text, or to a stop string

    def _push_one(self, token: int) -> None:
        index, self._pushed = self._pushed, self._pushed + 1
        if not self._waiting:
            self._waiting_since = index
        self._add(self._text_of(self._with_token([token])))
        self._undecided.extend((character, False, index) for character in self._special.get(token, ""))

    def _add(self, text: str) -> None:
        """Add text of the newest id, whose first character may have begun in the ids that waited."""
        if not self._stops:
            self._parts.append(text)
            return
        newest = self._pushed - 1
        self._undecided.extend(
            (character, True, newest if place else self._waiting_since) for place, character in enumerate(text)
        )

    def _decide(self, final: bool = False) -> None:
        """Move to the text what cannot belong to a stop string, and end where one begins."""
        raw = "".join(character for character, _, _ in self._undecided)
        for place in range(len(raw)):
            if any(raw.startswith(stop, place) for stop in self._stops):
                self.ids_before_stop = max(self._decided_ids, self._undecided[0][2])
                self._undecided.clear()
                return
            if not final and any(stop.startswith(raw[place:]) for stop in self._stops):
                return
            character, is_text, index = self._undecided.popleft()
            self._decided_ids = index + 1
            if is_text:
                self._parts.append(character)


def continuation_text(decoder: Decoder, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that these ids add to the prompt's: see `Detokenizer`."""
    words = Detokenizer(decoder, prompt)
    words.push(ids)
    words.finish()
    return words.text
