"""Open a model: a run, a Hugging Face folder, a GGUF file or a folder of quantized weights.

No module of training or decoding is imported, and of a run's checkpoint only the parameters are read.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from model.ambient import pinned
from model.errors import InputError

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.stack import Params
    from model.tokenizer import Tokenizer


class Model(NamedTuple):
    """An opened model; tokenizer: None if none was found."""

    config: "ModelConfig"
    params: "Params"
    tokenizer: "Tokenizer | None"


def open_model(path: str | Path, tokenizer: str | Path | None = None, base: str | Path | None = None) -> Model:
    """Open a run directory, a folder with config.json and safetensors or of `isoflop model compress`, or a GGUF model.

    tokenizer: a tokenizer file or folder (a data folder holds one); None: the model's own, if any. base: the path of
    the weights that a run started from, for a run that holds only its trained parameters; None: the recorded path.
    Nothing is changed on disk. Raises InputError if nothing can be opened.
    """
    config, params = open_parameters(path, base)
    return Model(config, params, open_tokenizer(path, tokenizer))


@pinned()
def open_parameters(path: str | Path, base: str | Path | None = None) -> "tuple[ModelConfig, Params]":
    """Return the config and the parameters only; see `open_model`."""
    path = _existing(path)
    if (path / "run.json").is_file():
        from model.runs import load_run

        return load_run(path, base)
    if base is not None:
        raise InputError(f"{path} is not a run and has no base weights; leave --base out (base of open_model)")
    if (path / "quantized.json").is_file():
        from model.quantized import load_quantized

        return load_quantized(path)
    if (path / "config.json").is_file():
        from model.convert import load_hf

        return load_hf(path)
    if (file := _gguf(path)) is not None:
        from model.convert import load_gguf

        return load_gguf(file)
    raise _is_no_model(path)


@pinned()
def open_config(path: str | Path) -> "ModelConfig":
    """Return the config without reading the weights, to plan memory with; a run's is the one that it started with.

    Raises InputError as `open_model` does for a path that is no model.
    """
    path = _existing(path)
    if (path / "run.json").is_file():
        from model.config import ModelConfig
        from model.runs import read_record

        return ModelConfig.from_dict(read_record(path)["identity"]["config"])
    if (path / "quantized.json").is_file():
        from model.quantized import read_quantized_config

        return read_quantized_config(path)
    if (path / "config.json").is_file():
        from model.convert.huggingface import read_hf_config

        return read_hf_config(path)
    if (file := _gguf(path)) is not None:
        from model.convert.gguf_file import read_gguf_config

        return read_gguf_config(file)
    raise _is_no_model(path)


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise InputError(f"there is no model at {path}; give a run directory, a Hugging Face folder or a GGUF file")
    return Path(path)


def _is_no_model(path: Path) -> InputError:
    return InputError(
        f"{path} is not a model: give a run directory (run.json), a Hugging Face folder (config.json) or a .gguf file"
    )


def open_tokenizer(path: str | Path, given: str | Path | None = None) -> "Tokenizer | None":
    """Return the given tokenizer, or that of a run's data, or the one next to the weights.

    None if there is none, or if the data folder of a run no longer exists.
    """
    from model.tokenizer import load_tokenizer
    from model.tokenizer.load import NAMES

    path = Path(path)
    if given is not None:
        return load_tokenizer(given)
    if (path / "run.json").is_file():
        from model.runs import data_folder

        folder = data_folder(path)
        return load_tokenizer(folder) if folder is not None and folder.is_dir() else None
    beside = any((path / name).is_file() for name in NAMES) or _gguf(path) is not None
    return load_tokenizer(path) if beside else None


def _gguf(path: Path) -> Path | None:
    if path.suffix == ".gguf":
        return path
    from model.gguf_parts import find_gguf

    return find_gguf(path) if path.is_dir() else None
