"""Behaviour controls of a server in one TOML file: its system prompt, filters of input and output, limits per key."""

import contextvars
import dataclasses
import importlib
import logging
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import msgspec
from msgspec import Meta, Struct

from infer.serve.errors import ApiError
from infer.serve.filters import Action, Chain, Filter, Function, Pattern, Words
from model.errors import InputError

_LOG = logging.getLogger(__name__)
HIDDEN = "the system prompt of this server, which is hidden"
_Positive = Annotated[int, Meta(ge=1)]
FLAGS: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("flags", default=None)
"""The names of filters that matched in the current request, for the header of its response."""


class SystemPrompt(Struct, forbid_unknown_fields=True):
    """A system prompt, before a client's own. visible: clients may see it, in the ids and scores of a prompt."""

    prompt: str
    visible: bool = True


class FilterTable(Struct, forbid_unknown_fields=True, kw_only=True):
    """A filter: one of words, pattern and function. See `infer.serve.filters`."""

    name: Annotated[str, Meta(min_length=1)]
    on: Annotated[list[str], Meta(min_length=1)]
    action: Action
    words: list[str] | None = None
    pattern: str | None = None
    longest: _Positive | None = None
    function: str | None = None
    replacement: str | None = None
    message: str | None = None


class Limits(Struct, forbid_unknown_fields=True, frozen=True):
    """Limits of each API key; without keys, of all clients together. tokens: of prompts and answers."""

    requests_per_minute: _Positive | None = None
    tokens_per_minute: _Positive | None = None
    concurrent: _Positive | None = None


