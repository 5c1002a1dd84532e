"""What people hand in as text or small files: values, NAME=VALUE changes, JSON."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from model.errors import InputError


def read_value(text: str) -> Any:
    """A value as in JSON; .5 and 1. are numbers too; anything else is text."""
    with suppress(ValueError):
        return json.loads(text)
    with suppress(ValueError):
        return float(text) if text[:1] in tuple("+-.0123456789") else text
    return text


def read_changes(texts: Iterable[str]) -> dict[str, Any]:
    """`num_layers=4` and the like as {name: value}. Raises InputError where one is not of that form, or comes twice."""
    changes: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{text!r} is not of the form name=value")
        if name in changes:
            raise InputError(f"{name} is given twice, as {changes[name]} and as {value}; give it once")
        changes[name] = read_value(value)
    return changes


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises InputError where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
