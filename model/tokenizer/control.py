"""Control text and content: which parts of a rendered conversation may be read as special tokens."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

# Unicode promises that these are never characters of a text.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatText(str):
    """A rendered conversation that knows which of its characters came from messages.

    masked: the same text, of the same length, in which no name of a special token can be found that begins inside a
    message: some of the messages' characters are replaced by one noncharacter. `Tokenizer.encode(…, special=True)`
    looks for special tokens in it. generated: (start, end) of what the template marks as written by the model, in
    order. `cut` gives a part that is a ChatText too; slices and sums are plain strings.
    """

    masked: str
    generated: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, masked: str | None = None, generated: tuple[tuple[int, int], ...] = ()) -> "ChatText":
        """Both texts and the marked spans; masked=None: no message holds anything that could be read as special."""
        made = super().__new__(cls, text)
        made.masked = text if masked is None else masked
        made.generated = generated
        return made

    def cut(self, start: int, end: int) -> "ChatText":
        """Return the characters from start to end; what came from messages stays known, marked spans are clipped."""
        inside = ((max(first, start), min(last, end)) for first, last in self.generated)
        generated = tuple((first - start, last - start) for first, last in inside if first < last)
        return ChatText(self[start:end], self.masked[start:end], generated)


def names_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds these names, the longest at each place; None where there are none."""
    longest_first = sorted((re.escape(name) for name in names if name), key=len, reverse=True)
    return re.compile("|".join(longest_first)) if longest_first else None


def control_parts(text: str, names: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    """Cut a text into (part, is it the name of a special token); parts are never empty.

    Of a ChatText only names outside its messages count.
    """
    masked = text.masked if isinstance(text, ChatText) else text
    done = 0
    for match in names.finditer(masked) if names else ():
        if match.start() > done:
            yield text[done : match.start()], False
        yield text[match.start() : match.end()], True
        done = match.end()
    if done < len(text):
        yield text[done:], False


def render_masked(render: Callable[[Any], str], content: Any, names: Sequence[str]) -> ChatText | None:
    """Render a conversation so that its content cannot be read as special tokens.

    render: makes the text from `content`, a tree of lists and mappings whose strings nobody vouches for. names: of the
    special tokens. Returns None where the rendering depends on names of special tokens in the content, so that the two
    cannot be told apart.

    Masked first is every character with which a name could begin, so that a name put together from several strings is
    not read either. Templates that look for such characters themselves ("</think>") would then render another text;
    for them only whole names, and beginnings of names at the end of a string, are masked.
    """
    text = render(content)
    names = [name for name in names if name]
    unused = next(mark for mark in NONCHARACTERS if mark not in text and not _occurs(mark, content))
    for find in (_first_characters(tuple(names)), _whole_names(tuple(names))):
        hidden = _replaced(content, find, unused)
        if hidden == content:
            return ChatText(text)
        masked = render(hidden)
        if len(masked) == len(text) and all(a in (b, unused) for a, b in zip(masked, text, strict=True)):
            return ChatText(text, masked)
    return None


@lru_cache(maxsize=16)
def _first_characters(names: tuple[str, ...]) -> re.Pattern[str] | None:
    return names_pattern({name[0] for name in names})


@lru_cache(maxsize=16)
def _whole_names(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Places where a name begins, or the beginning of one that the next string may complete (spaces may be cut off)."""
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    whole, partial = names_pattern(names), names_pattern(beginnings)
    if whole is None:
        return None
    either = f"(?:{whole.pattern})" + (rf"|(?:{partial.pattern})(?=\s*\Z)" if partial else "")
    return re.compile(f"(?={either}).", re.DOTALL)


def _replaced(content: Any, find: re.Pattern[str] | None, mark: str) -> Any:
    """The same tree with the first character of every match in its strings replaced, in keys too."""
    if find is None:
        return content
    if isinstance(content, str):
        return find.sub(lambda match: mark + match[0][1:], content)
    if isinstance(content, Mapping):
        return {_replaced(key, find, mark): _replaced(value, find, mark) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replaced(value, find, mark) for value in content]
    return content


def _occurs(mark: str, content: Any) -> bool:
    if isinstance(content, str):
        return mark in content
    if isinstance(content, Mapping):
        return any(_occurs(mark, part) for pair in content.items() for part in pair)
    return isinstance(content, list | tuple) and any(_occurs(mark, part) for part in content)
