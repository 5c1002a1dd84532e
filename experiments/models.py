"""Open the models and tokenizers that commands are given: configs by name or file, and stored models."""

from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import InputError

if TYPE_CHECKING:
    from model import ModelConfig
    from model.tokenizer import Tokenizer
    from train import Weights
    from train.objectives import Objective

_AS_EVER = ("none", "auto", True, False)  # execution fields of older config files, with values that change nothing


def read_config(preset: str) -> "ModelConfig":
    """Return the config of a preset's name or of a JSON file. Raises InputError."""
    from experiments.inputs import read_json
    from experiments.words import say
    from model import ModelConfig, presets
    from model.config import MOVED

    if preset.endswith(".json"):
        values = read_json(Path(preset))
        if not isinstance(values, dict):
            raise InputError(f"{preset} is not a JSON object of model fields")
        config = ModelConfig.from_dict(values)
        plain = {name: value for name, value in values.items() if name in MOVED and value not in _AS_EVER}
        for name, value in plain.items():
            say(f"{preset}: {name}={value} is no longer a field of a model and is left out; give --set {name}={value}")
    elif "/" in preset and preset not in presets.names():
        raise InputError(f"there is no file or folder {preset}, and no preset of that name")
    else:
        config = presets.get(preset)
    return config


def check_is_decoder(config: "ModelConfig", command: str) -> None:
    """Raise InputError, naming the command, unless the model is a decoder language model."""
    if config.stack != "decoder" or config.head != "language-model":
        raise InputError(
            f"{command} measures decoder language models; this one has stack={config.stack!r}, head={config.head!r}"
        )


def check_is_scored(config: "ModelConfig", path: Path) -> None:
    """Raise InputError unless the model gives texts log-probabilities, which tasks need."""
    if config.stack == "encoder" or config.head != "language-model":
        raise InputError(
            f"{path} answers no tasks: with stack={config.stack!r} and head={config.head!r} it predicts no next token; "
            "measure its loss with --data FOLDER"
        )


def is_stored(model: str) -> bool:
    """Return whether this is a path that `model.store.open_model` opens, not a preset or a config's JSON file."""
    return Path(model).exists() and not model.endswith(".json")


def started_from(path: Path, data: Path) -> "tuple[ModelConfig, Weights, Objective]":
    """Return the config of a stored model, the start from its parameters, and the objective of a run, or the plain one.

    Raises InputError if the data were prepared with another tokenizer than the model's, or that has no end token; warns
    if the model has no tokenizer.
    """
    from experiments.commands.options import say
    from model.store import open_model
    from train import weights
    from train.data import gives_ids_of
    from train.objectives import LanguageModeling
    from train.run import read_record, recipe_of

    opened = open_model(path)
    tokenizer = opened.tokenizer
    if tokenizer is None:
        say(f"{path} has no tokenizer: that {data} was prepared with the model's tokenizer is not checked")
    elif not tokenizer.eos_ids:
        raise InputError(
            f"the tokenizer of {path}, {tokenizer.path}, has no end token to follow each document of the data; "
            "name it as eos_token in a tokenizer_config.json in its folder"
        )
    elif not gives_ids_of(tokenizer, data):
        raise InputError(
            f"the data were prepared with another tokenizer than that of {path}; prepare them with "
            f"`isoflop data prepare SOURCE --out FOLDER --tokenizer {tokenizer.path}`"
        )
    is_run = (path / "run.json").is_file()
    objective = recipe_of(read_record(path)).objective if is_run else LanguageModeling()
    return opened.config, weights(path), objective.replace(trainable=(), adapter=None, base_weights=None)


def need_tokenizer(tokenizer: "Tokenizer | None", model: str | Path) -> "Tokenizer":
    """Return the tokenizer of an opened model, or raise InputError with the way to give one."""
    from model.runs import data_folder

    if tokenizer is not None:
        return tokenizer
    folder = data_folder(model) if (Path(model) / "run.json").is_file() else None
    if folder is not None:
        raise InputError(f"the data folder of {model}, {folder}, is gone; give its tokenizer with --tokenizer")
    raise InputError(f"{model} has no tokenizer; give one with --tokenizer")


def copy_tokenizer(model: str | Path, folder: Path) -> bool:
    """Put the tokenizer of a stored model into a Hugging Face folder, and return whether there was one to be read.

    An unreadable tokenizer gives a warning instead of an error, and so does an existing one that stays in the folder.
    """
    from experiments.words import say
    from model.store import open_tokenizer
    from model.tokenizer.load import NAMES

    try:  # the weights are useful even without a tokenizer
        tokenizer = open_tokenizer(model)
    except InputError as error:
        say(f"no tokenizer is written: {error}")
        return False
    if tokenizer is not None:
        export_tokenizer(tokenizer, folder)
    elif kept := [name for name in NAMES if (folder / name).is_file()]:
        say(f"{model} has no tokenizer: {folder} keeps the {kept[0]} that it had")
    return tokenizer is not None


def export_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Put a tokenizer into a Hugging Face folder; one that Transformers could not open as a GGUF file, for isoflop."""
    from experiments.words import say
    from model.tokenizer.export import export_tokenizer as export
    from model.tokenizer.files import save_tokenizer

    try:
        export(tokenizer, folder)
    except InputError as error:
        file = save_tokenizer(tokenizer, folder)
        say(f"{error}; {file.name} is written, which isoflop reads and Transformers does not")
