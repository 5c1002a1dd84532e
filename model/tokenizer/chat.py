"""Render messages to a prompt with the Jinja template of a chat model.

Templates are programs from downloaded files, so they run in Jinja's sandbox. They have the same functions, filters and
extensions as in Transformers, so that public templates render the same.
"""

import json
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
from model.tokenizer.control import ChatText, render_masked


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

    tokens: the template's variables `bos_token` and so on. special: names of all special tokens. path: of the
    tokenizer, for errors. Raises InputError if the template cannot be parsed or raises an error.
    """
    if isinstance(messages, str | Mapping) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise InputError('messages must be a list of at least one {"role": "user", "content": "…"}')
    # Most templates would render None as "None", so keys without a value are removed.
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]

    def text(content: Mapping[str, Any]) -> str:
        known = {"tools": None, "documents": None, **tokens, **content}
        return _compiled(template).render(add_generation_prompt=add_generation_prompt, **known)

    try:
        rendered = render_masked(text, {**variables, "messages": present}, special)
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
    return rendered


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
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
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes < and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
