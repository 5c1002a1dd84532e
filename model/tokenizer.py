"""Text to token ids and back. Training a tokenizer is `train.data.tokenizer_training`'s."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from model.errors import InputError

# sentencepiece writes a space as this character inside its pieces: from a text it would come back as a space.
_WHITESPACE_MARK = "\u2581"


class Tokenizer:
    """A sentencepiece tokenizer: ids of plain text only, special tokens are never parsed from text.

    With a tokenizer trained by isoflop, `decode(encode(text)) == text` for every text.
    """

    def __init__(self, processor: Any, path: Path):
        self.path = path
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        eos_id = processor.eos_id()
        self.eos_ids: tuple[int, ...] = (eos_id,) if eos_id >= 0 else ()
        self._mark_ids = self._byte_ids(_WHITESPACE_MARK.encode()) if self._is_literal() else None

    def _is_literal(self) -> bool:
        # Only where no prefix is added may a text be encoded in parts that are then joined.
        return self._processor.normalize("a  b") == "a▁▁b"

    def _byte_ids(self, raw: bytes) -> list[int] | None:
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in raw]
        return ids if all(self._processor.is_byte(i) for i in ids) else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any begin or end token. A lone surrogate in it is an `InputError`."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Ids of each text, computed by `threads` threads (None: one per core)."""
        parts: list[str] = []
        counts = []
        for index, text in enumerate(texts):
            _check_encodable(text, index)
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

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids. Special tokens give nothing; bytes that are no whole character give U+FFFD."""
        plain = [int(i) for i in ids]
        for i in plain:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"token id {i} is outside the vocabulary of {self.path}: 0 to {self.vocab_size - 1}")
        return self._processor.decode(plain) if plain else ""

    def apply_chat_template(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation; `InputError` where the tokenizer has no chat template."""
        raise InputError(
            f"the tokenizer {self.path} has no chat template; pass plain text, or a chat model's tokenizer"
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a sentencepiece `.model` file or from a folder that holds `tokenizer.model`."""
    given = path = Path(path)
    if path.is_dir():
        path = next((path / n for n in ("tokenizer.model", "tokenizer.json") if (path / n).is_file()), path)
        if path.is_dir():
            gguf = sorted(path.glob("*.gguf"))
            if not gguf:
                raise InputError(f"the folder {given} holds no tokenizer: expected tokenizer.model in it")
            path = gguf[0]
    if not path.is_file():
        raise InputError(f"no tokenizer at {given}: expected a sentencepiece .model file or a folder holding one")
    if path.suffix in (".json", ".gguf"):
        kind = "tokenizer.json" if path.suffix == ".json" else "GGUF"
        raise InputError(f"{path} is a {kind} tokenizer, which is not supported yet; use a sentencepiece .model file")
    try:
        model = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model) if model else None
    except (RuntimeError, OSError):
        processor = None
    if processor is None or processor.get_piece_size() == 0:
        raise InputError(f"{path} is not a sentencepiece model, or it is damaged")
    return Tokenizer(processor, path)


def _check_encodable(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text {index} holds the lone surrogate {text[error.start]!r} at character {error.start},"
            ' which is no Unicode text; clean it with text.encode("utf-8", "replace").decode()'
        ) from error
