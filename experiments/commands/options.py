"""What several commands share: reading a model, hyperparameters and JSON files from the command line."""

import errno
import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from model.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from model import ModelConfig
    from train import HParams, TrainConfig

JsonFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")]


def console() -> "Console":
    """Standard output; wide enough for a table where it is no terminal but a file or a pipe."""
    from rich.console import Console

    return Console() if Console().is_terminal else Console(width=160)


def write_document(path: Path | None, document: dict[str, Any]) -> None:
    """Write a command's numbers to `--json FILE`, whole or not at all."""
    from train.files import write_json

    if path is not None:
        with output(path):
            write_json(path, {"schema_version": 1} | document)


@contextmanager
def output(path: Path) -> Iterator[None]:
    """Around writing to a path from the command line: where it cannot be written, one sentence says so."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def read_config(preset: str, overrides: tuple[str, ...] = ()) -> "ModelConfig":
    """A preset's name or a JSON file of a config, with `name=value` changes."""
    from model import ModelConfig, presets

    if preset.endswith(".json"):
        try:
            values = json_module.loads(Path(preset).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{preset} cannot be read as a model config: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{preset} is not a JSON object of model fields")
        config = ModelConfig.from_dict(values)
    else:
        config = presets.get(preset)
    return config.replace(**parse_overrides(overrides)) if overrides else config


def read_json(file: Path) -> Any:
    """What a JSON file from the command line holds."""
    try:
        return json_module.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None


def parse_overrides(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Read `num_layers=4` and the like; values as in JSON, anything else is text."""
    changes = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{text!r} is not of the form name=value")
        try:
            changes[name] = json_module.loads(value)
        except ValueError:
            changes[name] = value
    return changes


def split_overrides(
    overrides: tuple[str, ...], config: "ModelConfig", train_config: "TrainConfig", hparams: "HParams"
) -> "tuple[ModelConfig, TrainConfig, HParams]":
    """Apply each `name=value` to whichever of model config, train config and hyperparameters has that field."""
    from experiments.sweep.space.overlay import overlay

    return overlay(parse_overrides(overrides), config, train_config, hparams)


def bytes_in_words(count: float) -> str:
    """3.1 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def hours_in_words(hours: float | None) -> str:
    """52 s, 12 min, 3.4 h; a dash where they are not known."""
    if hours is None:
        return "–"
    seconds = 3600 * hours
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
