"""Write and read answers files, JSONL with a header and a line per question, and the results.json beside them."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.inputs import read_json
from experiments.locks import locked
from model.errors import InputError
from train.files import write_atomically, write_json

SCHEMA_VERSION = 1
RESULTS = "results.json"
_HEADER = ("schema_version", "model", "model_hash", "task", "protocol", "metric", "questions", "task_hash", "settings")
_ROW = ("id", "cluster", "metrics")
_RESULT = ("model", "model_hash", "task")


@dataclasses.dataclass(frozen=True)
class Answers:
    """header: model, task, protocol and settings. rows: one per question, in the task's order."""

    header: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


class TaskAnswers(NamedTuple):
    """rows: one per question, in order, as in an answers file. truncated: questions whose context was cut."""

    rows: list[dict[str, Any]]
    truncated: int


def write_answers(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write an answers file atomically: a stopped command leaves the old file or none."""
    lines = [{"schema_version": SCHEMA_VERSION} | dict(header), *rows]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_answers(path: str | Path) -> Answers:
    """Return the header and rows of an answers file.

    Raises InputError if the file cannot be read, was cut off, or is not of this format.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    parsed = [_parsed(path, number, line) for number, line in enumerate(lines, 1)]
    if "task_hash" not in parsed[0]:
        raise InputError(
            f"{path} is not an answers file: its first line should be the header that `isoflop eval` writes"
        )
    header, rows = parsed[0], parsed[1:]
    version = header.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema_version {version}, this isoflop reads {SCHEMA_VERSION}; evaluate again")
    _need(path, 1, header, _HEADER)
    for number, row in enumerate(rows, 2):
        _need(path, number, row, _ROW)
    if len(rows) != header["questions"]:
        raise InputError(
            f"{path} has {len(rows):,} of {header['questions']:,} answers; it was cut off: delete it and evaluate again"
        )
    if not rows:
        raise InputError(f"{path} has no answers; delete it and evaluate again")
    return Answers(header, rows)


def in_file_name(text: str) -> str:
    """Return a text as it stands in the name of an answers file or its folder."""
    return re.sub(r"[^\w.-]+", "-", text)


def read_results(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a folder's results.json; none without that file. Raises InputError if it is another's."""
    file = out / RESULTS
    if not file.is_file():
        return []
    document = read_json(file)
    rows = document.get("results") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= {*_RESULT} for row in rows):
        raise InputError(f"{file} is not the results.json that `isoflop eval` writes; choose another folder")
    return rows


def keep_result(out: Path, result: Mapping[str, Any]) -> None:
    """Put a result into results.json, in the place of an earlier one of the same answers file.

    Processes that evaluate into one folder wait for each other, so that none loses what another has written.
    """
    with locked(out):
        kept = [one for one in read_results(out) if one.get("answers") != result["answers"]]
        write_json(out / RESULTS, {"schema_version": SCHEMA_VERSION, "results": [*kept, result]})


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number} is damaged ({error}); delete the file and evaluate again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {number} should be a JSON object; delete the file and evaluate again")
    return value


def _need(path: Path, number: int, row: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in row:
            raise InputError(f"{path}, line {number} lacks {name!r}; delete the file and evaluate again")
