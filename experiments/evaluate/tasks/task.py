"""Define a task: questions, how a prompt is built from them, and which metric is quoted."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

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
    query, delimiter and first correct choice or answer. For a text task, query is the text and cluster its domain.
    extra: fields that a scorer needs.
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
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions, and the protocol by which they are asked and scored.

    protocol: name of a published way to ask and score, which every number carries. metric: the one that is quoted.
    chance: its expected value for answers at random, where it has one. pool: questions from which shots are taken; ():
    the task's own, without the question itself. shots: number of shots of the protocol. fixed_shots: the first ones of
    the pool for every question, instead of a draw for each. boundary: where the ids of context and continuation part.
    stop, max_new_tokens, scorer: of generation tasks. source: package, version, file and licence.
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
    description: str = ""
    delimiter: str = " "
    separator: str = "\n\n"
    unconditional: str = "Answer:"
    boundary: Boundary = "common-prefix"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    scorer: str = "exact_match"
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> "Task":
        """Return a copy with these fields changed."""
        return dataclasses.replace(self, **changes)
