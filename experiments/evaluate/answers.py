"""Read the answers of one model on one task: a header and a line per question."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError


@dataclass(frozen=True)
class Answers:
    """What a model answered on a task. header: model, task, protocol and metric; rows: one per question, in order."""

    header: Mapping[str, Any]
    rows: list[Mapping[str, Any]]


def read_answers(path: Path) -> Answers:
    """Return the answers of a file. Raises `InputError` if it cannot be read or was cut off."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as answers: {error}") from None
    if not lines or "task" not in lines[0]:
        raise InputError(f"{path} has no header of answers; write it again with isoflop eval --out")
    if len(lines) - 1 != lines[0]["questions"]:
        raise InputError(
            f"{path} has {len(lines) - 1:,} of {lines[0]['questions']:,} answers; delete it and evaluate again"
        )
    return Answers(lines[0], lines[1:])
