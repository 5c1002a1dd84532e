"""Filters of text: word lists, regular expressions and functions, on whole texts and on streams.

A stream is filtered as its whole text would be. What is held back is only what could still become a match: of a word
list the beginning of a word; of a regular expression the last `longest` characters, since any of them could begin a
match; of a function the line that is being written.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from model.errors import InputError

Action = Literal["refuse", "replace", "flag"]
LONGEST_LINE = 2000  # characters of a line that a function is given at a time
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")
_UNBOUNDED = 2**20  # characters: a width that is none


class Match(NamedTuple):
    """A match in a text; replacement: the function's own, None for the filter's."""

    start: int
    end: int
    replacement: str | None = None


class Matcher(Protocol):
    """What finds matches in a text that grows at its end."""

    def find(self, text: str, begin: int, whole: bool) -> Match | int:
        """Return the first match from `begin` on, if nothing more can change it, or where one could still begin.

        whole: the text does not grow any more; then the second is its length. At most one character before `begin` is
        read.
        """
        ...


class Words:
    """Finds words without regard to case, as whole words: "ass" is none in "class"."""

    def __init__(self, words: Sequence[str]):
        """Raises InputError for a list that is empty or has an empty word."""
        self._words = sorted({word.lower() for word in words}, key=len, reverse=True)
        if not self._words or not all(word.strip() for word in self._words):
            raise InputError("words must be a list of words, none of them empty")
        self._longest = len(self._words[0])
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, self._words))})(?!\w)", re.IGNORECASE)

    def find(self, text: str, begin: int, whole: bool) -> Match | int:
        """See `Matcher`."""
        found = self._pattern.search(text, begin)
        if whole:
            return len(text) if found is None else Match(*found.span())
        first = next(
            (i for i in range(max(begin, len(text) - self._longest), len(text)) if self._begins(text, i)), None
        )
        if found is None or (first is not None and first <= found.start()):
            return len(text) if first is None else first
        return Match(*found.span())

    def _begins(self, text: str, start: int) -> bool:
        """Return whether the end of the text from here on could become a word, or is one if no letter follows."""
        if start and (text[start - 1].isalnum() or text[start - 1] == "_"):
            return False
        end = text[start:].lower()
        return any(word.startswith(end) for word in self._words)


class Pattern:
    """Finds a regular expression in Python's syntax; a match has at most `longest` characters."""

    def __init__(self, pattern: str, longest: int | None = None):
        """longest: needed where the expression has no bound of its own. Raises InputError for a damaged expression."""
        try:
            self._pattern = re.compile(pattern)
            width = int(re._parser.parse(pattern).getwidth()[1])  # type: ignore[attr-defined]
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"pattern={pattern!r} is no regular expression: {error}") from error
        if _LOOKS_AROUND.search(pattern):
            raise InputError(
                f"pattern={pattern!r} looks around itself, which a stream cannot do; leave out (?=…) and (?!…)"
            )
        if self._pattern.match("") is not None:
            raise InputError(
                f"pattern={pattern!r} matches the empty text, which is everywhere; make it match something"
            )
        if longest is None and width >= _UNBOUNDED:
            raise InputError(
                f"pattern={pattern!r} matches texts of any length; give longest = the most characters of a match, "
                "which a stream holds back"
            )
        self.longest = width if longest is None else min(longest, width)

    def find(self, text: str, begin: int, whole: bool) -> Match | int:
        """See `Matcher`."""
        place = begin
        while (found := self._pattern.search(text, place)) is not None:
            start = found.start()
            if not whole and len(text) <= start + self.longest:  # more could make it longer
                return min(start, max(begin, len(text) - self.longest))
            if found.end() - start > self.longest:
                found = self._pattern.match(text, start, start + self.longest)
            if found is not None and found.end() > start:
                return Match(*found.span())
            place = start + 1
        return len(text) if whole else max(begin, len(text) - self.longest)


class Function:
    """Gives a Python function each line; it returns True for a match, a text in place of the line, or None or False."""

    def __init__(self, function: Callable[[str], Any]):
        self._function = function

    def find(self, text: str, begin: int, whole: bool) -> Match | int:
        """See `Matcher`."""
        while begin < len(text):
            end = text.find("\n", begin, begin + LONGEST_LINE)
            end = begin + LONGEST_LINE if end < 0 else end
            if end >= len(text) and not whole:
                return begin
            end = min(end, len(text))
            if end > begin:
                result = self._function(text[begin:end])
                if result is not None and not isinstance(result, bool | str):
                    raise TypeError(f"a filter returned {result!r}; it must return None, True, False or a text")
                if result is True or isinstance(result, str):
                    return Match(begin, end, result if isinstance(result, str) else None)
            begin = end + (end < len(text) and text[end] == "\n")
        return len(text)


class Filter(NamedTuple):
    """What is found, and what happens then. replacement: in place of a match. message: of a refusal."""

    name: str
    matcher: Matcher
    action: Action
    replacement: str = "***"
    message: str = "this was refused by a filter of the server"

    def on_stream(self) -> "Filtered":
        """Return the filter of one stream."""
        return Filtered(self)


class Filtered:
    """A stream that is filtered. matched: there was a match. refused: the text has ended before it."""

    def __init__(self, given: Filter):
        self._filter = given
        self._text, self._begin = "", 0  # what is not decided, after at most one character that is
        self.matched = self.refused = False

    def push(self, text: str, whole: bool = False) -> str:
        """Return the text that these characters decide. whole: they are the last ones."""
        if self.refused:
            return ""
        self._text += text
        parts = []
        while True:
            found = self._filter.matcher.find(self._text, self._begin, whole)
            if isinstance(found, int):
                parts.append(self._text[self._begin : found])
                self._begin = found
                break
            parts.append(self._text[self._begin : found.start])
            self.matched = True
            if self._filter.action == "refuse":
                self.refused = True
                self._text, self._begin = "", 0
                return "".join(parts)
            if self._filter.action == "flag":
                parts.append(self._text[found.start : found.end])
            else:
                parts.append(self._filter.replacement if found.replacement is None else found.replacement)
            self._begin = found.end
        kept = max(self._begin - 1, 0)
        self._text, self._begin = self._text[kept:], self._begin - kept
        return "".join(parts)


class Chain:
    """Filters of one stream, each of the text that the one before it lets through."""

    def __init__(self, filters: Sequence[Filter]):
        self._stages = [(one, one.on_stream()) for one in filters]

    def push(self, text: str, whole: bool = False) -> str:
        """Return the text that these characters decide. whole: they are the last ones."""
        for _, stage in self._stages:
            text = stage.push(text, whole)
            whole = whole or stage.refused
        return text

    @property
    def is_slow(self) -> bool:
        """True if a function is called, which may take any time."""
        return any(isinstance(one.matcher, Function) for one, _ in self._stages)

    @property
    def matched(self) -> list[Filter]:
        """The filters that have found something."""
        return [one for one, stage in self._stages if stage.matched]

    @property
    def refused(self) -> Filter | None:
        """The filter that ended the text, if any."""
        return next((one for one, stage in self._stages if stage.refused), None)
