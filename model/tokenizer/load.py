"""Which file of a path holds the tokenizer, and who reads it."""

import json
from pathlib import Path

from model.errors import InputError
from model.tokenizer.base import Tokenizer

# The first that is there: where a folder has several, tokenizer.json also knows the tokens that were added later.
NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer.gguf")
_EXPECTED = "tokenizer.json, tokenizer.model or a .gguf file"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a sentencepiece `.model`, a `tokenizer.json`, a `.gguf` file or a folder of one.

    A data folder holds the one that its manifest names, a model's folder the first of NAMES; of a run it is that of its
    data.
    The files beside it (`tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
    `config.json`, `chat_template.jinja`) say which tokens begin and end a text and how a chat is written.
    What is missing, damaged or of an unknown kind is an `InputError`.
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
        from model.tokenizer.foreign import load_tokenizer_json

        return load_tokenizer_json(file)
    from model.tokenizer.sentencepiece import load_sentencepiece

    return load_sentencepiece(file)


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"no tokenizer at {path}: expected {_EXPECTED}, a .model file or a folder of one")
        return path
    inside = next((path / name for name in (*_of_data(path), *NAMES) if (path / name).is_file()), None)
    if inside is not None:
        return inside
    if (path / "run.json").is_file():
        return _find(_data_folder(path))
    from model.gguf_parts import find_gguf

    inside = find_gguf(path)
    if inside is None:
        raise InputError(f"the folder {path} holds no tokenizer: expected {_EXPECTED} in it")
    return inside


def _of_data(folder: Path) -> tuple[str, ...]:
    """Return the name of the tokenizer's file that the manifest of a data folder gives; nothing of any other folder."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    if not isinstance(manifest, dict) or "tokenizer_hash" not in manifest:
        return ()
    name = manifest.get("tokenizer_file", "tokenizer.model")
    return (name,) if name in NAMES else ()


def _data_folder(run: Path) -> Path:
    from model.runs import data_folder

    folder = data_folder(run)
    if folder is None or not folder.is_dir():
        where = "it names no data folder" if folder is None else f"its data folder {folder} is gone"
        raise InputError(f"the run {run} holds no tokenizer and {where}; give the tokenizer itself")
    return folder
