"""Read what people hand in as text or small files, and check folders that they name."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.records import check_output_folder


def read_value(text: str) -> Any:
    """Read a value as in JSON; .5 and 1. are numbers too; anything else is text."""
    with suppress(ValueError):
        return json.loads(text)
    with suppress(ValueError):
        return float(text) if text[:1] in tuple("+-.0123456789") else text
    return text


def read_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Read `num_layers=4` and the like as {name: value}. Raises InputError for another form, or a name given twice."""
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
    """Return the content of a JSON file. Raises InputError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None


def check_free(folder: Path, kind: str, lacking: str, advice: str) -> None:
    """Raise InputError unless a new sweep or study (`kind`) may begin in this folder: it is absent or empty.

    Hidden files do not count. lacking: the missing sign of an earlier one, for the message; advice: the suggested fix.
    """
    check_output_folder(folder, f"a {kind}", lacking, advice, ignore_hidden=True)
