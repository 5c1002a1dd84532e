"""Implement `isoflop eval`: the loss of a trained model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from experiments.commands.options import BasePath, JsonFile, Overrides
from experiments.words import counted

if TYPE_CHECKING:
    from model import ModelConfig
    from train.objectives import Objective


def evaluate(
    model: tyro.conf.Positional[Path],
    *,
    data: Path,
    tokenizer: Path | None = None,
    base: BasePath = None,
    seq_len: int | None = None,
    evaluate_tokens: int | None = None,
    batch_size: int = 8,
    objective: str | None = None,
    set: Overrides = (),
    json: JsonFile = None,
) -> None:
    """Measure loss, perplexity and bits per byte on a data folder's validation split.

    Example: isoflop eval runs/first --data data/sotu

    If the model's tokenizer differs from the data's, the text is encoded again with the model's: compare bits per byte.
    A run that was trained with another objective is evaluated by that objective. Its loss is compared with that of a
    unigram model (the frequencies of the targets), and with the same model if it also reads the token at the predicted
    position, as BERT's objective shows a tenth of them unchanged.

    Example: isoflop eval exported/bert --data data/sotu --objective masked --set objective.mask_id=1024 --seq-len 128

    Args:
        model: A run directory, a Hugging Face folder or a GGUF file.
        data: A folder made by `isoflop data prepare`.
        tokenizer: The model's tokenizer, if its folder has none.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
        seq_len: Tokens per row; by default the model's context, or the run's row length if it was trained with another
            objective.
        evaluate_tokens: Use only this many tokens, from the start of the split.
        batch_size: Rows per step.
        objective: Objective to evaluate with: language-modeling, masked, spans, classification; by default the run's
            own.
        set: Fields of the objective, such as objective.evaluation_rate=0.3.
        json: Also write the numbers to this file.
    """
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
