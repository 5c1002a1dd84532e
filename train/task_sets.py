"""Evaluate a run on multiple-choice tasks: encoded questions, the rows that they are packed into, and their metrics."""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from jaxtyping import Float32, Float64, Int32

from model import ModelConfig
from model.errors import InputError, UnknownNameError
from train.clusters import cluster_ids, standard_error
from train.data.packing import best_fit_decreasing
from train.objectives.objective import Batch, BatchSpec

HIGHER_IS_BETTER = {"acc": True, "acc_norm": True, "bits_per_byte": False}
"""Metrics of a choice task, and whether more is better.

acc: the share of questions whose most likely choice is correct. acc_norm: the same with log-probabilities per
character. bits_per_byte: of the correct choice, which says more than a choice where all models are near chance.
"""
_PREDICTIONS = 8  # of a row are rounded up to a multiple of it
ERROR = "_standard_error"  # suffix of a metric's name
logger = logging.getLogger("isoflop")


@dataclasses.dataclass(frozen=True)
class EncodedQuestion:
    """A question as token ids.

    pairs: ids of (context, continuation) for each choice. gold: indices of the correct choices. num_bytes, characters:
    length of each choice's text. cluster: name shared by questions that are not independent; "": none.
    """

    id: str
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    gold: tuple[int, ...]
    num_bytes: tuple[int, ...]
    characters: tuple[int, ...]
    cluster: str = ""


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """The encoded questions of a choice task, the same ones at every validation."""

    name: str
    questions: tuple[EncodedQuestion, ...]

    @property
    def choices(self) -> int:
        """The number of choices of all questions."""
        return sum(len(question.pairs) for question in self.questions)

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics that say something of it: with one choice a question, every answer would be correct."""
        has_choice = any(len(question.pairs) > 1 for question in self.questions)
        return tuple(HIGHER_IS_BETTER) if has_choice else ("bits_per_byte",)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its metrics in a run's record, without their standard errors."""
        return tuple(f"{self.name}/{metric}" for metric in self.measured)


def chooses_correctly(values: Float64[np.ndarray, " choices"], gold: Sequence[int]) -> int:
    """Return 1 if the choice of the largest value is correct, else 0; of equal ones the first counts, as in lm-eval."""
    return int(int(values.argmax()) in gold)


def bits_per_byte(log_prob: float, num_bytes: int) -> float:
    """Return the bits per byte of a text from its log-probability in nats; a text without bytes counts as one byte."""
    return float(-log_prob / math.log(2) / max(num_bytes, 1))


def is_task_metric(name: str) -> bool:
    """Return whether the name has the form TASK/METRIC."""
    return "/" in name


def task_of(name: str) -> str:
    """Return the task of a metric named TASK/METRIC."""
    return name.rpartition("/")[0]


def higher_is_better(name: str) -> bool:
    """Return whether more is better of a metric named TASK/METRIC. Raises UnknownNameError."""
    metric = name.rpartition("/")[2]
    if metric not in HIGHER_IS_BETTER:
        raise UnknownNameError("metric of a task", metric, HIGHER_IS_BETTER)
    return HIGHER_IS_BETTER[metric]


def check_model(config: ModelConfig, task_sets: Sequence[TaskSet]) -> None:
    """Raise InputError for a model that cannot score choices, a name given twice, and a task without questions."""
    if not task_sets:
        return
    if config.head != "language-model" or config.stack != "decoder":
        raise InputError(
            f"a model with stack={config.stack!r} and head={config.head!r} cannot score the choices of a task during "
            "training, which takes a decoder with head='language-model'; leave the tasks out"
        )
    names = [one.name for one in task_sets]
    if len(set(names)) < len(names):
        raise InputError(f"the tasks {' '.join(names)} name one twice; give each once")
    if empty := [one.name for one in task_sets if not one.questions]:
        raise InputError(f"the task {empty[0]} has no questions; take at least one")


