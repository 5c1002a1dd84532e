"""Write a tokenizer into a Hugging Face folder, for Transformers."""

import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import InputError
from model.tokenizer.base import Tokenizer
from model.tokenizer.files import replace_tokenizer
from model.tokenizer.folder import GENERATION
from model.tokenizer.gguf import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    add_template,
    byte_level_library,
    read_vocabulary,
    sentencepiece_model,
)
from model.tokenizer.load import NAMES, load_tokenizer
from model.tokenizer.same import same_ids

# Classes of Transformers.
_FAST_CLASS, _CLASSES = "PreTrainedTokenizerFast", {"llama": "LlamaTokenizer", "t5": "T5Tokenizer"}
_T5_UNKNOWN = 2  # id of T5's unknown token in Transformers, which ignores the file's
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token")
_CONFIG = "tokenizer_config.json"
_SPACE = "\u2581"  # sentencepiece's character for a space
_RANDOM_TEXTS = 200  # with which a written tokenizer is checked
# Files of a tokenizer in a folder, those of its slow class included.
_PATTERNS = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    "chat_template*",
)


def export_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a model's folder, replacing the one in it.

    Files of sentencepiece and Hugging Face are copied. Byte-level BPE of a GGUF file becomes tokenizer.json; its
    sentencepiece vocabulary becomes tokenizer.model and, if that has the same ids, also tokenizer.json, which
    Transformers reads more faithfully. `generation_config.json` has all end tokens. Raises InputError, and writes
    nothing, if these files cannot represent the tokenizer of the GGUF file.
    """
    if tokenizer.path.suffix == ".gguf":
        files = _converted(tokenizer)
    elif tokenizer.path.parent.resolve() == folder.resolve():
        return
    else:
        found = {file for pattern in _PATTERNS for file in tokenizer.path.parent.glob(pattern) if file.is_file()}
        shadowing = _shadowing(tokenizer.path.name)
        files = {file.name: file.read_bytes() for file in found if file.name not in shadowing}
    replace_tokenizer(folder, files)
    if tokenizer.eos_ids and load_tokenizer(folder).eos_ids != tokenizer.eos_ids:
        _write_end_tokens(folder, tokenizer.eos_ids)


def _shadowing(name: str) -> tuple[str, ...]:
    """Return the file names that `load_tokenizer` prefers to this one in a folder."""
    return NAMES[: NAMES.index(name)] if name in NAMES else ()


def _converted(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return Hugging Face files of a GGUF file's tokenizer, checked by reading them."""
    vocabulary = read_vocabulary(tokenizer.path)
    texts: dict[str, int] = {}
    for i, text in enumerate(vocabulary.tokens):
        if texts.setdefault(text, i) != i:
            raise InputError(
                f"{tokenizer.path}: the tokens {texts[text]} and {i} have one text, {text!r}, which no Hugging Face "
                "tokenizer can represent"
            )
    if vocabulary.model == "gpt2":
        return _checked(tokenizer, _byte_level(vocabulary) | _config(vocabulary, _FAST_CLASS))
    if vocabulary.model == "t5" and _unknown(vocabulary) != _T5_UNKNOWN:
        raise InputError(
            f"{tokenizer.path}: its unknown token is not {_T5_UNKNOWN}, the id that Transformers requires of a T5"
        )
    model = {"tokenizer.model": sentencepiece_model(vocabulary, vocabulary.tokens, vocabulary.types)}
    plain = _checked(tokenizer, model | _config(vocabulary, _CLASSES[vocabulary.model]))
    if vocabulary.model == "t5":
        return plain
    try:
        return model | _checked(tokenizer, _merges(vocabulary) | _config(vocabulary, _FAST_CLASS))
    except InputError:
        return plain


