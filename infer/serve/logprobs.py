"""Log-probabilities in the forms of the API, with tokens as strings and as bytes."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from infer.serve.types import (
    LEAST_LOGPROB,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TokenLogprob,
    TopLogprob,
)
from model.tokenizer import Tokenizer

TopLogprobs = Mapping[int, float]


class TokenNames:
    """Strings of tokens. as_ids: "token_id:7", which names every token in a way of its own."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False):
        self._tokenizer = None if as_ids else tokenizer
        self._bytes_of = tokenizer
        self.name = lru_cache(4096)(self._name)

    def bytes(self, token: int) -> bytes:
        """Return the bytes of a token's text, b"" for a special token."""
        return b"" if self._bytes_of is None else self._bytes_of.token_bytes(token)

    def _name(self, token: int) -> str:
        """Return the text of a token, the name of a special one, and "bytes:\\xe2\\x82" for a part of a character."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        if token in self._tokenizer.special_tokens:
            return self._tokenizer.special_tokens[token]
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def chat(
        self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs], count: int
    ) -> ChatLogprobs:
        """Return the entries of tokens of a message, each with the `count` most likely ones."""
        entries = []
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
            most = [TopLogprob(self.name(i), finite(value), self._listed(i)) for i, value in first(top, count)]
            entries.append(TokenLogprob(self.name(token), finite(logprob), self._listed(token), most))
        return ChatLogprobs(entries)

    def _listed(self, token: int) -> list[int] | None:
        return list(self.bytes(token)) or None

    def completion(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[TopLogprobs | None],
        count: int,
        offset: int,
    ) -> CompletionLogprobs:
        """Return the entries of tokens of a text, the first of which begins at character `offset`."""
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += characters(self.bytes(token))
        return CompletionLogprobs(
            tokens=[self.name(token) for token in tokens],
            token_logprobs=[None if value is None else finite(value) for value in logprobs],
            top_logprobs=[self._top(top, count) for top in tops] if count else None,
            text_offset=offsets,
        )

    def _top(self, top: TopLogprobs | None, count: int) -> dict[str, float] | None:
        if top is None:
            return None
        named: dict[str, float] = {}
        for token, value in first(top, count):
            named.setdefault(self.name(token), finite(value))  # two tokens may have one text: the likelier one
        return named

    def prompt(self, token: int, logprob: float, top: TopLogprobs, count: int) -> dict[str, PromptLogprob]:
        """Return the entry of a position of the prompt: its token, and the `count` most likely ones."""
        ranked = {
            i: PromptLogprob(finite(value), rank, self.name(i)) for rank, (i, value) in enumerate(first(top, count), 1)
        }
        ranked.setdefault(token, PromptLogprob(finite(logprob), None, self.name(token)))
        return {str(i): entry for i, entry in ranked.items()}


def first(top: TopLogprobs, count: int) -> list[tuple[int, float]]:
    """Return the `count` most likely tokens, the most likely first."""
    return sorted(top.items(), key=lambda pair: -pair[1])[:count]


def finite(logprob: float) -> float:
    """Return a log-probability with −9999 in place of −∞, which is not JSON."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def characters(raw: bytes) -> int:
    """Return the number of characters that begin in these bytes of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)
