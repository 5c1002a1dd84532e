"""Add special tokens to a stored tokenizer, such as the mask or the sentinels of a training objective."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.tokenizer.folder import read_tokenizer_config
from model.tokenizer.load import load_tokenizer
from model.tokenizer.sentencepiece import parse_model
from model.tokenizer.sentencepiece_proto import CONTROL, UNUSED, piece

MASK = "[MASK]"
_CONFIG = "tokenizer_config.json"


def add_special_tokens(folder: Path, names: Mapping[int, str]) -> None:
    """Add special tokens {id: name} to the tokenizer of a folder and to its `tokenizer_config.json`.

    Ids inside the vocabulary are unchanged; gaps between ids are filled with unused tokens. The files remain readable
    by Transformers. Raises InputError for a GGUF file, and for a name that is in the vocabulary already.
    """
    tokenizer = load_tokenizer(folder)
    if all(number < tokenizer.vocab_size for number in names):
        return
    ids = range(tokenizer.vocab_size, max(names) + 1)
    texts = [names.get(number, f"<unused_{number}>") for number in ids]
    if tokenizer.path.suffix == ".gguf":
        raise InputError(f"{tokenizer.path}: special tokens cannot be added to a GGUF file")
    if tokenizer.path.suffix == ".json":
        _extend_json(tokenizer.path, texts)
        config = read_tokenizer_config(folder)
    else:
        config = _extend_sentencepiece(tokenizer.path, texts, names) | read_tokenizer_config(folder)
    added = [names[number] for number in ids if number in names]
    if MASK in added:
        config["mask_token"] = MASK
    additional = [*config.get("additional_special_tokens", ()), *(text for text in added if text != MASK)]
    if additional:
        config["additional_special_tokens"] = list(dict.fromkeys(additional))
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _extend_json(file: Path, texts: list[str]) -> None:
    from tokenizers import AddedToken, Tokenizer

    library = Tokenizer.from_file(str(file))
    _check_new(file, [text for text in texts if library.token_to_id(text) is not None])
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    library.save(str(file))


def _extend_sentencepiece(file: Path, texts: list[str], names: Mapping[int, str]) -> dict[str, Any]:
    """Append the pieces and return the `tokenizer_config.json` that Transformers needs for such a file."""
    model = file.read_bytes()
    processor = parse_model(model)
    _check_new(file, [text for text in texts if processor.id_to_piece(processor.piece_to_id(text)) == text])
    named = set(names.values())
    kinds = [CONTROL if text in named else UNUSED for text in texts]
    file.write_bytes(model + b"".join(piece(text, 0.0, kind) for text, kind in zip(texts, kinds, strict=True)))
    roles = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    return {
        "tokenizer_class": "LlamaTokenizer",  # the class of Transformers that reads a sentencepiece model unchanged
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": processor.normalize("a") != "a",
        "legacy": False,
        **{f"{role}_token": processor.id_to_piece(number) if number >= 0 else None for role, number in roles.items()},
    }


def _check_new(file: Path, taken: list[str]) -> None:
    if taken:
        raise InputError(f"{file} has {taken[0]!r} already, under another id than the model's")
