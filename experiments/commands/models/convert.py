"""Implement `isoflop model convert`: runs and downloaded weights as a Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from experiments.commands.options import BasePath

if TYPE_CHECKING:
    from train.objectives import Objective


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    model_type: str | None = None,
    base: BasePath = None,
) -> None:
    """Write a run, a GGUF file or a Hugging Face folder as a Hugging Face folder that Transformers loads.

    The tokenizer is written too, with the mask or the sentinels of a run's objective as special tokens. A run under muP
    or depth scaling is written as the same function without them: their multipliers go into the weights, and a tied
    head that has one becomes a matrix of its own.

    Example: isoflop model convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2

    Args:
        source: A run directory, a .gguf file, or a folder with config.json and safetensors.
        target: The folder to make; it appears when it is complete. A model written by isoflop before is replaced.
        dtype: Precision of the weights that are written.
        model_type: The family to write as, such as llama or gpt2, where the config fits several.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
    """
    from experiments.models import copy_tokenizer
    from experiments.runs.started import check_target
    from model import accounting
    from model.convert import convert as write
    from model.convert import fold, load_hf, save_hf
    from model.errors import InputError
    from model.quantized import RECORD
    from model.store import open_parameters

    trained, special = None, {}
    check_target(source, target, base)
    if (source / RECORD).is_file():
        raise InputError(f"{source} holds rounded weights; give the model that it was made of")
    if (source / "run.json").is_file():
        trained, params = open_parameters(source, base)
        special = _objective(source).special_tokens(trained)
        config, params = fold(trained, params, dtype=dtype)
        save_hf(config, params, target, model_type=model_type)
    elif source.exists():
        if base is not None:
            raise InputError(f"{source} is not a run and has no base weights; leave --base out")
        write(source, target, dtype=dtype, model_type=model_type)
        config = load_hf(target)[0]
    else:
        raise InputError(f"there is no model at {source}; give a run directory, a .gguf file or a Hugging Face folder")
    if copy_tokenizer(source, target) and special:
        _add_special_tokens(target, special)
    print(f"{target}: {accounting.parameters(config).total:,} parameters")
    if trained is not None and trained != config:
        untied = trained.tie_embeddings and not config.tie_embeddings
        and_head = "; the head, which was the token table, is a matrix of its own" if untied else ""
        print(f"the muP multipliers are folded into the weights{and_head}")


def _objective(run: Path) -> "Objective":
    """Return the objective that a run was trained by."""
    from train import objectives
    from train.run import read_record

    identity = read_record(run).get("identity", {})
    return objectives.from_dict(identity.get("objective", objectives.LanguageModeling.NAME))


def _add_special_tokens(target: Path, names: dict[int, str]) -> None:
    from experiments.words import say
    from model.errors import InputError
    from model.tokenizer.extend import add_special_tokens

    try:
        add_special_tokens(target, names)
    except InputError as error:
        say(f"the tokenizer is written without {', '.join(list(names.values())[:3])}: {error}")
