"""What every tokenizer can do, whatever its file and its library."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

from model.errors import InputError
from model.tokenizer.control import ChatText


@dataclass(frozen=True)
class Conventions:
    """What a model's files say about its special tokens and how a conversation becomes a prompt."""

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    chat_template: str | None = None
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    """What a template may name: `bos_token`, `eos_token` … and their texts."""
    special_names: frozenset[str] = frozenset()
    """Texts of all tokens that the files call special."""


class Tokenizer(ABC):
    """Ids of texts and texts of ids.

    Special tokens come out of a text only where they are asked for, so that what a user writes cannot end a
    turn or begin one.
    """

    def __init__(self, path: Path, vocab_size: int, conventions: Conventions):
        self.path = path
        self.vocab_size = vocab_size
        self.eos_ids: tuple[int, ...] = conventions.eos_ids
        self.bos_id: int | None = conventions.bos_id
        self._conventions = conventions

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text: the first of `eos_ids`, all of which end a generation."""
        return self.eos_ids[0] if self.eos_ids else None

    def encode(self, text: str, *, special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; the keywords are `encode_batch`'s. A lone surrogate in it is an `InputError`."""
        return self.encode_batch([text], threads=1, special=special, add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        threads: int | None = None,
        *,
        special: bool = False,
        add_special_tokens: bool = False,
    ) -> list[list[int]]:
        """Ids of each text, computed by `threads` threads (None: one per core).

        `special` reads the names of special tokens in a text as these tokens: for what `apply_chat_template`
        wrote. `add_special_tokens` puts the tokens around each text that the model was trained to see there,
        such as a sentence encoder's [CLS] and [SEP]; without it there is no begin or end token.
        """
        for index, text in enumerate(texts):
            _check_encodable(text, index)
        return self._encode_batch(texts, threads, special, add_special_tokens)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids. Special tokens give nothing; bytes that are no whole character give U+FFFD."""
        plain = [int(i) for i in ids]
        for i in plain:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is outside the vocabulary of {self.path}: 0 to {self.vocab_size - 1}")
        return self._decode(plain) if plain else ""

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> ChatText:
        """The prompt text of a conversation, begin token included: encode it with `special=True`.

        A message is {"role": …, "content": …}. `add_generation_prompt` opens the turn that the model is to
        write; `variables` are whatever else the template knows, such as `tools`. The text remembers what of it
        came from messages and variables: names of special tokens in them are encoded as the characters they are
        made of. (A part of it, or a sum with it, is a plain string and remembers nothing.) `InputError` where
        the tokenizer has no chat template, or the template refuses the messages.
        """
        template = self._conventions.chat_template
        if template is None:
            raise InputError(
                f"the tokenizer {self.path} has no chat template; pass plain text, or a chat model's tokenizer"
            )
        from model.tokenizer.chat import render

        return render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
            tokens=self._conventions.template_tokens,
            special=list(self.special_tokens.values()),
            path=self.path,
        )

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[int, str]:
        """Ids that give no text, and that come out of a text only with `special=True`, with their names."""

    @abstractmethod
    def _encode_batch(
        self, texts: Sequence[str], threads: int | None, special: bool, add_special_tokens: bool
    ) -> list[list[int]]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def _check_encodable(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text {index} holds the lone surrogate {text[error.start]!r} at character {error.start},"
            ' which is no Unicode text; clean it with text.encode("utf-8", "replace").decode()'
        ) from error
