"""Tokenizers of Hugging Face's library `tokenizers`."""

import copy
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from model.errors import InputError
from model.tokenizer.base import Conventions, Tokenizer
from model.tokenizer.control import NONCHARACTERS, ChatText, control_parts, names_pattern
from model.tokenizer.folder import read_conventions

# Prefixes that no text contains: noncharacters, drawn at random in each process so that no user can write them.
_draw = random.SystemRandom().choices
# Before the name of a special token in a vocabulary, so that no text contains that name.
_HIDDEN = "\uffff" + "".join(_draw(NONCHARACTERS, k=16))
# Before the name of a special token in a text, so that the name is read as the token.
_MARK = "\ufffe" + "".join(_draw(NONCHARACTERS, k=16))


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library. It uses one thread, or one per core.

    plain: tokenizer for text without special tokens; None: `library` with `encode_special_tokens`.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        path: Path,
        conventions: Conventions,
        *,
        plain: tokenizers.Tokenizer | None = None,
    ):
        super().__init__(path, max(library.get_vocab().values()) + 1, conventions)
        # Files of sentence encoders request truncation and padding.
        library.no_padding()
        library.no_truncation()
        self._plain = _without_special_tokens(library if plain is None else plain)
        self._library = library

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The added tokens that are special, in this file or in others of its folder."""
        added = self._library.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    def token_name(self, token: int) -> str:
        """Return the entry of the vocabulary for an id."""
        return self._library.id_to_token(token) or ""

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        return names_pattern(self.special_tokens.values())

    @cached_property
    def _marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer that reads special tokens only with a mark before their names, and {its id: original id}.

        The library cannot read a name in one place of a text and ignore it in another.
        """
        library, original = copy.deepcopy(self._plain), {}
        library.encode_special_tokens = True  # not copied by deepcopy
        for i, token in self._library.get_added_tokens_decoder().items():
            if token.special:
                options = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
                library.add_tokens([tokenizers.AddedToken(_MARK + token.content, normalized=False, **options)])
                marked = library.token_to_id(_MARK + token.content)
                assert marked is not None
                original[marked] = i
        return library, original

    def _encode_chat(self, text: ChatText, add_special_tokens: bool) -> list[int]:
        """Encode a conversation whose messages contain names of special tokens."""
        library, original = self._marked
        parts = [_MARK + part if is_name else part for part, is_name in control_parts(text, self._names)]
        ids = library.encode("".join(parts), add_special_tokens=add_special_tokens).ids
        return [original.get(i, i) for i in ids]

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        # A copy, because switching the first one would affect other threads that are encoding.
        library = copy.deepcopy(self._library)
        library.encode_special_tokens = False
        return library

    def _encode_batch(
        self, texts: Sequence[str], threads: int | None, special: bool, add_special_tokens: bool
    ) -> list[list[int]]:
        try:
            if special and any(isinstance(text, ChatText) and text.masked != text for text in texts):
                return [
                    self._encode_chat(text, add_special_tokens)
                    if isinstance(text, ChatText)
                    else self._parsing.encode(text, add_special_tokens=add_special_tokens).ids
                    for text in texts
                ]
            library = self._parsing if special else self._plain
            if threads == 1:
                encoded = [library.encode(text, add_special_tokens=add_special_tokens) for text in texts]
            else:
                encoded = library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises no narrower class
            raise InputError(f"the tokenizer {self.path} is damaged: it cannot encode this text: {error}") from error
        return [encoding.ids for encoding in encoded]

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=True)


def load_tokenizer_json(file: Path) -> HuggingFaceTokenizer:
    """Load a `tokenizer.json` and the other files of its folder. Raises InputError if one is damaged."""
    try:
        library = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises no narrower class
        raise InputError(
            f"{file} is not a tokenizer.json of Hugging Face tokenizers, or it is damaged: {error}"
        ) from error
    if not library.get_vocab_size():
        raise InputError(f"{file} is a tokenizer without a single token; take the model's own")
    vocab_size = max(library.get_vocab().values()) + 1
    conventions = read_conventions(file.parent, library.token_to_id, vocab_size)
    # Special tokens and end tokens of the configuration are special, even if tokenizer.json does not mark them.
    named = [*sorted(conventions.special_names), *(library.id_to_token(i) for i in conventions.eos_ids)]
    declare_special(library, [text for text in named if text and library.token_to_id(text) is not None])
    return HuggingFaceTokenizer(library, file, conventions)


def declare_special(library: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    """Mark tokens of the vocabulary as special: they have no text, and are encoded only on request."""
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    library.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in texts if text not in special]
    )


def _without_special_tokens(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer that encodes the names of special tokens as plain characters."""
    library.encode_special_tokens = True
    if not isinstance(library.model, tokenizers.models.Unigram):
        return library
    # A unigram vocabulary has special tokens among its pieces and would match their names, so the pieces are renamed.
    description = json.loads(library.to_str())
    pieces, added = description["model"]["vocab"], description["added_tokens"]
    hidden = [token for token in added if token["special"] and token["id"] < len(pieces)]
    for token in hidden:
        pieces[token["id"]][0] = _HIDDEN + token["content"]
    description["added_tokens"] = [token for token in added if token not in hidden]
    plain = tokenizers.Tokenizer.from_str(json.dumps(description))
    plain.encode_special_tokens = True
    return plain
