"""Files of a stored tokenizer, which `load_tokenizer` opens with the same ids and end tokens."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from model.tokenizer.base import Tokenizer
from model.tokenizer.folder import OF_TOKENIZERS, companion_files
from model.tokenizer.load import NAMES

_GGUF_KEYS = ("general.architecture", "tokenizer.")


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return {name: content} of the files that define a tokenizer, its main file first.

    The main file is `tokenizer.model` of sentencepiece, `tokenizer.json` of Hugging Face, or `tokenizer.gguf` with the
    tokenizer's metadata of a GGUF file. The others are those that `companion_files` returns.
    """
    path = tokenizer.path
    if path.suffix == ".gguf":
        from model.gguf_header import read_gguf_metadata
        from model.gguf_parts import TOKENIZER_NAME

        return {TOKENIZER_NAME: read_gguf_metadata(path, _GGUF_KEYS)}
    content = path.read_bytes()
    own_eos_id = None
    if path.suffix == ".json":
        name = "tokenizer.json"
    else:
        from model.tokenizer.sentencepiece import parse_model

        name, own_eos_id = "tokenizer.model", parse_model(content).eos_id()
    return {name: content} | companion_files(path.parent, tokenizer.eos_ids, own_eos_id, tokenizer.vocab_size)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write `tokenizer_files` into a folder, replacing any other tokenizer, and return the path of the main file."""
    files = tokenizer_files(tokenizer)
    replace_tokenizer(folder, files)
    return folder / next(iter(files))


def replace_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a tokenizer into a folder and remove those of any other one."""
    for name in {*NAMES, *OF_TOKENIZERS}.difference(files):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def file_hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return {name: SHA-256} of files."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
