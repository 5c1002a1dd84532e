"""Write a tokenizer into a Hugging Face folder, as files that Transformers opens too."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import InputError
from model.tokenizer.base import Tokenizer
from model.tokenizer.files import replace_tokenizer
from model.tokenizer.folder import GENERATION
from model.tokenizer.load import load_tokenizer
from model.tokenizer.same import same_ids

if TYPE_CHECKING:
    from model.tokenizer.gguf import Vocabulary

_CLASSES = {"gpt2": "PreTrainedTokenizerFast", "llama": "LlamaTokenizer", "t5": "T5Tokenizer"}  # of Transformers
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token")
# All that a folder may hold of a tokenizer, such as the files of its slow class.
_PATTERNS = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    "chat_template*",
)


def export_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a model's folder, in place of the one that is there.

    Files of sentencepiece and Hugging Face are copied. A GGUF file's byte-level BPE becomes tokenizer.json, its
    sentencepiece vocabulary tokenizer.model, with tokenizer_config.json; `generation_config.json` names all end tokens.
    Raises InputError, and writes nothing, where these files cannot say the same as the GGUF file.
    """
    if tokenizer.path.suffix == ".gguf":
        files = _converted(tokenizer)
    elif tokenizer.path.parent.resolve() == folder.resolve():
        return
    else:
        found = {file for pattern in _PATTERNS for file in tokenizer.path.parent.glob(pattern) if file.is_file()}
        files = {file.name: file.read_bytes() for file in found}
    replace_tokenizer(folder, files)
    if tokenizer.eos_ids and load_tokenizer(folder).eos_ids != tokenizer.eos_ids:
        _name_end_tokens(folder, tokenizer.eos_ids)


def _converted(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files of a GGUF file's tokenizer, which were read back and found to say the same."""
    from model.tokenizer.gguf import read_vocabulary

    vocabulary = read_vocabulary(tokenizer.path)
    texts: dict[str, int] = {}
    for i, text in enumerate(vocabulary.tokens):
        if texts.setdefault(text, i) != i:
            raise InputError(
                f"{tokenizer.path}: the tokens {texts[text]} and {i} have one text, {text!r}, which no Hugging Face "
                "tokenizer can hold"
            )
    files = _byte_level(vocabulary) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary)
    before, after = vocabulary.around()
    conventions = vocabulary.conventions()
    names = {role: text for role, text in conventions.template_tokens.items() if vocabulary.is_special(texts[text])}
    config: dict[str, Any] = {
        "tokenizer_class": _CLASSES[vocabulary.model],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        **{role: names.get(role) for role in _ROLES},
    }
    if vocabulary.model == "llama":
        config |= {"add_prefix_space": vocabulary.adds_prefix, "legacy": False}
    if conventions.chat_template is not None:
        config["chat_template"] = conventions.chat_template
    files["tokenizer_config.json"] = _json(config)
    with tempfile.TemporaryDirectory() as place:
        replace_tokenizer(Path(place), files)
        _name_end_tokens(Path(place), tokenizer.eos_ids)
        _check_same(tokenizer, load_tokenizer(place))
    return files


def _byte_level(vocabulary: "Vocabulary") -> dict[str, bytes]:
    from tokenizers import decoders

    from model.tokenizer.gguf import byte_level_library

    library = byte_level_library(vocabulary, vocabulary.tokens)
    library.decoder = decoders.ByteLevel()
    return {"tokenizer.json": library.to_str().encode()}


def _sentencepiece(vocabulary: "Vocabulary") -> dict[str, bytes]:
    from model.tokenizer.gguf import sentencepiece_model

    return {"tokenizer.model": sentencepiece_model(vocabulary, vocabulary.tokens, vocabulary.types)}


def _check_same(tokenizer: Tokenizer, written: Tokenizer) -> None:
    marked = " a ".join(["", *tokenizer.special_tokens.values(), ""])
    same = (
        same_ids(tokenizer, written)
        and tokenizer.eos_ids == written.eos_ids
        and tokenizer.encode(marked, special=True) == written.encode(marked, special=True)
        and tokenizer.encode("a", add_special_tokens=True) == written.encode("a", add_special_tokens=True)
    )
    if not same:
        raise InputError(
            f"{tokenizer.path}: its tokenizer cannot be written as {written.path.name} that gives the same ids"
        )


def _name_end_tokens(folder: Path, ids: tuple[int, ...]) -> None:
    file = folder / GENERATION
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_bytes(_json({**content, "eos_token_id": ids[0] if len(ids) == 1 else list(ids)}))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
