"""Load the tokenizer in a GGUF file into the library that it was trained with.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer". Defaults of missing keys, and the
choice among tokens with the same text, are those of llama.cpp.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import InputError
from model.gguf_parts import TOKENIZER_NAME, read_first_part
from model.tokenizer.base import Conventions, Tokenizer
from model.tokenizer.folder import TEMPLATE, read_text
from model.tokenizer.pretokenizers import pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = (UNKNOWN, CONTROL)
_MODELS = ("gpt2", "llama", "t5")
_DEFAULT_UNKNOWN = {"llama": 0, "t5": 2}  # llama.cpp's
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
_REPEATED = "\uffff"  # prefix of the library's name of a token with the text of another; not in byte-level texts


def load_gguf_tokenizer(file: Path) -> Tokenizer:
    """Load the tokenizer of a GGUF file: byte-level BPE ("gpt2") or sentencepiece ("llama", "t5").

    Text is not normalised before encoding, except by the table of a "t5" vocabulary: GGUF files do not record that, for
    example, Qwen's tokenizer.json applies NFC. If several tokens have one text, it is encoded to the last of them, the
    name of a special token to the last special one; all of them decode to it. Missing scores are 0; missing types
    follow from the texts of byte tokens and from the ids of special tokens. Raises InputError for other kinds, and for
    metadata that are damaged or lack other keys.
    """
    vocabulary = read_vocabulary(file)
    if vocabulary.model == "gpt2":
        return _byte_level_bpe(vocabulary)
    return _sentencepiece(vocabulary)


def read_vocabulary(file: Path) -> "Vocabulary":
    """Read and check the tokenizer's metadata of a GGUF file, of a split model from its first file."""
    file, header = read_first_part(file)
    return Vocabulary(file, header.metadata)


