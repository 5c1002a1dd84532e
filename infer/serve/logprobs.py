"""Log-probabilities in the forms of the API, with tokens as strings and as bytes."""

import codecs
import math
from collections.abc import Mapping, Sequence

from infer.reader import Score
from infer.serve.served import Served
from infer.serve.types import (
    LEAST_LOGPROB,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

TopLogprobs = Mapping[int, float]


class TokenNames:
    """Tokens of a model as strings and bytes. as_ids: "token_id:7", which names every token in a way of its own."""

    def __init__(self, served: Served, *, as_ids: bool = False):
        self._special = {} if served.tokenizer is None else served.tokenizer.special_tokens
        self._bytes = served.token_bytes
        self._as_ids = as_ids or served.tokenizer is None

    def bytes(self, token: int) -> bytes:
        """Return the bytes of a token's text, b"" for a special token and for ids without a token."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def name(self, token: int) -> str:
        """Return the text of a token, the name of a special one, and "bytes:\\xe2\\x82" for a part of a character."""
        if self._as_ids:
            return f"token_id:{token}"
        if token in self._special:
            return self._special[token]
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def length(self, tokens: Sequence[int]) -> int:
        """Return the number of characters of the tokens' text."""
        return len(b"".join(map(self.bytes, tokens)).decode(errors="replace"))

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
        place: "Place",
    ) -> CompletionLogprobs:
        """Return the entries of tokens of a text that begin at `place`, which moves on to their end."""
        offsets = [place.skip(self.bytes(token)) for token in tokens]
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

    def prompt(self, tokens: Sequence[int], scores: Sequence[Score | None], count: int) -> PromptLogprobs:
        """Return the entries of a prompt: at each position its token and the `count` most likely ones."""
        return [score and self._ranked(token, *score, count) for token, score in zip(tokens, scores, strict=True)]

    def _ranked(self, token: int, logprob: float, top: TopLogprobs, count: int) -> dict[str, PromptLogprob]:
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


class Place:
    """A place in a text whose bytes are read token by token; character: of the text, that the next token is in."""

    def __init__(self, character: int = 0):
        self.character = character
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def skip(self, raw: bytes) -> int:
        """Move to the end of a token; return the character at which it began."""
        # A character that was begun and is not continued has become U+FFFD.
        abandoned = bool(self._decoder.getstate()[0]) and raw[:1] != b"" and raw[0] & 0xC0 != 0x80
        begin = self.character + abandoned
        self.character += len(self._decoder.decode(raw))
        return begin
