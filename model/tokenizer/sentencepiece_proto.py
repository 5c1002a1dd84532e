"""Write a sentencepiece model: the few fields that encoding and decoding read.

Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. The encoding:
https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterable

CONTROL, UNUSED = 3, 5  # types of pieces
_UNIGRAM, _BPE = 1, 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5


def model_proto(
    pieces: Iterable[tuple[str, float, int]],
    *,
    unigram: bool,
    byte_fallback: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    precompiled_charsmap: bytes = b"",
) -> bytes:
    """A serialised ModelProto. A piece is its text, its score and its type, numbered as in GGUF files."""
    trainer = _field(3, _VARINT, _UNIGRAM if unigram else _BPE) + _field(35, _VARINT, byte_fallback)
    normalizer = _field(3, _VARINT, add_dummy_prefix) + _field(4, _VARINT, remove_extra_whitespaces)
    if precompiled_charsmap:
        normalizer += _field(2, _BYTES, precompiled_charsmap)
    return b"".join(piece(*each) for each in pieces) + _field(2, _BYTES, trainer) + _field(3, _BYTES, normalizer)


def piece(text: str, score: float, kind: int) -> bytes:
    """One more piece of a serialised ModelProto, wherever in it the bytes are put: ids follow the order of pieces."""
    return _field(1, _BYTES, _field(1, _BYTES, text.encode()) + _field(2, _FLOAT, score) + _field(3, _VARINT, kind))


def _field(number: int, wire: int, value: int | float | bytes) -> bytes:
    key = _varint(number << 3 | wire)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    return key + (struct.pack("<f", value) if wire == _FLOAT else _varint(int(value)))


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; every byte but the last has its eighth bit set."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
