"""Encode tasks for `train.RunOptions(tasks=…)`, which scores them at every validation of a run."""

from collections.abc import Sequence
from pathlib import Path

from experiments.evaluate.encode import encode_pairs
from experiments.evaluate.tasks.synthetic import SYNTHETIC
from experiments.evaluate.tasks.task import Question, Task
from model.errors import InputError, UnknownNameError, check_at_least_one
from model.tokenizer import Tokenizer, load_tokenizer
from train.task_sets import EncodedQuestion, TaskSet

ITEMS = 500
"""Questions of a task, by default."""


def read_task(name: str, items: int = ITEMS) -> Task:
    """Return the first questions of a choice task.

    Raises UnknownNameError, and InputError for another kind of task.
    """
    check_at_least_one(items=items)
    if name not in SYNTHETIC:
        raise UnknownNameError("task", name, SYNTHETIC, guess=False)
    task = SYNTHETIC[name](items, 0)
    if task.kind != "choice":
        raise InputError(f"the task {name} is of kind {task.kind}; during training, tasks of kind choice are scored")
    return task.replace(questions=task.questions[:items])


def task_sets(names: Sequence[str], tokenizer: str | Path, items: int = ITEMS) -> tuple[TaskSet, ...]:
    """Return the first `items` questions of tasks as token ids.

    tokenizer: a path, such as the folder of a run's data. Raises as `read_task` does.
    """
    if not names:
        return ()
    tasks, loaded = [read_task(name, items) for name in names], load_tokenizer(tokenizer)
    return tuple(encode_task(task, loaded) for task in tasks)


def encode_task(task: Task, tokenizer: Tokenizer) -> TaskSet:
    """Return the questions of a task, without shots, as token ids."""
    texts = [pair for question in task.questions for pair in _texts(task, question)]
    pairs = encode_pairs(tokenizer, texts, task.boundary)
    encoded, first = [], 0
    for question in task.questions:
        own = pairs[first : first + len(question.choices)]
        first += len(question.choices)
        encoded.append(
            EncodedQuestion(
                id=question.id,
                pairs=tuple((tuple(pair[0]), tuple(pair[1])) for pair in own),
                gold=question.gold,
                num_bytes=tuple(len(choice.encode()) for choice in question.choices),
                characters=tuple(map(len, question.choices)),
                cluster=question.cluster,
            )
        )
    return TaskSet(task.name, tuple(encoded))


def _texts(task: Task, question: Question) -> list[tuple[str, str]]:
    """Return the context and the continuation of each choice."""
    queries = question.queries or (question.query,) * len(question.choices)
    return [(query, task.delimiter + choice) for query, choice in zip(queries, question.choices, strict=True)]
