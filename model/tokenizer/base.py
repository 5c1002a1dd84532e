"""Interface of all tokenizers, independent of their files and libraries."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, SupportsIndex

from model.errors import InputError
from model.tokenizer.control import ChatText


@dataclass(frozen=True)
class Conventions:
    """Special tokens and chat template of a model, from its files.

    template_tokens: texts of the tokens that a template may name, `bos_token`, `eos_token` and so on. special_names:
    texts of all special tokens.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    chat_template: str | None = None
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    special_names: frozenset[str] = frozenset()


class Tokenizer(ABC):
    """Encoder of texts and decoder of ids.

    A text is encoded to special tokens only on request, so that text from a user cannot begin or end a turn.
    """

    def __init__(self, path: Path, vocab_size: int, conventions: Conventions):
        self.path = path
        self.vocab_size = vocab_size
        self.eos_ids: tuple[int, ...] = conventions.eos_ids
        self.bos_id: int | None = conventions.bos_id
        self._conventions = conventions
        self.given_template: str | None = None
        """The template of `with_chat_template`."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document: the first of `eos_ids`, all of which end a generation."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a chat model; None without one."""
        return self._conventions.chat_template

    def encode(self, text: str, *, special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of a text; for the keywords see `encode_batch`. Raises InputError for a lone surrogate."""
        return self.encode_batch([text], threads=1, special=special, add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        threads: int | None = None,
        *,
        special: bool = False,
        add_special_tokens: bool = False,
    ) -> list[list[int]]:
        """Return the ids of each text, computed by `threads` threads (None: one per core).

        special: encode the names of special tokens as these tokens, for text from `apply_chat_template`.
        add_special_tokens: add the tokens that the model was trained with around a text, such as a begin token, or
        [CLS] and [SEP] of a sentence encoder. Raises InputError for a lone surrogate.
        """
        for index, text in enumerate(texts):
            _check_encodable(text, index)
        return self._encode_batch(texts, threads, special, add_special_tokens)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Return the text of ids. Special tokens have no text; incomplete characters become U+FFFD.

        Raises InputError for an id outside the vocabulary.
        """
        numbers = [int(i) for i in ids]
        for i in numbers:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is outside the vocabulary of {self.path}: 0 to {self.vocab_size - 1}")
        return self._decode(numbers) if numbers else ""

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> ChatText:
        """Return the prompt of a conversation, begin token included, to be encoded with `special=True`.

        A message is {"role": …, "content": …}. add_generation_prompt: begin the model's turn. variables: other
        variables of the template, such as `tools`. The result records which characters came from messages and
        variables: names of special tokens in them are encoded as plain characters. (Slices and sums of it are plain
        strings, without that record.) Raises InputError if there is no chat template, or if the template raises an
        error for the messages.
        """
        template = self.chat_template
        if template is None:
            raise InputError(
                f"the tokenizer {self.path} has no chat template; pass plain text or a chat model's tokenizer, or "
                "prepare the data with `isoflop data prepare … --chat-template chatml`"
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

    def with_chat_template(self, template: str) -> Self:
        """Return the tokenizer with this chat template in place of its own.

        The template may write `eos_token` even where no file of the tokenizer names it.
        """
        changed = copy.copy(self)
        tokens = dict(self._conventions.template_tokens)
        if self.eos_id is not None and self.eos_id in self.special_tokens:
            tokens.setdefault("eos_token", self.special_tokens[self.eos_id])
        changed._conventions = replace(self._conventions, chat_template=template, template_tokens=tokens)
        changed.given_template = template
        return changed

    @property
    def template_tokens(self) -> Mapping[str, str]:
        """Texts of the tokens that a template may name."""
        return self._conventions.template_tokens

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[int, str]:
        """Names, by id, of the tokens that have no text and are encoded only with `special=True`."""

    @abstractmethod
    def token_name(self, token: int) -> str:
        """Return the entry of the vocabulary for an id, such as "▁the", "Ġthe" or "<0x0A>"."""

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
            f"text {index} has the lone surrogate {text[error.start]!r} at character {error.start},"
            ' which is not valid Unicode; clean it with text.encode("utf-8", "replace").decode()'
        ) from error
