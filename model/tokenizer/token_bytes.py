"""The bytes of every token, for grammars: a token may hold a part of a character, which `decode` cannot show."""

import re
from functools import lru_cache

from model.errors import InputError
from model.tokenizer.base import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that each id adds to a text that it continues; none for special tokens.

    A token whose text is not whole characters gives its bytes by its name: `<0xE2>`, or the characters by which
    byte-level BPE writes bytes. Raises InputError if the tokenizer has no text that others can continue.
    """
    anchor = _anchor(tokenizer)
    before = tokenizer.decode([anchor])
    special = tokenizer.special_tokens
    found = [b""] * tokenizer.vocab_size
    for i in range(tokenizer.vocab_size):
        if i in special:
            continue
        text = tokenizer.decode([anchor, i])
        if not text.startswith(before):
            continue  # the token changes the text before it: no grammar can follow it
        text = text[len(before) :]
        found[i] = _named_bytes(tokenizer.token_name(i), text) if _REPLACEMENT in text else text.encode()
    return found


def _anchor(tokenizer: Tokenizer) -> int:
    for letter in ("a", "e", "A", "0", "."):
        ids = tokenizer.encode(letter)
        if ids and tokenizer.decode(ids[-1:]).strip():
            return ids[-1]
    raise InputError(f"the tokenizer {tokenizer.path} cannot write a single letter; take the model's own tokenizer")


def _named_bytes(name: str, text: str) -> bytes:
    """Return the bytes of a token with an incomplete character; none if its name does not say them."""
    if match := _BYTE_NAME.fullmatch(name):
        return bytes([int(match[1], 16)])
    table = byte_of_character()
    if all(character in table for character in name):
        return bytes(table[character] for character in name)
    return text.encode() if _REPLACEMENT in name else b""  # a token may be U+FFFD itself


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """Return which byte each character of byte-level BPE writes (Radford et al. 2019, `bytes_to_unicode` of GPT-2).

    A printable byte of Latin-1 is the character with its number; the others are the characters from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
