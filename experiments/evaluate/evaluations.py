"""Read a folder of answers of several models, and check that they answered the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.evaluate.answers import Answers, in_file_name, read_answers, read_results
from experiments.evaluate.summary import common_metrics
from experiments.words import counted, is_or_are
from model.errors import InputError


@dataclass(frozen=True)
class Entry:
    """The answers of one model on one task, under one protocol."""

    model: str
    """The model's name, with the hash where two models share it."""
    task: str
    protocol: str
    """With settings that differ from the protocol's own, as in the file's name: olmes.0-shot."""
    answers: Answers

    @property
    def ids(self) -> list[str]:
        """The ids of the questions, in the task's order."""
        return [str(row["id"]) for row in self.answers.rows]

    @property
    def metrics(self) -> list[str]:
        """The metrics that every answer has."""
        return common_metrics(self.answers.rows)


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
    """Read the answers below a folder of `isoflop eval --out`.

    Raises `InputError` if it has none, or a file is damaged.
    """
    read = [(file, read_answers(file)) for file in sorted(folder.glob("*/*.jsonl"))]
    if not read:
        raise InputError(
            f"{folder} has no answers; make them with isoflop eval MODEL MODEL --tasks TASK --out {folder}"
        )
    hashes: dict[str, set[str]] = {}
    for _, answers in read:
        hashes.setdefault(answers.header["model"], set()).add(answers.header["model_hash"])

    def named(source: Mapping[str, Any]) -> str:
        name, digest = source["model"], source["model_hash"]
        return name if len(hashes.get(name, ())) < 2 else f"{name}-{digest[:8]}"

    entries = [Entry(named(one.header), one.header["task"], _protocol(file, one.header), one) for file, one in read]
    results = [
        row | {"model": named(row)} for row in read_results(folder) if row["model_hash"] in hashes.get(row["model"], ())
    ]
    models = dict.fromkeys([row["model"] for row in results] + [entry.model for entry in entries])
    return Evaluations(folder, tuple(models), tuple(entries), tuple(results))


def _protocol(file: Path, header: Mapping[str, Any]) -> str:
    """Return the protocol with its settings: what follows the task in the name of the file."""
    start = in_file_name(f"{header['task']}.{header['protocol']}")
    return header["protocol"] + (file.stem.removeprefix(start) if file.stem.startswith(start) else "")


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
                "shots, and all with --chat or none"
            )


def _prompt(row: Mapping[str, Any]) -> Any:
    """Return what must be equal between models: the hash of the prompt, or without one the size of the text."""
    return row.get("prompt_sha256", row.get("bytes"))