class Vocabulary:
    """Metadata of a tokenizer; the keys that all kinds have in common are checked."""

    def __init__(self, file: Path, metadata: dict[str, Any]):
        self.file, self._metadata = file, metadata
        if "tokenizer.ggml.model" not in metadata:
            raise InputError(f"{file} has no tokenizer; take the model's tokenizer.json or tokenizer.model")
        self.model = self.get("model", str)
        if self.model not in _MODELS:
            raise InputError(
                f"the tokenizer of {file} is of the kind {self.model!r}; known are {', '.join(_MODELS)}:"
                " take the model's tokenizer.json instead"
            )
        # An empty token would match everywhere.
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.get("tokens", list))]
        if not all(isinstance(token, str) for token in self.tokens) or not self.tokens:
            raise InputError(f"{file} is damaged: its tokenizer.ggml.tokens must be a list of texts")
        self.types = self._types()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return `tokenizer.ggml.KEY`. Raises InputError if it is missing without a default, or has another type."""
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise InputError(f"{self.file} is damaged: it lacks tokenizer.ggml.{key}")
        if not isinstance(value, kind):
            raise InputError(f"{self.file} is damaged: tokenizer.ggml.{key} is a {type(value).__name__}")
        return value

    def numbers(self, key: str, default: np.ndarray) -> np.ndarray:
        """Return an array with one number per token, `default` if the file has none."""
        values = self.get(key, np.ndarray, default)
        if len(values) < len(self.tokens):
            raise InputError(
                f"{self.file} is damaged: tokenizer.ggml.{key} has {len(values)} values for {len(self.tokens)} tokens"
            )
        return values[: len(self.tokens)]

    def id(self, name: str) -> int | None:
        """Return `tokenizer.ggml.NAME_token_id`, None if the file has none."""
        key = f"{name}_token_id"
        i = self.get(key, int, -1)
        if i >= len(self.tokens):
            raise InputError(f"{self.file} is damaged: tokenizer.ggml.{key}={i}, but it has {len(self.tokens)} tokens")
        return i if i >= 0 else None

    def is_special(self, i: int) -> bool:
        """Return whether a token is special: it has no text and no text is encoded to it."""
        return self.types[i] in _SPECIAL

    @property
    def adds_prefix(self) -> bool:
        """True if sentencepiece adds a space before a text."""
        return self.get("add_space_prefix", bool, self.model != "t5")

    def _types(self) -> np.ndarray:
        types = self.numbers("token_type", self._types_of_texts()).copy()
        if self.model != "gpt2":  # sentencepiece has one unknown token
            declared = self.id("unknown")
            found = np.flatnonzero(types == UNKNOWN)
            unknown = declared if declared is not None else found[0] if found.size else _DEFAULT_UNKNOWN[self.model]
            types[found] = CONTROL
            if unknown < len(types):
                types[unknown] = UNKNOWN
        # Some converters give end-of-turn tokens the type of a word, but no text may be encoded to them.
        for name in ("bos", "eos", "eot", "eom"):
            if (i := self.id(name)) is not None and types[i] != UNKNOWN:
                types[i] = CONTROL
        return types

    def _types_of_texts(self) -> np.ndarray:
        types = np.full(len(self.tokens), NORMAL, np.int32)
        if self.model != "gpt2":
            types[[_BYTE_NAME.fullmatch(token) is not None for token in self.tokens]] = BYTE
        return types

    def owners(self, *, special_first: bool) -> list[int]:
        """Return, for each token, the token that owns its text: the id to which the library encodes that text.

        A token owns its text unless others have the same. Then the last user-defined one owns it, or else the last
        normal one. special_first: the last special one takes precedence, for texts in which special tokens are read.
        With the texts a b a, all normal, the owners are 2 1 2.
        """
        rank = {USER_DEFINED: 3, UNUSED: 1} | dict.fromkeys(_SPECIAL, 4 if special_first else 0)
        best: dict[str, tuple[int, int]] = {}
        for i, (token, kind) in enumerate(zip(self.tokens, self.types.tolist(), strict=True)):
            best[token] = max(best.get(token, (-1, -1)), (rank.get(kind, 2), i))
        return [best[token][1] for token in self.tokens]

    def names(self, owners: list[int]) -> list[str]:
        """Return a unique name in the library for each token: its text if it owns that, else a substitute."""
        return [token if owners[i] == i else f"{_REPEATED}{i}" for i, token in enumerate(self.tokens)]

    def conventions(self) -> Conventions:
        """Return the file's special tokens and chat template; end tokens are its eos, eot and eom tokens.

        A `chat_template.jinja` beside a `tokenizer.gguf`, which holds no model, takes the place of the file's own.
        """
        ends = [self.id(name) for name in ("eos", "eot", "eom")]
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "separator"}
        ids = {name: self.id(key) for name, key in names.items()}
        template = self._metadata.get("tokenizer.chat_template")
        given = self.file.with_name(TEMPLATE)
        if self.file.name == TOKENIZER_NAME and given.is_file():
            template = read_text(given)
        return Conventions(
            eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
            bos_id=self.id("bos"),
            chat_template=template if isinstance(template, str) else None,
            template_tokens={f"{name}_token": self.tokens[i] for name, i in ids.items() if i is not None},
        )

    def added_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens that are added (before, after) a text, by default those that are usual for the kind."""
        if self.model == "gpt2":
            adds_bos, adds_eos = pre_tokenizer(self.get("pre", str, "default")).adds_bos, False
        else:
            adds_bos, adds_eos = self.model == "llama", self.model == "t5"
        bos_id, eos_id = self.id("bos"), self.id("eos")
        before = (bos_id,) if bos_id is not None and self.get("add_bos_token", bool, adds_bos) else ()
        after = (eos_id,) if eos_id is not None and self.get("add_eos_token", bool, adds_eos) else ()
        return before, after