@dataclasses.dataclass(frozen=True, eq=False)
class PackedTasks:
    """The choices of several task sets in batches of one shape, each choice in a segment of its own.

    batches: as `packed_spec` says. scored holds the positions in a row at which a token of a choice, in targets, is
    predicted; loss_mask is 0 for padding. requests: number of the choice that each prediction is of, −1 for padding;
    choices are counted through all questions of all task sets. shortened: choices whose context was cut at its
    beginning.
    """

    task_sets: tuple[TaskSet, ...]
    batches: list[Batch]
    requests: list[Int32[np.ndarray, "batch scored"]]
    shortened: int

    @property
    def row(self) -> tuple[int, int] | None:
        """Tokens and predictions of a row; None without task sets."""
        if not self.batches:
            return None
        return self.batches[0]["tokens"].shape[1], self.batches[0]["targets"].shape[1]

    @property
    def tokens(self) -> int:
        """Tokens that an evaluation reads, including padding."""
        return sum(batch["tokens"].size for batch in self.batches)

    def results(self, nats: Sequence[Float32[np.ndarray, "batch scored"]]) -> list["TaskResult"]:
        """Return the result of each task set, from the nats of every prediction of every batch."""
        count = sum(one.choices for one in self.task_sets)
        log_probs = np.zeros(count, np.float64)
        for numbers, values in zip(self.requests, nats, strict=True):
            there = numbers >= 0
            log_probs -= np.bincount(numbers[there], values[there].astype(np.float64), minlength=count)
        found, first = [], 0
        for one in self.task_sets:
            found.append(TaskResult(one, log_probs[first : first + one.choices]))
            first += one.choices
        return found


def packed_spec(rows: int, seq_len: int, predictions: int) -> BatchSpec:
    """Return the shape and dtype of every array of a batch of packed choices."""
    read = {name: jax.ShapeDtypeStruct((rows, seq_len), np.int32) for name in ("tokens", "positions", "segment_ids")}
    predicted = {name: jax.ShapeDtypeStruct((rows, predictions), np.int32) for name in ("scored", "targets")}
    return read | predicted | {"loss_mask": jax.ShapeDtypeStruct((rows, predictions), np.float32)}


def pack(task_sets: Sequence[TaskSet], config: ModelConfig, batch_size: int, seq_len: int) -> PackedTasks:
    """Return the choices packed into batches of `batch_size` rows, by best-fit decreasing.

    Rows have `seq_len` tokens, or the smallest multiple of it that holds the longest choice with its context, as far as
    the model's context goes. What is longer loses tokens at the beginning of its context, with one warning. An empty
    context becomes the first of the model's `eos_token_ids`. Raises InputError if a choice alone is too long, or if
    `check_model` does.
    """
    check_model(config, task_sets)
    pairs = [pair for one in task_sets for question in one.questions for pair in question.pairs]
    if not pairs:
        return PackedTasks((), [], [], 0)
    eos = tuple(config.eos_token_ids[:1])
    if not eos and not all(context for context, _ in pairs):
        raise InputError("a choice has an empty context and the model no eos_token_ids to stand for it; set them")
    texts = [(*(context or eos), *continuation) for context, continuation in pairs]
    if max(map(max, texts)) >= config.vocab_size:
        raise InputError(f"an id of a task is outside the model's vocab_size={config.vocab_size}; encode it again")
    longest = max(map(len, texts)) - 1  # the last token is not read
    most = config.max_seq_len // seq_len * seq_len
    width = min(math.ceil(longest / seq_len) * seq_len, most)
    for _, continuation in pairs:
        if not 0 < len(continuation) <= width:
            raise InputError(
                f"a choice of {len(continuation)} tokens, of one of {', '.join(one.name for one in task_sets)}, does "
                f"not fit into rows of {width}; take another task, or a model with a larger max_seq_len"
            )
    shortened = sum(len(text) > width + 1 for text in texts)
    if shortened:
        logger.warning(
            "%d of %d choices of the tasks lose tokens at the beginning of their context, which is longer than the "
            "model's %d tokens",
            shortened,
            len(texts),
            width,
        )
    texts = [text[-width - 1 :] for text in texts]
    return _packed(
        tuple(task_sets), texts, [len(continuation) for _, continuation in pairs], batch_size, width, shortened
    )


