"""Encode tasks for `train.RunOptions(tasks=…)`, which scores them at every validation of a run."""

from collections.abc import Sequence
from pathlib import Path

from experiments.evaluate.encode import encode_pairs
from experiments.evaluate.tasks.prompts import build_prompts, with_settings
from experiments.evaluate.tasks.registry import load_task
from experiments.evaluate.tasks.task import Task
from model.errors import InputError, check_at_least_one
from model.tokenizer import Tokenizer, load_tokenizer
from train.task_sets import EncodedQuestion, TaskSet

ITEMS = 500
"""Questions of a task, by default."""


def read_task(name: str, items: int = ITEMS) -> Task:
    """Return the first questions of a choice task, without shots.

    Raises InputError as `load_task` does, and for another kind of task.
    """
    check_at_least_one(items=items)
    task = load_task(name, generated=items)
    if task.kind != "choice":
        raise InputError(
            f"the task {name} is of kind {task.kind}, and tasks of kind choice alone are scored during training; leave "
            "it out, and evaluate the trained run by `isoflop eval`"
        )
    return with_settings(task, shots=0 if task.shots and not task.ready else None, limit=items)


def task_sets(names: Sequence[str], tokenizer: str | Path, items: int = ITEMS) -> tuple[TaskSet, ...]:
    """Return the first `items` questions of tasks as token ids.

    tokenizer: a path, such as the folder of a run's data. Raises as `read_task` does.
    """
    if not names:
        return ()
    tasks, loaded = [read_task(name, items) for name in names], load_tokenizer(tokenizer)
    return tuple(encode_task(task, loaded) for task in tasks)


def encode_task(task: Task, tokenizer: Tokenizer) -> TaskSet:
    """Return the questions of a task as token ids."""
    pairs = encode_pairs(tokenizer, [pair for prompt in build_prompts(task) for pair in prompt.pairs], task.boundary)
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
