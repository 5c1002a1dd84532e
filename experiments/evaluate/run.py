"""Evaluate models on tasks: ask, score, keep every answer, summarise; finished answers are reused."""

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.evaluate.answers import Answers, in_file_name, keep_result, read_answers, read_results, write_answers
from experiments.evaluate.choice import answer_choices
from experiments.evaluate.generation import answer_by_generation
from experiments.evaluate.summary import summarise
from experiments.evaluate.tasks.prompts import build_prompts, with_settings
from experiments.evaluate.tasks.task import Task, chance_of
from experiments.evaluate.text_domains import answer_texts, by_domain
from infer import prepare
from infer.scoring.programs import compiled_programs
from model import ModelConfig, Params
from model.errors import InputError
from model.records import file_sha256
from model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate. hash: SHA-256 over config, parameters and tokenizer (`model_hash`)."""

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    hash: str

    @classmethod
    def of(cls, name: str, config: ModelConfig, params: Params, tokenizer: Tokenizer) -> "EvaluatedModel":
        """Return the model with its hash, prepared for inference."""
        return cls(name, config, prepare(config, params), tokenizer, model_hash(config, params, tokenizer))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the prompts. shots: None: the protocol's. seed: of the draw of shots. limit: first questions only."""

    shots: int | None = None
    seed: int = 0
    fixed_shots: bool = False
    chat: bool = False
    limit: int | None = None


def evaluate_tasks(
    models: Iterable[EvaluatedModel],
    tasks: Sequence[Task],
    settings: Settings = Settings(),
    *,
    out: Path | None = None,
    batch_size: int = 16,
    started: Callable[[EvaluatedModel, Task], None] = lambda model, task: None,
) -> list[dict[str, Any]]:
    """Return a result per model and task, and keep the answers in a folder.

    out: each model's answers are written to OUT/NAME-HASH/TASK.PROTOCOL.jsonl, and all results to OUT/results.json,
    after every task; answers of the same model, task and settings that are there already are not computed again. None:
    nothing is written. started: called before a model answers a task.
    Raises InputError for two tasks of one name and protocol, and as `build_prompts`, `answer_choices` and
    `answer_texts` do.
    """
    for (name, protocol), number in Counter((task.name, task.protocol) for task in tasks).items():
        if number > 1:
            raise InputError(f"{number} tasks are named {name} under protocol {protocol}; give them different names")
    asked = [
        with_settings(task, shots=settings.shots, fixed_shots=settings.fixed_shots, limit=settings.limit)
        for task in tasks
    ]
    if out is not None:
        read_results(out)  # another program's results.json is refused before any work
    results = []
    for model in models:
        for task in asked:
            file = None if out is None else answers_file(out, model, task, settings)
            answers = None if file is None else _finished(file, model, task, settings)
            if answers is None:
                started(model, task)
                answers = _answer(model, task, settings, batch_size)
                if file is not None:
                    write_answers(file, answers.header, answers.rows)
            result = _result(task, answers)
            if out is not None and file is not None:
                result["answers"] = str(file.relative_to(out))
                keep_result(out, result)
            results.append(result)
    return results


def answers_file(out: Path, model: EvaluatedModel, task: Task, settings: Settings) -> Path:
    """Return where the answers of a model to a task are kept; settings other than the protocol's are in the name."""
    parts = [task.name, task.protocol]
    if settings.shots is not None:
        parts.append(f"{settings.shots}-shot")
    if settings.fixed_shots:
        parts.append("fixed")
    if settings.seed and task.shots and not task.fixed_shots:
        parts.append(f"seed-{settings.seed}")
    if settings.chat:
        parts.append("chat")
    if settings.limit is not None:
        parts.append(f"first-{settings.limit}")
    return out / f"{in_file_name(model.name)}-{model.hash[:8]}" / (in_file_name(".".join(parts)) + ".jsonl")


def model_hash(config: ModelConfig, params: Params, tokenizer: Tokenizer) -> str:
    """Return a SHA-256 over the config, the values of all parameters, and the tokenizer's file, tokens and template."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    conventions = [tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template, dict(tokenizer.template_tokens)]
    digest.update(json.dumps(conventions, sort_keys=True).encode())  # from other files than the tokenizer's own
    if tokenizer.path.is_file():
        digest.update(file_sha256(tokenizer.path).encode())
    return digest.hexdigest()


def _finished(file: Path, model: EvaluatedModel, task: Task, settings: Settings) -> Answers | None:
    """Return the answers in a file if they are those of this model, task and settings."""
    if not file.is_file():
        return None
    try:
        answers = read_answers(file)
    except InputError:  # damaged: computed again
        return None
    wanted = {"model_hash": model.hash, "task_hash": task.hash, "settings": dataclasses.asdict(settings)}
    return answers if all(answers.header.get(name) == value for name, value in wanted.items()) else None


def _answer(model: EvaluatedModel, task: Task, settings: Settings, batch_size: int) -> Answers:
    prompts = build_prompts(task, seed=settings.seed, chat=model.tokenizer if settings.chat else None)
    began, compiled, truncated = time.perf_counter(), compiled_programs(), 0
    about = (model.config, model.params, model.tokenizer)
    if task.kind == "choice":
        rows, truncated = answer_choices(*about, task, prompts, batch_size=batch_size)
    elif task.kind == "text":
        rows = answer_texts(*about, prompts, batch_size=batch_size)
    else:
        rows, truncated = answer_by_generation(*about, task, prompts, batch_size=batch_size)
    header = {
        "model": model.name,
        "model_hash": model.hash,
        "task": task.name,
        "protocol": task.protocol,
        "shots": task.shots,
        "metric": task.metric,
        "chance": chance_of(task),
        "questions": len(rows),
        "task_hash": task.hash,
        "settings": dataclasses.asdict(settings),
        "source": dict(task.source),
        "truncated": truncated,
        "seconds": round(time.perf_counter() - began, 3),
        "compiles": None if task.kind == "generation" else compiled_programs() - compiled,
    }
    return Answers(header, rows)


def _result(task: Task, answers: Answers) -> dict[str, Any]:
    header, rows = answers.header, answers.rows
    names = ("model", "model_hash", "task", "protocol", "shots", "questions", "metric", "chance", "settings")
    result = {name: header[name] for name in names}
    result["kind"] = task.kind
    result["metrics"] = summarise(task.kind, rows)
    if task.kind == "text":
        result["domains"] = by_domain(rows)
    result["boundary_differs"] = sum(bool(row.get("boundary_differs")) for row in rows)
    return result | {name: header.get(name) for name in ("truncated", "seconds", "compiles")}
