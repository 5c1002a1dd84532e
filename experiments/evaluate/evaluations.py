"""Read a folder of answers of several models, and check that they answered the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.evaluate.answers import Answers, read_answers
from experiments.inputs import read_json
from experiments.words import counted, is_or_are
from model.errors import InputError


@dataclass(frozen=True)
class Entry:
    """The answers of one model on one task, under one protocol.

    model: its name, or its folder's where two models share a name.
    """

    model: str
    task: str
    protocol: str
    shots: int | None
    answers: Answers

    @property
    def ids(self) -> list[str]:
        """The ids of the questions, in the task's order."""
        return [str(row["id"]) for row in self.answers.rows]

    @property
    def metrics(self) -> list[str]:
        """The metrics that every answer has."""
        rows = self.answers.rows
        return [name for name in rows[0]["metrics"] if all(row["metrics"].get(name) is not None for row in rows)]


@dataclass(frozen=True)
class Evaluations:
    """All answers of a folder."""

    folder: Path
    models: tuple[str, ...]
    """In the order in which they were evaluated, where results.json tells it."""
    entries: tuple[Entry, ...]
    results: tuple[Mapping[str, Any], ...]
    """The rows of results.json, with the models named as here; empty without that file."""


def read_evaluations(folder: Path) -> Evaluations:
    """Read the answers below a folder of `isoflop eval --out`. Raises `InputError` if it has none, or a file is not
    complete.
    """
    read = [(file.parent.name, _whole(file)) for file in sorted(folder.glob("*/*.jsonl"))]
    if not read:
        raise InputError(
            f"{folder} has no answers; make them with isoflop eval MODEL MODEL --tasks TASK --out {folder}"
        )
    places: dict[str, set[str]] = {}
    for place, answers in read:
        places.setdefault(str(answers.header["model"]), set()).add(place)
    named = {place: model if len(all_of) == 1 else place for model, all_of in places.items() for place in all_of}
    entries = [
        Entry(named[place], one.header["task"], one.header["protocol"], one.header.get("shots"), one)
        for place, one in read
    ]
    results = [row | {"model": named[_place(row)]} for row in _results(folder) if _place(row) in named]
    models = dict.fromkeys([row["model"] for row in results] + [entry.model for entry in entries])
    return Evaluations(folder, tuple(models), tuple(entries), tuple(results))


def _whole(file: Path) -> Answers:
    answers = read_answers(file)
    count, all_of = len(answers.rows), answers.header["questions"]
    if count != all_of or count == 0:
        raise InputError(f"{file} has {count:,} answers of {all_of:,}; complete it with the same isoflop eval")
    return answers


def _results(folder: Path) -> list[dict[str, Any]]:
    file = folder / "results.json"
    if not file.is_file():
        return []
    document = read_json(file)
    return document["results"] if isinstance(document, dict) else document


def _place(row: Mapping[str, Any]) -> str:
    """Return the name of the folder that holds the answers of a row of results.json."""
    return f"{row['model']}-{row['model_hash'][:8]}"


def check_same_questions(name: str, entries: Sequence[Entry]) -> None:
    """Raise InputError unless all models answered the same questions of a task, in the same order, by the same prompts.

    name: of the task, for the message.
    """
    first = entries[0]
    for entry in entries[1:]:
        if entry.ids != first.ids:
            counts = f"{counted(len(first.ids), 'question')} of {first.model} and {len(entry.ids):,} of {entry.model}"
            raise InputError(f"{name}: the {counts} are not the same in the same order; evaluate both on the same ones")
        pairs = zip(first.answers.rows, entry.answers.rows, strict=True)
        differing = [one["id"] for one, other in pairs if _prompt(one) != _prompt(other)]
        if differing:
            count = len(differing)
            prompts = f"{counted(count, 'prompt')} of {entry.model} {is_or_are(count)} not as of {first.model}"
            raise InputError(
                f"{name}: {prompts}, the first one of {differing[0]}; evaluate both under one protocol, with the same "
                "shots and chat template"
            )


def _prompt(row: Mapping[str, Any]) -> Any:
    """Return what must be equal between models: the hash of the prompt, or the size of a text that has none."""
    return row.get("prompt_sha256", row.get("bytes"))
