"""Separate the special tokens of a chat template from text of the same name in messages."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

# Code points that Unicode reserves for internal use, never for characters.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatText(str):
    """A rendered conversation that records where names of special tokens came from messages.

    masked: text of the same length, in which no name of a special token begins inside a message, because some of the
    messages' characters are replaced by a noncharacter. `Tokenizer.encode(…, special=True)` looks for special tokens
    there. For a message "</s>!" the masked text may have "?/s>!", with the noncharacter for the question mark.
    generated: (start, end) of what the template marks as written by the model, in order. `cut` returns a part that is a
    ChatText too; slices and sums are plain strings.
    """

    masked: str
    generated: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, masked: str | None = None, generated: tuple[tuple[int, int], ...] = ()) -> "ChatText":
        """Create a text. masked: None if no message has text that could be read as a special token."""
        result = super().__new__(cls, text)
        result.masked = text if masked is None else masked
        result.generated = generated
        return result

    def cut(self, start: int, end: int) -> "ChatText":
        """Return the characters from start to end; what came from messages stays known, marked spans are clipped."""
        inside = ((max(first, start), min(last, end)) for first, last in self.generated)
        generated = tuple((first - start, last - start) for first, last in inside if first < last)
        return ChatText(self[start:end], self.masked[start:end], generated)


def names_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern for the longest of these names at each position, None without names."""
    longest_first = sorted((re.escape(name) for name in names if name), key=len, reverse=True)
    return re.compile("|".join(longest_first)) if longest_first else None


def control_parts(text: str, names: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    """Split a text at the names of special tokens: yield (part, is_name), without empty parts.

    In a ChatText, names inside messages are plain text.
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

    render: content → text. content: a tree of lists and mappings with untrusted strings. names: of the special tokens.
    Returns None if the rendering depends on names of special tokens in the content, so that content and template cannot
    be separated.

    The content is rendered twice, once with a noncharacter in place of some characters. If the two results differ in
    nothing but that, the second one shows where the content is. First every character that begins a name is replaced,
    so that no name can be composed of several strings. A template that looks for such characters itself ("</think>")
    then renders other text. For those only whole names are replaced, and beginnings of names at the end of a string.
    """
    text = render(content)
    names = [name for name in names if name]
    mask = next(mark for mark in NONCHARACTERS if mark not in text and not _occurs(mark, content))
    for pattern in (_first_characters(tuple(names)), _whole_names(tuple(names))):
        masked_content = _replaced(content, pattern, mask)
        if masked_content == content:
            return ChatText(text)
        masked = render(masked_content)
        if len(masked) == len(text) and all(a in (b, mask) for a, b in zip(masked, text, strict=True)):
            return ChatText(text, masked)
    return None


@lru_cache(maxsize=16)
def _first_characters(names: tuple[str, ...]) -> re.Pattern[str] | None:
    return names_pattern({name[0] for name in names})


@lru_cache(maxsize=16)
def _whole_names(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Match the first character of a whole name, or of the beginning of one at the end of a string.

    The next string could complete such a beginning; the template may strip spaces between them.
    """
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    whole, partial = names_pattern(names), names_pattern(beginnings)
    if whole is None:
        return None
    either = f"(?:{whole.pattern})"
    if partial is not None:
        either += rf"|(?:{partial.pattern})(?=\s*\Z)"
    return re.compile(f"(?={either}).", re.DOTALL)


def _replaced(content: Any, pattern: re.Pattern[str] | None, mark: str) -> Any:
    """Return the tree with the first character of each match replaced, in strings and in keys."""
    if pattern is None:
        return content
    if isinstance(content, str):
        return pattern.sub(lambda match: mark + match[0][1:], content)
    if isinstance(content, Mapping):
        return {_replaced(key, pattern, mark): _replaced(value, pattern, mark) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replaced(value, pattern, mark) for value in content]
    return content


def _occurs(mark: str, content: Any) -> bool:
    if isinstance(content, str):
        return mark in content
    if isinstance(content, Mapping):
        return any(_occurs(mark, part) for pair in content.items() for part in pair)
    return isinstance(content, list | tuple) and any(_occurs(mark, part) for part in content)
