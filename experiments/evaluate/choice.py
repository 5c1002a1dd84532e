"""Score the choices of a task in one pass, and compute every metric from their log-probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from experiments.evaluate.answers import TaskAnswers
from experiments.evaluate.encode import Encoded, encode_pairs
from experiments.evaluate.statistics.calibration import choice_probabilities
from experiments.evaluate.tasks.prompts import Prompt
from experiments.evaluate.tasks.task import Task
from infer import score
from infer.scoring import Scores
from model import Execution, ModelConfig, Params
from model.errors import InputError
from model.tokenizer import Tokenizer
from train.task_sets import bits_per_byte, chooses_correctly


def answer_choices(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 16,
    execution: Execution = Execution(),
) -> TaskAnswers:
    """Return the log-probabilities of all choices and the metrics of each question.

    All prompts, unconditional ones included, are scored in one call of `infer.score`, so in at most four programs.
    Raises InputError, naming the question, if its prompt is longer than the model's context and the task does not
    truncate.
    """
    requests, truncated = encode_prompts(config, tokenizer, task, prompts)
    pairs = id_pairs(requests)
    scores = score(config, params, pairs, batch_size=batch_size, execution=execution)
    return TaskAnswers(rows_of_scores(prompts, requests, scores), truncated)


def id_pairs(requests: Sequence["Requests"]) -> list[tuple[list[int], list[int]]]:
    """Return the (context, continuation) ids of all requests for one call of `infer.score`."""
    flat = [request for one in requests for request in (*one.conditional, *one.unconditional)]
    return [(request.context, request.continuation) for request in flat]


def rows_of_scores(prompts: Sequence[Prompt], requests: Sequence["Requests"], scores: Scores) -> list[dict[str, Any]]:
    """Return a row per question, with its metrics, from the scores of `id_pairs(requests)`.

    Raises InputError for a log-probability that is not finite.
    """
    rows, done = [], 0
    for prompt, encoded in zip(prompts, requests, strict=True):
        ends = done + len(encoded.conditional), done + len(encoded.conditional) + len(encoded.unconditional)
        check_finite(scores.logprobs[done : ends[1]], prompt.question.id)
        logprobs, without = scores.logprobs[done : ends[0]], scores.logprobs[ends[0] : ends[1]]
        greedy = [bool(value) for value in scores.greedy[done : ends[0]]]
        rows.append(_row(prompt, encoded.conditional, logprobs, without, greedy))
        done = ends[1]
    return rows


def check_finite(logprobs: Float64[np.ndarray, " requests"], question: str) -> None:
    """Raise InputError, naming the question, if a log-probability is not finite: no choice would be the likeliest."""
    if not np.isfinite(logprobs).all():
        raise InputError(
            f"question {question!r}: the model gives a log-probability that is not finite; its training has probably "
            "diverged, so evaluate an earlier checkpoint"
        )


class Requests(NamedTuple):
    """Encoded pairs of a question: one per choice, and as many without the question, if the task has them."""

    conditional: list[Encoded]
    unconditional: list[Encoded]


def encode_prompts(
    config: ModelConfig, tokenizer: Tokenizer, task: Task, prompts: Sequence[Prompt]
) -> tuple[list[Requests], int]:
    """Return the requests of each prompt, and how many prompts were truncated; raises as `answer_choices` does."""
    pairs: list[tuple[str, str]] = []
    owners: list[tuple[int, bool]] = []
    for number, prompt in enumerate(prompts):
        pairs += prompt.pairs
        owners += [(number, False)] * len(prompt.continuations)
        if prompt.unconditional is not None:
            pairs += [(prompt.unconditional, continuation) for continuation in prompt.continuations]
            owners += [(number, True)] * len(prompt.continuations)
    encoded = encode_pairs(tokenizer, pairs, task.boundary, encoder_decoder=config.stack == "encoder-decoder")
    found = [Requests([], []) for _ in prompts]
    cut = set()
    for (number, is_unconditional), request in zip(owners, encoded, strict=True):
        fitting = _fitting(config, task, prompts[number], request)
        if len(fitting.context) < len(request.context):
            cut.add(number)
        found[number][is_unconditional].append(fitting)
    return found, len(cut)


def _fitting(config: ModelConfig, task: Task, prompt: Prompt, request: Encoded) -> Encoded:
    """Return the request, cut at its beginning where the task allows that and the model's context needs it."""
    where, most = f"task {task.name}, question {prompt.question.id!r}", config.max_seq_len
    length = len(request.continuation)
    if not length:
        raise InputError(f"{where} has a choice without tokens; leave the question out")
    if config.stack == "encoder-decoder":
        left = most
        total = max(len(request.context), length)
    else:
        left = most + 1 - length  # the last token is not read
        total = len(request.context) + length - 1
    if total <= most:
        return request
    if length > most:
        raise InputError(
            f"{where} has a choice of {length:,} tokens, more than the model's context of {most:,}; leave it out"
        )
    if not task.truncate:
        fewer = task.shots and not task.ready
        hint = "; ask for fewer shots" if fewer else "; leave it out, or truncate contexts, as protocol lm-eval does"
        raise InputError(f"{where} has {total:,} tokens, more than the model's context of {most:,}{hint}")
    return request._replace(context=request.context[-left:])


def _row(
    prompt: Prompt,
    encoded: Sequence[Encoded],
    logprobs: Float64[np.ndarray, " choices"],
    unconditional: Float64[np.ndarray, " unconditional"],
    greedy: list[bool],
) -> dict[str, Any]:
    question = prompt.question
    row: dict[str, Any] = {
        "id": question.id,
        "cluster": question.cluster,
        "prompt_sha256": prompt.sha256,
        "gold": list(question.gold),
        "logprobs": logprobs.tolist(),
        "tokens": [len(request.continuation) for request in encoded],
        "bytes": [len(choice.encode()) for choice in question.choices],
        "characters": [len(choice) for choice in question.choices],
        "greedy": greedy,
        "unconditional": unconditional.tolist() if len(unconditional) else None,
        "boundary_differs": any(request.differs for request in encoded),
    }
    return row | {"metrics": choice_metrics(row)}


def choice_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a question from its row in an answers file.

    acc: 1 if the choice of the largest log-probability is correct, else 0; of equal ones the first counts, as in
    lm-evaluation-harness. acc_norm, acc_bytes, acc_tokens: the same per character, byte and token of the choice.
    acc_pmi: the same after the unconditional log-probability is subtracted. prob: probability of the correct choices
    among all. bits_per_byte: of the first correct choice. greedy: 1 if a correct choice's tokens are each the most
    likely. With one choice only the last two are given.
    """
    logprobs, gold = np.array(row["logprobs"], np.float64), list(row["gold"])
    first = gold[0]
    metrics: dict[str, float] = {}
    if len(logprobs) > 1:
        ranked = {
            "acc": logprobs,
            "acc_norm": logprobs / np.array(row["characters"]),
            "acc_bytes": logprobs / np.array(row["bytes"]),
            "acc_tokens": logprobs / np.array(row["tokens"]),
        }
        if row["unconditional"] is not None:
            ranked["acc_pmi"] = logprobs - np.array(row["unconditional"])
        metrics = {name: chooses_correctly(values, gold) for name, values in ranked.items()}
        metrics["prob"] = float(choice_probabilities(logprobs)[gold].sum())
    metrics["bits_per_byte"] = bits_per_byte(logprobs[first], row["bytes"][first])
    metrics["greedy"] = int(any(row["greedy"][index] for index in gold))
    return metrics
