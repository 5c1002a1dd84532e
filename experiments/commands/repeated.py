"""Merge repeated flags of a command line: values of a list are collected, and no value is dropped silently."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

_CHANGES = ("--set", "--base")
"""Flags whose values are NAME=VALUE of fields that may have flags of their own."""


def each_once(command: Callable[..., None], arguments: Sequence[str]) -> list[str]:
    """Return the arguments with every flag once: `--set a=1 --seed 2 --set b=3` as `--set a=1 b=3 --seed 2`.

    Raises InputError if a flag of one value is given twice, or a field both by its own flag and by --set.
    """
    if {"-h", "--help"} & set(arguments):
        return list(arguments)
    lists, groups = _list_flags(command), _by_flag(arguments)
    found: dict[str, list[str]] = {}
    for flag, values in groups:
        if flag in found and flag not in lists and values:
            given = ", ".join((*found[flag], *values))
            _refuse(f"{flag} is given twice ({given}), and takes one value; give it once")
        found.setdefault(flag, []).extend(values)
    _check_changes(found)
    return [word for flag, values in found.items() for word in ((flag, *values) if flag else values)]


def _by_flag(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return every flag with the words behind it; words before the first flag belong to the flag ""."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word.partition("=")
            groups.append((flag.replace("_", "-"), [value] if equals else []))
        else:
            groups[-1][1].append(word)
    return groups


def _list_flags(command: Callable[..., None]) -> set[str]:
    """Return the flags of a command that take several values."""
    return {f"--{name.replace('_', '-')}" for name, kind in _parameters(command) if typing.get_origin(kind) is tuple}


def _parameters(command: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, type) of a command's parameters; a dataclass is replaced by its fields."""
    for name, parameter in inspect.signature(command).parameters.items():
        kind = parameter.annotation
        while typing.get_origin(kind) is typing.Annotated:
            kind = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from _parameters(kind)  # type: ignore[arg-type]
        else:
            yield name, kind


def _check_changes(found: dict[str, list[str]]) -> None:
    """Raise InputError if a field is given by two flags; a sweep's axis may give the steps that --steps gives."""
    by: dict[str, str] = {}
    for changes in _CHANGES:
        for name in (value.partition("=")[0] for value in found.get(changes, ())):
            own = f"--{name.replace('_', '-')}"
            other = own if own in found and own != "--steps" else by.get(name, changes)
            if other != changes:
                _refuse(f"{name} is given by {other} and by {changes}; give it once")
            by[name] = changes


def _refuse(sentence: str) -> NoReturn:
    from model.errors import InputError  # imported here, because it imports JAX, and help should be fast

    raise InputError(sentence)
