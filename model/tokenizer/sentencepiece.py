"""Tokenizers of the sentencepiece library: isoflop's own, and those of Llama 2, Gemma, T5 and similar models."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model.errors import InputError
from model.tokenizer.base import Conventions, Tokenizer
from model.tokenizer.control import control_parts, names_pattern
from model.tokenizer.folder import read_conventions, read_tokenizer_config

# Inside its pieces sentencepiece represents a space by this character, which would be decoded as a space.
_WHITESPACE_MARK = "\u2581"


class SentencepieceTokenizer(Tokenizer):
    """A sentencepiece tokenizer. For those trained by isoflop, `decode(encode(text)) == text` for every text.

    before, after: ids added around a text. same: {id: another id with the same text}. names: of control tokens with
    another name in the processor.
    """

    def __init__(
        self,
        processor: Any,
        path: Path,
        conventions: Conventions,
        *,
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        same: Mapping[int, int] = MappingProxyType({}),
        names: Mapping[int, str] = MappingProxyType({}),
    ):
        super().__init__(path, processor.get_piece_size(), conventions)
        self._same, self._own_names = same, names
        self._processor = processor
        self._before, self._after = list(before), list(after)
        self._mark_ids = self._byte_ids(_WHITESPACE_MARK.encode()) if self._is_literal() else None

    def _is_literal(self) -> bool:
        # A text may be encoded in parts only if no prefix is added to each.
        return self._processor.normalize("a  b") == "a▁▁b"

    def _byte_ids(self, raw: bytes) -> list[int] | None:
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in raw]
        return ids if all(self._processor.is_byte(i) for i in ids) else None

    def _encode_batch(
        self, texts: Sequence[str], threads: int | None, special: bool, add_special_tokens: bool
    ) -> list[list[int]]:
        if special:
            encoded = [self._encode_special(text, threads) for text in texts]
        else:
            encoded = self._encode_plain(texts, threads)
        if add_special_tokens:
            encoded = [self._before + ids + self._after for ids in encoded]
        return encoded

    def _encode_plain(self, texts: Sequence[str], threads: int | None) -> list[list[int]]:
        parts: list[str] = []
        counts = []
        for text in texts:
            pieces = text.split(_WHITESPACE_MARK) if self._mark_ids else [text]
            parts += pieces
            counts.append(len(pieces))
        encoded = iter(self._processor.encode(parts, num_threads=threads or os.cpu_count() or 1))
        return [self._join(next(encoded) for _ in range(count)) for count in counts]

    def _join(self, parts: Iterable[list[int]]) -> list[int]:
        joined: list[int] | None = None
        for part in parts:
            joined = part if joined is None else joined + (self._mark_ids or []) + part
        return joined or []

    def _encode_special(self, text: str, threads: int | None) -> list[int]:
        # The library never encodes a control token, so the text is split at their names. As in llama.cpp, each part
        # between them is encoded as a text of its own, with the prefix that the model may add.
        parts = list(control_parts(text, self._names))
        plain = iter(self._encode_plain([part for part, is_name in parts if not is_name], threads))
        ids: list[int] = []
        for part, is_name in parts:
            ids += [self._ids_of_names[part]] if is_name else next(plain)
        return ids

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The control tokens."""
        ids = [i for i in range(self.vocab_size) if self._processor.is_control(i)]
        return {i: self._own_names.get(i) or self._processor.id_to_piece(i) for i in ids}

    def token_name(self, token: int) -> str:
        """Return the entry of the vocabulary for an id."""
        return self._processor.id_to_piece(token)

    @cached_property
    def _ids_of_names(self) -> dict[str, int]:
        return {name: i for i, name in self.special_tokens.items()}  # the last id of a repeated name

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        return names_pattern(self.special_tokens.values())

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode([self._same.get(i, i) for i in ids])


def load_sentencepiece(file: Path) -> SentencepieceTokenizer:
    """Load a sentencepiece `.model` file and the other files of its folder. Raises InputError if one is damaged."""
    try:
        model = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {file}: {error.strerror or error}") from error
    processor = parse_model(model)
    if processor is None:
        raise InputError(f"{file} is not a sentencepiece model, or it is damaged")

    def token_id(text: str) -> int | None:
        i = processor.piece_to_id(text)
        return i if processor.id_to_piece(i) == text else None

    conventions = read_conventions(file.parent, token_id, processor.get_piece_size())
    own_eos, own_bos = processor.eos_id(), processor.bos_id()
    if not conventions.eos_ids and own_eos >= 0:
        conventions = replace(conventions, eos_ids=(own_eos,))
    if conventions.bos_id is None and own_bos >= 0:
        conventions = replace(conventions, bos_id=own_bos)
    # Special tokens and end tokens of the configuration are control tokens, regardless of their type in the vocabulary.
    named = {*conventions.eos_ids, *(token_id(text) for text in conventions.special_names)}
    words = [i for i in named if i is not None and not (processor.is_control(i) or processor.is_unknown(i))]
    if words:
        processor = parse_model(with_control_pieces(model, words))
    config = read_tokenizer_config(file.parent)
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    if config.get("add_bos_token") is True and conventions.bos_id is not None:
        before = (conventions.bos_id,)
    if config.get("add_eos_token") is True:
        after = conventions.eos_ids[:1]
    return SentencepieceTokenizer(processor, file, conventions, before=before, after=after)


def with_control_pieces(model: bytes, ids: Iterable[int]) -> bytes:
    """Return a serialised model in which these pieces are control tokens, to which no text is encoded."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    for i in ids:
        proto.pieces[i].type = proto.SentencePiece.CONTROL
    return proto.SerializeToString()


def parse_model(model: bytes) -> Any:
    """Return the library's processor of a serialised model, None if it is damaged."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model) if model else None
        if processor is None or not processor.get_piece_size():
            return None
        processor.id_to_piece(list(range(processor.get_piece_size())))
    except (RuntimeError, OSError, UnicodeDecodeError):  # the last if the library's message is not valid UTF-8
        return None
    return processor
