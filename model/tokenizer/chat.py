"""Render messages to a prompt with the Jinja template of a chat model.

Templates are programs from downloaded files, so they run in Jinja's sandbox. They have the same functions, filters and
extensions as in Transformers, so that public templates render the same.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import InputError
from model.tokenizer.control import NONCHARACTERS, ChatText, render_masked

# Written around what a template marks as generated; drawn again in each process so that no text can hold them.
_BEGIN, _END = ("".join(random.SystemRandom().choices(NONCHARACTERS, k=16)) for _ in range(2))
_EITHER = re.compile(f"{_BEGIN}|{_END}")
_TAG = re.compile(r"\{%[-+]?\s*generation\b")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    tokens: Mapping[str, str],
    special: Sequence[str],
    path: Path,
) -> ChatText:
    """Render a conversation; the result records which text came from messages and variables.

    `generated` of the result has the spans that the template puts between {% generation %} and {% endgeneration %};
    none where what is around such a block changes its text. tokens: the template's variables `bos_token` and so on.
    special: names of all special tokens. path: of the tokenizer, for errors. Raises InputError if the template cannot
    be parsed or raises an error.
    """
    if isinstance(messages, str | Mapping) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise InputError('messages must be a list of at least one {"role": "user", "content": "…"}')
    # Most templates would render None as "None", so keys without a value are removed.
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]

    def text(content: Mapping[str, Any], marks: bool = False) -> str:
        known = {"tools": None, "documents": None, **tokens, **content}
        return _compiled(template, marks).render(add_generation_prompt=add_generation_prompt, **known)

    content = {**variables, "messages": present}
    try:
        rendered = render_masked(text, content, special)
        marked = text(content, marks=True) if _TAG.search(template) else None
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template of {path} is damaged at line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template can raise anything that a Python expression can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template of {path} refuses these messages: {reason}") from error
    if rendered is None:
        raise InputError(
            f"the messages have names of special tokens that the chat template of {path} would act on;"
            " remove them from the messages"
        )
    return rendered if marked is None else ChatText(rendered, rendered.masked, _spans(marked, rendered))


def check_template(template: str, path: Path) -> None:
    """Raise InputError if a template cannot be parsed. path: of its file."""
    try:
        _compiled(template, False)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template {path} is damaged at line {error.lineno}: {error.message}") from error


def _spans(marked: str, text: str) -> tuple[tuple[int, int], ...]:
    """Return where the marked parts stand in the text without marks; nothing where the marks changed the text."""
    spans, done, begin, without = [], 0, 0, ""
    for match in _EITHER.finditer(marked):
        without += marked[done : match.start()]
        done = match.end()
        if match[0] == _BEGIN:
            begin = len(without)
        elif begin < len(without):
            spans.append((begin, len(without)))
    return tuple(spans) if without + marked[done:] == text else ()


@lru_cache(maxsize=16)
def _compiled(template: str, marks: bool) -> jinja2.Template:
    return _environment(marks).from_string(template)


@lru_cache(maxsize=2)
def _environment(marks: bool) -> ImmutableSandboxedEnvironment:
    generation = _MarkedGeneration if marks else _Generation
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: marks the text that a model is trained on, and renders that text."""

    tags = {"generation"}  # noqa: RUF012 – the name and the type are Jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(self.body(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)

    def body(self, statements: list[nodes.Node]) -> list[nodes.Node]:
        """Return what stands for the block."""
        return statements


class _MarkedGeneration(_Generation):
    """The same with _BEGIN and _END around the text."""

    def body(self, statements: list[nodes.Node]) -> list[nodes.Node]:
        """Return the block between its marks."""
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
        return [begin, *statements, end]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes < and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
