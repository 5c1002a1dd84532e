"""Build the prompts of a task: description, shots and question, as plain text or through a chat template."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.evaluate.tasks.task import Question, Task
from experiments.words import counted
from model.errors import InputError, check_whole
from model.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """A question as it is put to a model.

    contexts: text before each choice; one for a generation task. continuations: delimiter and choice; () for a
    generation task. unconditional: the context without the question, for pointwise mutual information. Contexts from a
    chat template are of type `ChatText`, as is then the unconditional one. messages: what the template was applied to,
    as JSON; "": no template.
    """

    question: Question
    contexts: tuple[str, ...]
    continuations: tuple[str, ...] = ()
    unconditional: str | None = None
    messages: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The context and continuation of each choice."""
        contexts = self.contexts * (len(self.continuations) if len(self.contexts) == 1 else 1)
        return list(zip(contexts, self.continuations, strict=True))

    @property
    def sha256(self) -> str:
        """SHA-256 of all texts before the chat template, which belongs to the model: models may differ in it."""
        texts = self.messages or json.dumps([self.contexts, self.continuations, self.unconditional])
        return hashlib.sha256(texts.encode()).hexdigest()


def with_settings(task: Task, *, shots: int | None = None, fixed_shots: bool = False, limit: int | None = None) -> Task:
    """Return the task with another number of shots, or with its first questions only; the pool of shots stays whole.

    Raises InputError if there are not that many shots, or the task's prompts are ready-made.
    """
    if shots is not None or fixed_shots:
        if task.ready or task.kind == "text":
            reason = "its requests hold their shots" if task.ready else "texts have none"
            raise InputError(f"task {task.name} under protocol {task.protocol} takes no --shots: {reason}")
        if shots is not None:
            check_whole("shots", shots, 0)
            task = task.replace(shots=int(shots))
        task = task.replace(fixed_shots=fixed_shots or task.fixed_shots)
    if limit is not None:
        check_whole("limit", limit, 1)
        if not task.pool and task.shots:
            task = task.replace(pool=task.questions)
        task = task.replace(questions=task.questions[:limit])
    return task


def build_prompts(task: Task, *, seed: int = 0, chat: Tokenizer | None = None) -> list[Prompt]:
    """Return the prompt of each question. seed: of the draw of shots. chat: the tokenizer whose template is applied.

    Raises InputError if there are fewer shots than the task asks for, or if ready prompts are to become a chat.
    """
    if chat is not None and (task.ready or task.kind == "text"):
        raise InputError(
            f"task {task.name} under protocol {task.protocol} has ready prompts, which --chat cannot change; leave it "
            "out"
        )
    draw = _Shots(task, seed)
    return [_prompt(task, question, draw.of(question), chat) for question in task.questions]


def _prompt(task: Task, question: Question, shots: Sequence[Question], chat: Tokenizer | None) -> Prompt:
    description = task.description if question.description is None else question.description
    queries = question.queries or (question.query,)
    delimiter = task.delimiter
    if chat is None:
        before = description + "".join(_shot_text(task, shot) + task.separator for shot in shots)
        contexts: tuple[str, ...] = tuple(before + query for query in queries)
    else:
        delimiter = task.chat_delimiter
        turns: list[dict[str, Any]] = [{"role": "system", "content": description.strip()}] if description else []
        for shot in shots:
            turns += [{"role": "user", "content": _query_of(shot)}, {"role": "assistant", "content": _answer_of(shot)}]
        conversations = [[*turns, {"role": "user", "content": query}] for query in queries]
        contexts = tuple(map(chat.apply_chat_template, conversations))
    continuations = tuple(delimiter + choice for choice in question.choices) if task.kind == "choice" else ()
    unconditional = task.unconditional if question.unconditional is None else question.unconditional
    if task.kind != "choice":
        unconditional = None
    if chat is None:
        return Prompt(question, contexts, continuations, unconditional)
    messages = json.dumps([conversations, continuations, unconditional])
    if unconditional is not None:  # the choice has the same tokens after the same template
        unconditional = chat.apply_chat_template([{"role": "user", "content": unconditional}])
    return Prompt(question, contexts, continuations, unconditional, messages)


def _query_of(question: Question) -> str:
    return question.queries[question.gold[0]] if question.queries else question.query


def _answer_of(question: Question) -> str:
    return question.choices[question.gold[0]] if question.choices else question.answers[0]


def _shot_text(task: Task, question: Question) -> str:
    if question.shot is not None:
        return question.shot
    return _query_of(question) + task.delimiter + _answer_of(question)


class _Shots:
    """Draw shots for the questions of a task."""

    def __init__(self, task: Task, seed: int):
        self._task, self._seed = task, seed
        self._pool = task.pool or task.questions
        self._own = not task.pool or task.pool[0] is task.questions[0]
        self._by_cluster: dict[str, list[Question]] = {}
        for question in self._pool:
            self._by_cluster.setdefault(question.cluster, []).append(question)

    def of(self, question: Question) -> list[Question]:
        """Return the shots of a question, never the same text or, in a task's own pool, one of its cluster.

        The draw depends on seed, task and question only: neither on other questions nor on their order.
        """
        number = self._task.shots
        if not number or self._task.ready:
            return []
        pool = self._by_cluster.get(question.cluster, []) if self._task.shots_of_cluster else self._pool
        random_ = random.Random(f"{self._seed} {self._task.name} {question.id}")
        order = range(len(pool)) if self._task.fixed_shots else _in_random_order(len(pool), random_)
        found: list[Question] = []
        for index in order:
            if self._may_show(pool[index], question):
                found.append(pool[index])
                if len(found) == number:
                    return found
        raise InputError(
            f"task {self._task.name}, question {question.id!r}: the pool has {counted(len(found), 'other question')}, "
            f"fewer than {number} shots; ask for at most {len(found)}"
        )

    def _may_show(self, shot: Question, question: Question) -> bool:
        if shot.query == question.query and (
            shot.id == question.id or sorted(shot.choices) == sorted(question.choices)
        ):
            return False  # the same question, perhaps under another id
        if not self._own:
            return True
        return shot.id != question.id and (not question.cluster or shot.cluster != question.cluster)


def _in_random_order(size: int, random_: random.Random) -> Any:
    """Yield the numbers below `size` in random order, each once; the first few cost little."""
    moved: dict[int, int] = {}
    for done in range(size):
        chosen = random_.randrange(done, size)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.get(done, done)