def _packed(
    task_sets: tuple[TaskSet, ...],
    texts: Sequence[tuple[int, ...]],
    scored: Sequence[int],
    batch_size: int,
    width: int,
    shortened: int,
) -> PackedTasks:
    lengths = np.array([len(text) - 1 for text in texts], np.int64)
    row_of = best_fit_decreasing(lengths, width)
    most = int(np.bincount(row_of, scored).max())
    predictions = min(math.ceil(most / _PREDICTIONS) * _PREDICTIONS, width)
    rows = math.ceil((int(row_of.max()) + 1) / batch_size) * batch_size
    arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in packed_spec(rows, width, predictions).items()}
    requests, segments = np.full((rows, predictions), -1, np.int32), np.zeros(rows, int)
    used, predicted = np.zeros(rows, int), np.zeros(rows, int)
    for number, (text, row, length) in enumerate(zip(texts, row_of.tolist(), lengths.tolist(), strict=True)):
        end, until = used[row] + length, predicted[row] + scored[number]
        read, here = slice(used[row], end), slice(predicted[row], until)
        used[row], predicted[row] = end, until
        segments[row] += 1
        arrays["tokens"][row, read] = text[:-1]
        arrays["positions"][row, read] = np.arange(length)
        arrays["segment_ids"][row, read] = segments[row]
        arrays["scored"][row, here] = np.arange(end - scored[number], end)
        arrays["targets"][row, here] = text[-scored[number] :]
        arrays["loss_mask"][row, here] = 1
        requests[row, here] = number
    parts = [slice(first, first + batch_size) for first in range(0, rows, batch_size)]
    batches = [{name: array[part] for name, array in arrays.items()} for part in parts]
    return PackedTasks(task_sets, batches, [requests[part] for part in parts], shortened)


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResult:
    """What a model answers to the questions of a task. log_probs: of each choice, question by question."""

    task_set: TaskSet
    log_probs: Float64[np.ndarray, " choices"]

    @functools.cached_property
    def by_question(self) -> dict[str, Float64[np.ndarray, " questions"]]:
        """The metrics of every question by name; NaN unless every log-probability is finite.

        Of equally likely choices the first one counts; bits_per_byte is that of the first correct one.
        """
        questions, measured = self.task_set.questions, self.task_set.measured
        if not np.isfinite(self.log_probs).all():
            return {name: np.full(len(questions), np.nan) for name in measured}
        rows, first = [], 0
        for question in questions:
            own = self.log_probs[first : first + len(question.pairs)]
            first += len(question.pairs)
            gold, per_character = question.gold, own / np.maximum(question.characters, 1)
            bits = bits_per_byte(own[gold[0]], question.num_bytes[gold[0]])
            rows.append((chooses_correctly(own, gold), chooses_correctly(per_character, gold), bits))
        found = dict(zip(HIGHER_IS_BETTER, np.array(rows, np.float64).T, strict=True))
        return {name: found[name] for name in measured}

    @property
    def metrics(self) -> dict[str, float]:
        """TASK/METRIC and TASK/METRIC_standard_error, as they are recorded."""
        groups = cluster_ids(self.clusters)
        found: dict[str, float] = {}
        for metric, values in self.by_question.items():
            name = f"{self.task_set.name}/{metric}"
            found |= {name: float(values.mean()), f"{name}{ERROR}": float(standard_error(values, groups)[0])}
        return found

    @property
    def clusters(self) -> list[str]:
        """The cluster of every question; "": none."""
        return [question.cluster for question in self.task_set.questions]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: what was answered to every question."""
        return {
            "task": self.task_set.name,
            "ids": [question.id for question in self.task_set.questions],
            "clusters": self.clusters,
            "choices": [len(question.pairs) for question in self.task_set.questions],
            "log_probs": self.log_probs.tolist(),
            "metrics": {name: values.tolist() for name, values in self.by_question.items()},
        }


def answers_path(run: Path, task: str) -> Path:
    """Return the file of a run's answers to a task at its last validation (`TaskResult.to_dict` and the step)."""
    return run / "tasks" / f"{quote(task, safe='')}.json"