class _Tables(Struct, forbid_unknown_fields=True):
    system: SystemPrompt | None = None
    filter: list[FilterTable] = []
    limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What a server does beside what its models do."""

    system: SystemPrompt | None = None
    inputs: tuple[Filter, ...] = ()
    outputs: tuple[Filter, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)

    @classmethod
    def read(cls, path: str | Path) -> "Behaviour":
        """Read a TOML file. Raises InputError that names the file, the key and what would be right."""
        path = Path(path)
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--behaviour {path} cannot be read: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path} is no TOML: {error}") from None
        try:
            tables = msgspec.convert(given, _Tables)
        except msgspec.ValidationError as error:
            raise InputError(f"{path}: {_told(str(error))}") from None
        filters = []
        for number, table in enumerate(tables.filter):
            try:
                filters.append((table.on, _filter(table, path.parent)))
            except InputError as error:
                raise InputError(f"{path}: filter[{number}] ({table.name!r}): {error}") from None
        names = [table.name for table in tables.filter]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{path}: two filters have the name {twice!r}; name one of them otherwise")
        by_place = {place: tuple(one for on, one in filters if place in on) for place in ("input", "output")}
        return cls(tables.system, by_place["input"], by_place["output"], tables.limits)

    @property
    def is_hidden(self) -> bool:
        """True if there is a system prompt that clients must not see."""
        return self.system is not None and not self.system.visible

    async def filtered_input(self, text: str, param: str) -> str:
        """Return a client's text as the model reads it. Raises ApiError if a filter refuses it."""
        if not self.inputs or not text:
            return text
        chain = Chain(self.inputs)
        found = await _push(chain, text, True)
        flag(chain)
        if chain.refused is not None:
            raise ApiError(400, f"{param}: {chain.refused.message}", param=param, code="content_filter")
        return found

    async def messages(self, given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages as the model reads them: filtered, after the system prompt. Raises ApiError."""
        messages = []
        for index, message in enumerate(given):
            content = message.get("content")
            if isinstance(content, str):
                message = {**message, "content": await self.filtered_input(content, f"messages[{index}].content")}
            messages.append(message)
        if self.system is None:
            return messages
        own = ""
        if messages and messages[0]["role"] == "system":
            own = f"\n\n{messages.pop(0)['content']}"
        return [{"role": "system", "content": self.system.prompt + own}, *messages]

    def check_shown(self, asked: Sequence[tuple[str, object]], is_chat: bool) -> None:
        """Raise ApiError for fields that would show what the server hides: pairs (field, value)."""
        of_prompt = ("return_token_ids", "prompt_logprobs")
        for name, value in asked:
            if value is None or value is False:
                continue
            if is_chat and self.is_hidden and name in of_prompt:
                raise hides(name, HIDDEN)
            if self.outputs and name != "prompt_logprobs":
                raise hides(name, "what the server's filters take out")


def hides(name: str, what: str) -> ApiError:
    """Return the error for a field that would show what is hidden."""
    return ApiError(400, f"{name} would show {what}; leave it out", param=name, code="unsupported_parameter")


async def push(chain: Chain, text: str, whole: bool) -> str:
    """Return the text that these characters decide; functions are called outside of the event loop."""
    found = await _push(chain, text, whole)
    if whole or chain.refused is not None:
        flag(chain)
    return found


async def _push(chain: Chain, text: str, whole: bool) -> str:
    return await anyio.to_thread.run_sync(chain.push, text, whole) if chain.is_slow else chain.push(text, whole)


def flag(chain: Chain) -> None:
    """Write the filters that matched to the log, and name those that only flag in the response's header."""
    flags = FLAGS.get()
    for one in chain.matched:
        _LOG.warning("the filter %s matched: %s", one.name, one.action)
        if flags is not None and one.action == "flag" and one.name not in flags:
            flags.append(one.name)


def _filter(table: FilterTable, folder: Path) -> Filter:
    wrong = [place for place in table.on if place not in ("input", "output")]
    if wrong:
        raise InputError(f'on = {table.on!r} must be ["input"], ["output"] or both')
    kinds = [name for name in ("words", "pattern", "function") if getattr(table, name) is not None]
    if len(kinds) != 1:
        raise InputError(
            f"has {' and '.join(kinds) or 'neither words, pattern nor function'}; give exactly one of them"
        )
    if table.longest is not None and table.pattern is None:
        raise InputError("longest goes with pattern only; leave it out")
    for name, action in (("replacement", "replace"), ("message", "refuse")):
        if getattr(table, name) is not None and table.action != action:
            raise InputError(f'{name} goes with action = "{action}" only; leave it out')
    if table.words is not None:
        matcher: Any = Words(table.words)
    elif table.pattern is not None:
        matcher = Pattern(table.pattern, table.longest)
    else:
        matcher = Function(_function(table.function or "", folder))
    texts = {name: getattr(table, name) for name in ("replacement", "message") if getattr(table, name) is not None}
    return Filter(table.name, matcher, table.action, **texts)


def _function(given: str, folder: Path) -> Any:
    """Return the function "module:function"; the module may lie beside the TOML file."""
    module, _, name = given.partition(":")
    place = os.path.abspath(folder)
    if place not in sys.path:
        sys.path.append(place)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f'function = {given!r} cannot be imported ({error}); give "module:function" of a module that is installed '
            f"or lies in {place}"
        ) from None
    if not callable(found):
        raise InputError(f"function = {given!r} is no function")
    return found


def _told(message: str) -> str:
    """Return msgspec's "Expected `int`, got `str` - at `$.limits.concurrent`" with the key first."""
    what, _, where = message.partition(" - at `$")
    key = where.rstrip("`").removeprefix(".")
    if "unknown field" in what:
        unknown = what.rsplit("`", 2)[-2]
        table = key.partition("[")[0]
        kind: Any = {"system": SystemPrompt, "filter": FilterTable, "limits": Limits}.get(table, _Tables)
        known = ", ".join(kind.__struct_fields__)
        return f"{f'{key}.' if key else ''}{unknown} is no key; keys are {known}"
    return f"{key or 'the file'}: {what[:1].lower()}{what[1:]}"
