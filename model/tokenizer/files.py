"""Files of a stored tokenizer, which `load_tokenizer` opens with the same ids and end tokens."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from model.tokenizer.base import Tokenizer
from model.tokenizer.folder import CONFIG, OF_TOKENIZERS, TEMPLATE, companion_files, read_json, read_tokenizer_config
from model.tokenizer.load import NAMES

_GGUF_KEYS = ("general.architecture", "tokenizer.")


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return {name: content} of the files that define a tokenizer, its main file first.

    The main file is `tokenizer.model` of sentencepiece, `tokenizer.json` of Hugging Face, or `tokenizer.gguf` with the
    tokenizer's metadata of a GGUF file. The others are those that `companion_files` returns, and a chat template that
    was given in place of the tokenizer's own.
    """
    path, template = tokenizer.path, tokenizer.given_template
    if path.suffix == ".gguf":
        from model.gguf_header import read_gguf_metadata
        from model.gguf_parts import TOKENIZER_NAME

        files = {TOKENIZER_NAME: read_gguf_metadata(path, _GGUF_KEYS)}
        kept = path.with_name(TEMPLATE)
        if path.name == TOKENIZER_NAME and kept.is_file():
            files[TEMPLATE] = kept.read_bytes()
        return files if template is None else files | {TEMPLATE: template.encode()}
    content = path.read_bytes()
    own_eos_id = None
    if path.suffix == ".json":
        name = "tokenizer.json"
    else:
        from model.tokenizer.sentencepiece import parse_model

        name, own_eos_id = "tokenizer.model", parse_model(content).eos_id()
    files = {name: content} | companion_files(path.parent, tokenizer.eos_ids, own_eos_id, tokenizer.vocab_size)
    if template is None:
        return files
    files[TEMPLATE] = template.encode()
    end = tokenizer.template_tokens.get("eos_token")
    if end is not None and "eos_token" not in read_tokenizer_config(path.parent):
        config = read_json(path.with_name(CONFIG)) | {"eos_token": end}
        files[CONFIG] = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
    return files


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
