"""Open whatever holds a model: a preset's name, a config; a run of ours, a Hugging Face folder, a GGUF file."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import InputError

if TYPE_CHECKING:
    from model import ModelConfig, Params
    from model.tokenizer import Tokenizer

_TOKENIZER_FILES = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    "chat_template*",
)


@dataclass(frozen=True)
class Model:
    """A model that was opened; tokenizer: None where none stands beside it."""

    path: Path
    config: "ModelConfig"
    params: "Params"
    tokenizer: "Tokenizer | None"

    def need_tokenizer(self) -> "Tokenizer":
        """The tokenizer, or an InputError that says how to give one."""
        if self.tokenizer is None:
            raise InputError(f"no tokenizer stands beside {self.path}; give one with --tokenizer")
        return self.tokenizer


def read_config(preset: str, changes: Iterable[str] = ()) -> "ModelConfig":
    """The config of a preset's name or of a JSON file, with NAME=VALUE changes. Raises InputError."""
    from experiments.inputs import read_changes, read_json
    from model import ModelConfig, presets
    from train.overlay import overlay_model

    if preset.endswith(".json"):
        values = read_json(Path(preset))
        if not isinstance(values, dict):
            raise InputError(f"{preset} is not a JSON object of model fields")
        config = ModelConfig.from_dict(values)
    elif "/" in preset and preset not in presets.names():
        raise InputError(f"there is no file or folder {preset}, and no preset of that name")
    else:
        config = presets.get(preset)
    return overlay_model(read_changes(changes), config)


def is_stored(model: str) -> bool:
    """Whether this names what `open_model` opens, and not a preset or a JSON file of a config."""
    return Path(model).exists() and not model.endswith(".json")


def open_model(path: str | Path, tokenizer: str | Path | None = None) -> Model:
    """Open a run directory, a folder with config.json and safetensors or of `isoflop model compress`, or a GGUF model.

    tokenizer: a tokenizer file or folder (a data folder holds one); None: the model's own. Raises InputError.
    """
    config, params = open_parameters(path)
    return Model(Path(path), config, params, open_tokenizer(Path(path), tokenizer))


def open_parameters(path: str | Path) -> tuple["ModelConfig", "Params"]:
    """Only the config and the parameters of what `open_model` opens."""
    from experiments.quantized import RECORD, load_quantized
    from model.convert import load_gguf, load_hf
    from model.gguf_parts import find_gguf
    from train import load_run

    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no model at {path}; give a run directory, a Hugging Face folder or a GGUF file")
    if path.suffix == ".gguf":
        return load_gguf(path)
    if (path / "run.json").is_file():
        return load_run(path)
    if (path / RECORD).is_file():
        return load_quantized(path)
    if (path / "config.json").is_file():
        return load_hf(path)
    if path.is_dir() and (file := find_gguf(path)) is not None:
        return load_gguf(file)
    raise InputError(
        f"{path} is no model: expected a run directory (run.json), a Hugging Face folder (config.json) or a .gguf file"
    )


def open_tokenizer(path: Path, given: str | Path | None = None) -> "Tokenizer | None":
    """The tokenizer given, else that of the data a run was trained on, else the one beside the weights, else None."""
    from model.tokenizer import load_tokenizer
    from train.data.folders import data_of
    from train.run import read_record

    if given is not None:
        return load_tokenizer(given)
    if (path / "run.json").is_file():
        record = read_record(path)
        places = data_of(path, record) if record.get("data") else ""
        folder = Path(places if isinstance(places, str) else next(iter(places.values())))
        if not folder.is_dir():
            raise InputError(f"the data folder of {path}, {folder}, is gone; give its tokenizer with --tokenizer")
        return load_tokenizer(folder)
    names = ("tokenizer.json", "tokenizer.model")
    beside = path.suffix == ".gguf" or any((path / name).is_file() for name in names) or any(path.glob("*.gguf"))
    return load_tokenizer(path) if beside else None


def copy_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Put a model's tokenizer beside its weights; of a GGUF file what stands before the weights."""
    import shutil

    from model.gguf_header import read_gguf_header

    if tokenizer.path.suffix == ".gguf":
        header = read_gguf_header(tokenizer.path)
        start = min((tensor.start for tensor in header.tensors.values()), default=None)
        with tokenizer.path.open("rb") as source:
            (folder / "tokenizer.gguf").write_bytes(source.read(start))
        return
    for file in {file for pattern in _TOKENIZER_FILES for file in tokenizer.path.parent.glob(pattern)}:
        if file.is_file() and file.parent.resolve() != folder.resolve():
            shutil.copy2(file, folder / file.name)