def _config(vocabulary: Vocabulary, tokenizer_class: str) -> dict[str, bytes]:
    """Return the `tokenizer_config.json` of a vocabulary."""
    before, after = vocabulary.added_around()
    conventions = vocabulary.conventions()
    roles = dict(conventions.template_tokens)
    if vocabulary.model != "gpt2":
        roles["unk_token"] = vocabulary.tokens[_unknown(vocabulary)]
    special = {text for i, text in enumerate(vocabulary.tokens) if vocabulary.is_special(i)}
    config: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        **{role: roles[role] if roles.get(role) in special else None for role in _ROLES},
    }
    if tokenizer_class == _CLASSES["llama"]:
        config |= {"add_prefix_space": vocabulary.adds_prefix, "legacy": False}
    if tokenizer_class == _CLASSES["t5"]:
        config["extra_ids"] = sum(text.startswith("<extra_id_") for text in vocabulary.tokens)
    if conventions.chat_template is not None:
        config["chat_template"] = conventions.chat_template
    return {_CONFIG: _json(config)}


def _unknown(vocabulary: Vocabulary) -> int:
    """Return the id of the one unknown token of a sentencepiece vocabulary."""
    return int(np.argmax(vocabulary.types == UNKNOWN))


def _byte_level(vocabulary: Vocabulary) -> dict[str, bytes]:
    from tokenizers import decoders

    library = byte_level_library(vocabulary, vocabulary.tokens)
    library.decoder = decoders.ByteLevel()
    return {"tokenizer.json": library.to_str().encode()}


def _merges(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Return the `tokenizer.json` of a sentencepiece BPE: pieces with higher scores are merged first."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores, types = vocabulary.numbers("scores", np.zeros(len(vocabulary.tokens), np.float32)), vocabulary.types
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    words = {text: i for text, i in ids.items() if types[i] in (NORMAL, USER_DEFINED)}
    # Any two words whose concatenation is a word can be merged, those of higher score first, then those of lower ids.
    merges = []
    for text, i in words.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in words and right in words:
                merges.append((-float(scores[i]), words[left], words[right], (left, right)))
    pairs = [pair for *_, pair in sorted(merges)]
    unknown = vocabulary.tokens[_unknown(vocabulary)]
    fallback = bool((types == BYTE).any())
    library = tokenizers.Tokenizer(models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    prefix = vocabulary.adds_prefix
    library.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        names = [vocabulary.tokens[i] for i in np.flatnonzero(types == kind)]
        library.add_tokens([tokenizers.AddedToken(name, special=special, normalized=not special) for name in names])
    add_template(library, vocabulary, vocabulary.tokens)
    return {"tokenizer.json": library.to_str().encode()}


def _checked(tokenizer: Tokenizer, files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files unchanged. Raises InputError if the tokenizer that they define is not equivalent."""
    with tempfile.TemporaryDirectory() as folder:
        replace_tokenizer(Path(folder), files)
        _write_end_tokens(Path(folder), tokenizer.eos_ids)
        _check_same(tokenizer, load_tokenizer(folder))
    return files


def _check_same(tokenizer: Tokenizer, written: Tokenizer) -> None:
    draw = random.Random(0)
    random_ids = [draw.choices(range(tokenizer.vocab_size), k=16) for _ in range(_RANDOM_TEXTS)]
    with_names = " a ".join(["", *tokenizer.special_tokens.values(), ""])
    same = (
        same_ids(tokenizer, written, map(tokenizer.decode, random_ids))
        and tokenizer.eos_ids == written.eos_ids
        and tokenizer.encode(with_names, special=True) == written.encode(with_names, special=True)
        and tokenizer.encode("a", add_special_tokens=True) == written.encode("a", add_special_tokens=True)
    )
    if not same:
        raise InputError(f"{tokenizer.path}: its tokenizer cannot be written as {written.path.name} with the same ids")


def _write_end_tokens(folder: Path, ids: tuple[int, ...]) -> None:
    file = folder / GENERATION
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_bytes(_json({**content, "eos_token_id": ids[0] if len(ids) == 1 else list(ids)}))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
