"""Define a task: questions, how a prompt is built from them, and which metric is quoted."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from model.errors import InputError, check_number, check_whole

Kind = Literal["choice", "generation", "text"]
Boundary = Literal["common-prefix", "lm-eval"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One item of a task, before shots and chat template.

    query: text before the answer, such as "Question: …\\nAnswer:". queries: one per choice instead, where the choices
    complete different texts (WinoGrande). choices: texts of the answers, without the delimiter. gold: indices of the
    correct choices. answers: correct answers of a generation task; any one counts. unconditional: the context after
    which pointwise mutual information scores the choices; None: the task's. cluster: name shared by questions that are
    not independent, such as a subject or a passage. shot: the question with its answer as an example for others; None:
    query, delimiter and first correct choice or answer. description: text before all shots; None: the task's. For a
    text task, query is the text and cluster its domain. extra: fields that a scorer needs.
    """

    id: str
    query: str
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    queries: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    unconditional: str | None = None
    cluster: str = ""
    shot: str | None = None
    description: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions, and the protocol by which they are asked and scored.

    protocol: name of a published way to ask and score, which every number carries. metric: the one that is quoted.
    chance: its expected value for answers at random; None: that of equally likely choices, if the metric counts them.
    pool: questions from which shots are taken; (): the task's own, without the question itself. shots: number of shots
    of the protocol. fixed_shots: the first ones of the pool for every question, instead of a draw for each.
    shots_of_cluster: take them from the question's own cluster of the pool, such as its subject. ready: each query is
    the whole prompt, shots included. delimiter, separator: between query and answer, and between shots. chat_delimiter:
    the delimiter after a chat template. unconditional: as in `Question`; None: no such scores. boundary: where the ids
    of context and continuation part. truncate: cut a context that is too long for the model at its beginning, as
    lm-evaluation-harness does, instead of raising an error. stop, max_new_tokens, scorer: of generation tasks. source:
    package, version, file, split.
    """

    name: str
    protocol: str
    kind: Kind
    questions: tuple[Question, ...]
    metric: str
    chance: float | None = None
    pool: tuple[Question, ...] = ()
    shots: int = 0
    fixed_shots: bool = False
    shots_of_cluster: bool = False
    ready: bool = False
    description: str = ""
    delimiter: str = " "
    chat_delimiter: str = ""
    separator: str = "\n\n"
    unconditional: str | None = None
    boundary: Boundary = "common-prefix"
    truncate: bool = False
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    scorer: str = "exact_match"
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> "Task":
        """Return a copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def hash(self) -> str:
        """SHA-256 over all that determines the prompts and their scores; not over `source`."""
        fields = dataclasses.asdict(self) | {"source": None}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def chance_of(task: Task) -> float | None:
    """Return the expected value of the metric for answers at random, None if the metric has none."""
    if task.chance is not None or task.kind != "choice" or not task.metric.startswith("acc"):
        return task.chance
    shares = math.fsum(len(question.gold) / len(question.choices) for question in task.questions)
    return shares / len(task.questions)


def check_task(task: Task) -> None:
    """Raise InputError, naming the question, unless the task can be asked and scored."""
    where = f"task {task.name}"
    for field, known in (("kind", get_args(Kind)), ("boundary", get_args(Boundary))):
        if getattr(task, field) not in known:
            raise InputError(f"{where}: {field}={getattr(task, field)!r} should be one of {', '.join(known)}")
    check_whole(f"{where}: shots", task.shots, 0)
    check_whole(f"{where}: max_new_tokens", task.max_new_tokens, 1)
    if not task.questions:
        raise InputError(f"{where} has no questions; give it at least one")
    metrics = METRICS[task.kind]
    if task.kind != "generation" and task.metric not in metrics:
        raise InputError(f"{where}: metric={task.metric!r} should be one of {', '.join(metrics)}")
    seen: set[str] = set()
    for question in task.questions:
        here = f"{where}, question {question.id!r}"
        if question.id in seen:
            raise InputError(f"{here}: the id is given twice; ids pair the answers of two models")
        seen.add(question.id)
        if task.kind == "choice":
            _check_choices(question, here)
        elif task.kind == "generation" and not question.answers and task.scorer != "ifeval":
            raise InputError(f"{here} has no answers; give at least one correct answer")
        elif task.kind == "text" and not question.query:
            raise InputError(f"{here} has no text; leave it out")
    counts = {len(question.choices) for question in task.questions}
    if task.kind == "choice" and task.metric.startswith("acc") and counts == {1}:
        raise InputError(f"{where}: {task.metric} needs two choices or more; with one, use bits_per_byte or greedy")
    if task.kind == "choice" and 1 in counts and len(counts) > 1:
        raise InputError(f"{where} has questions with one choice and others with several; make them two tasks")
    is_missing = task.unconditional is None and any(question.unconditional is None for question in task.questions)
    if task.metric == "acc_pmi" and is_missing:
        raise InputError(f'{where}: acc_pmi needs a context without the question, such as unconditional = "Answer:"')
    if task.chance is not None:
        check_number(f"{where}: chance", task.chance, least=0, most=1)


METRICS: dict[str, tuple[str, ...]] = {
    "choice": ("acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_pmi", "bits_per_byte", "prob", "greedy"),
    "generation": (),
    "text": ("bits_per_byte", "perplexity"),
}
"""Metrics by kind; those of a generation task are its scorer's."""


def _check_choices(question: Question, here: str) -> None:
    choices = question.choices
    if not choices:
        raise InputError(f"{here} has no choices; give at least one")
    if not all(choices):
        raise InputError(f"{here}: choice {choices.index('')} is an empty text, which has no log-probability")
    if len(set(question.gold)) < len(question.gold):
        raise InputError(f"{here}: gold={list(question.gold)} names a choice twice; name each correct one once")
    if not question.gold or not all(0 <= index < len(choices) for index in question.gold):
        raise InputError(f"{here}: gold={list(question.gold)} should be indices of its {len(choices)} choices, from 0")
    if question.queries and len(question.queries) != len(choices):
        raise InputError(f"{here} has {len(question.queries)} queries for {len(choices)} choices; give one for each")