def _byte_level_bpe(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import decoders

    from model.tokenizer.huggingface import HuggingFaceTokenizer

    class ByteLevelTokenizer(HuggingFaceTokenizer):
        @cached_property
        def special_tokens(self) -> Mapping[int, str]:
            return {i: token for i, token in enumerate(tokens) if hidden[i]}

        def _decode(self, ids: list[int]) -> str:
            return decoder.decode([tokens[i] for i in ids if not hidden[i]])

    decoder, tokens = decoders.ByteLevel(), vocabulary.tokens
    hidden = np.isin(vocabulary.types, _SPECIAL).tolist()
    owners_with_special = vocabulary.owners(special_first=True)
    owners_in_plain_text = vocabulary.owners(special_first=False)
    library = byte_level_library(vocabulary, vocabulary.names(owners_with_special))
    plain = None
    if owners_in_plain_text != owners_with_special:
        plain = byte_level_library(vocabulary, vocabulary.names(owners_in_plain_text))
    return ByteLevelTokenizer(library, vocabulary.file, vocabulary.conventions(), plain=plain)


def byte_level_library(vocabulary: Vocabulary, names: list[str]) -> Any:
    """Return a tokenizer of the `tokenizers` library with these names of the tokens."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    rule = pre_tokenizer(vocabulary.get("pre", str, "default"))
    merges = [_pair(merge) for merge in vocabulary.get("merges", list)]
    try:
        model = models.BPE({name: i for i, name in enumerate(names)}, merges, ignore_merges=rule.ignore_merges)
    except Exception as error:  # the library raises no narrower class
        raise InputError(f"{vocabulary.file} is damaged: its merges do not fit its tokens: {error}") from error
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in rule.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        texts = [names[i] for i in np.flatnonzero(vocabulary.types == kind)]
        library.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in texts])
    add_template(library, vocabulary, names)
    return library


def add_template(library: Any, vocabulary: Vocabulary, names: list[str]) -> None:
    """Set the template with the vocabulary's begin and end tokens around a text."""
    from tokenizers import processors

    before, after = vocabulary.added_around()
    library.post_processor = processors.TemplateProcessing(
        single=[*(names[i] for i in before), "$A", *(names[i] for i in after)],
        special_tokens=[(names[i], i) for i in {*before, *after}],
    )


def _pair(merge: str) -> tuple[str, str]:
    """Split "a b" at its space; the first character is skipped because it may itself be a space."""
    first, _, second = merge[1:].partition(" ")
    return merge[:1] + first, second


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    from model.tokenizer.sentencepiece import SentencepieceTokenizer, parse_model

    owners = vocabulary.owners(special_first=False)
    repeated = [i for i, owner in enumerate(owners) if owner != i]
    types = vocabulary.types.copy()
    plain = [i for i in repeated if types[i] not in _SPECIAL]
    types[plain] = UNUSED
    processor = parse_model(sentencepiece_model(vocabulary, vocabulary.names(owners), types))
    if processor is None:
        raise InputError(
            f"{vocabulary.file} is damaged: sentencepiece cannot use its tokens;"
            " it needs one unknown token, and all 256 bytes or none"
        )
    before, after = vocabulary.added_around()
    return SentencepieceTokenizer(
        processor,
        vocabulary.file,
        vocabulary.conventions(),
        before=before,
        after=after,
        same={i: owners[i] for i in plain},
        names={i: vocabulary.tokens[i] for i in repeated if i not in plain},
    )


def sentencepiece_model(vocabulary: Vocabulary, names: list[str], types: np.ndarray) -> bytes:
    """Return a serialised model of the sentencepiece library with these names and types of the tokens."""
    from model.tokenizer.sentencepiece_proto import model_proto

    scores = vocabulary.numbers("scores", np.zeros(len(names), np.float32))
    charsmap = vocabulary.get("precompiled_charsmap", np.ndarray, np.zeros(0, np.uint8))
    return model_proto(
        zip(names, scores.tolist(), types.tolist(), strict=True),
        unigram=vocabulary.model == "t5",
        byte_fallback=bool((types == BYTE).any()),
        add_dummy_prefix=vocabulary.adds_prefix,
        remove_extra_whitespaces=vocabulary.get("remove_extra_whitespaces", bool, False),
        precompiled_charsmap=charsmap.astype(np.uint8).tobytes(),
    )
