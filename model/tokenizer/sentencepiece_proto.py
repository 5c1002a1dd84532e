"""Serialise a sentencepiece model with the few fields that encoding and decoding read.

Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. Encoding:
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
    """Return a serialised ModelProto. pieces: (text, score, type), with the type numbers of GGUF files."""
    trainer = _field(3, _VARINT, _UNIGRAM if unigram else _BPE) + _field(35, _VARINT, byte_fallback)
    normalizer = _field(3, _VARINT, add_dummy_prefix) + _field(4, _VARINT, remove_extra_whitespaces)
    if precompiled_charsmap:
        normalizer += _field(2, _BYTES, precompiled_charsmap)
    return b"".join(piece(*each) for each in pieces) + _field(2, _BYTES, trainer) + _field(3, _BYTES, normalizer)


def piece(text: str, score: float, kind: int) -> bytes:
    """Return one piece of a serialised ModelProto, to be inserted anywhere in it; ids follow the order of pieces."""
    return _field(1, _BYTES, _field(1, _BYTES, text.encode()) + _field(2, _FLOAT, score) + _field(3, _VARINT, kind))


def _field(number: int, wire_type: int, value: int | float | bytes) -> bytes:
    key = _varint(number << 3 | wire_type)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    return key + (struct.pack("<f", value) if wire_type == _FLOAT else _varint(int(value)))


def _varint(number: int) -> bytes:
    """Encode seven bits per byte, the lowest first, with the eighth bit set in all bytes but the last: 300 is AC 02."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
