"""Load a tokenizer from any path: find its file and its library."""

import json
from pathlib import Path

from model.errors import InputError
from model.tokenizer.base import Tokenizer

# In the order of preference: if a folder has several, only tokenizer.json has the tokens that were added later.
NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer.gguf")
_EXPECTED = "tokenizer.json, tokenizer.model or a .gguf file"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a sentencepiece `.model`, a `tokenizer.json`, a `.gguf` file or a folder with one.

    In a data folder it is the file named by the manifest, in a model's folder the first of NAMES, in a run's folder the
    tokenizer of its data. Special tokens and the chat template come from other files of its folder:
    `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json` and
    `chat_template.jinja`. Raises InputError for files that are missing, damaged or of an unknown kind.
    """
    file = _find(Path(path))
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {file}: {error.strerror or error}") from error
    if file.suffix == ".gguf":
        from model.tokenizer.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(file)
    if file.suffix == ".json":
        from model.tokenizer.huggingface import load_tokenizer_json

        return load_tokenizer_json(file)
    from model.tokenizer.sentencepiece import load_sentencepiece

    return load_sentencepiece(file)


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"no tokenizer at {path}: expected {_EXPECTED}, a .model file or a folder with one")
        return path
    for name in (_name_in_manifest(path), *NAMES):
        if name is not None and (path / name).is_file():
            return path / name
    if (path / "run.json").is_file():
        return _find(_data_folder(path))
    from model.gguf_parts import find_gguf

    file = find_gguf(path)
    if file is None:
        raise InputError(f"the folder {path} has no tokenizer: expected {_EXPECTED} in it")
    return file


def _name_in_manifest(folder: Path) -> str | None:
    """Return the tokenizer's file name in the manifest of a data folder, None for other folders."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or "tokenizer_hash" not in manifest:
        return None
    name = manifest.get("tokenizer_file", "tokenizer.model")
    return name if name in NAMES else None


def _data_folder(run: Path) -> Path:
    from model.runs import data_folder

    folder = data_folder(run)
    if folder is None or not folder.is_dir():
        where = "it names no data folder" if folder is None else f"its data folder {folder} is gone"
        raise InputError(f"the run {run} has no tokenizer and {where}; give the tokenizer itself")
    return folder
