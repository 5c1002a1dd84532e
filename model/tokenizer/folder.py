"""JSON files in a tokenizer's folder, which define its special tokens and chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.tokenizer.base import Conventions

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
OF_TOKENIZERS = (CONFIG, "special_tokens_map.json", TEMPLATE)
GENERATION = "generation_config.json"
_OF_MODELS = (GENERATION, "config.json")


def read_conventions(folder: Path, token_id: Callable[[str], int | None], vocab_size: int) -> Conventions:
    """Return the special tokens and the chat template of a model's folder.

    End tokens are the tokenizer's own, then those of `generation_config.json`, or of `config.json` if that has none:
    the first ends a document, each of them a generation. Tokens and ids outside the vocabulary are ignored, since
    configurations are often older than the tokenizer in the same folder.
    """
    config = read_tokenizer_config(folder)
    names = _special_tokens(config)
    eos_ids = [token_id(names["eos_token"])] if "eos_token" in names else []
    eos_ids += _model_eos_ids(folder, vocab_size)
    return Conventions(
        eos_ids=tuple(dict.fromkeys(i for i in eos_ids if i is not None)),
        bos_id=token_id(names["bos_token"]) if "bos_token" in names else None,
        chat_template=_chat_template(folder, config),
        template_tokens=names,
        special_names=frozenset([*names.values(), *_additional_special_tokens(config)]),
    )


def companion_files(
    folder: Path, eos_ids: tuple[int, ...], own_eos_id: int | None, vocab_size: int
) -> dict[str, bytes]:
    """Return {name: content} of the files in a tokenizer's folder that `read_conventions` reads.

    eos_ids: the tokenizer's end tokens; own_eos_id: that of its main file. `generation_config.json` is reduced to the
    end tokens, and left out if the main file has the same ones.
    """
    files = {name: _bytes(folder / name) for name in OF_TOKENIZERS if (folder / name).is_file()}
    model_eos_ids = _model_eos_ids(folder, vocab_size)
    if model_eos_ids and eos_ids != (own_eos_id,):
        files[GENERATION] = (json.dumps({"eos_token_id": model_eos_ids}) + "\n").encode()
    return files


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return `special_tokens_map.json`, overridden by the values of `tokenizer_config.json`; {} without these files."""
    config = read_json(folder / CONFIG)
    values = {key: value for key, value in config.items() if value is not None}
    return read_json(folder / "special_tokens_map.json") | values


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the texts of `bos_token`, `eos_token` and so on, each stored as a text or as an object with `content`."""
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def _additional_special_tokens(config: dict[str, Any]) -> list[str]:
    """Return the texts of special tokens without a role, under the keys of old and new versions of Transformers."""
    given: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(name)
        given += value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
    decoder = config.get("added_tokens_decoder")
    added = decoder.values() if isinstance(decoder, dict) else []
    given += [token for token in added if isinstance(token, dict) and token.get("special") is True]
    texts = [token.get("content") if isinstance(token, dict) else token for token in given]
    return [text for text in texts if isinstance(text, str) and text]


def _model_eos_ids(folder: Path, vocab_size: int) -> list[int]:
    """Return the ids of end tokens of the first model file that has any."""
    for file in _OF_MODELS:
        if ids := _valid_ids(read_json(folder / file).get("eos_token_id"), vocab_size):
            return ids
    return []


def _valid_ids(value: Any, vocab_size: int) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / TEMPLATE
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _by_name(template, folder)
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"the chat_template in {folder / 'tokenizer_config.json'} is neither a text nor a list of texts"
        )
    return template


def _by_name(templates: list[Any], folder: Path) -> Any:
    try:
        named = {template["name"]: template["template"] for template in templates}
        return named["default"]
    except (KeyError, TypeError) as error:
        raise InputError(f'the chat_template list in {folder / CONFIG} has no "default" template') from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} without the file. Raises InputError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must be a JSON object, not {type(content).__name__}")
    return content


def read_text(file: Path) -> str:
    """Return the text of a file. Raises InputError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error
