"""The outputs of `generate` on the host: one `Completion` per row while it runs, `Generated` at the end."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from infer.decode import FULL, RUNNING, Emitted
from infer.prompts import Prompt
from infer.sampling import Sampling
from infer.text import Decoder, Detokenizer


@dataclasses.dataclass(frozen=True)
class Generated:
    """One entry per completion, ordered by prompt; `Sampling.n` consecutive entries per prompt.

    tokens: without the stop id. If a stop string was found, all tokens of `text`; the last one may extend into the stop
    string. logprobs: log-probabilities of these tokens under the model. finish_reason: "stop" (stop id or stop string)
    or "length". top_logprobs: per token {id: log-probability} of the most likely tokens at its position, as many as
    `Sampling.logprobs`. text: the text that the tokens add to the prompt's, up to the start of a stop string
    (`infer.text.Detokenizer`); None without a tokenizer.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]
    top_logprobs: list[list[dict[int, float]]] = dataclasses.field(default_factory=list)
    text: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Update:
    """The output that a completion got since the last `Completion.take`: nothing in it will be changed or withdrawn.

    text: "" without a tokenizer. finish_reason: None while the row runs. The text of a token may come in a later update
    than the token, if the token ends within a character.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str | None


@dataclasses.dataclass
class Completion:
    """The output of a row as far as the host has read it.

    detokenizer: detokenizes the tokens; None without a tokenizer. finish_reason: None while the row runs.
    """

    sampling: Sampling
    detokenizer: Detokenizer | None = dataclasses.field(default=None, repr=False, compare=False)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    _taken: int = 0  # tokens that `take` returned

    @property
    def text(self) -> str | None:
        """The text so far, without what a later token may still change; None without a tokenizer."""
        return None if self.detokenizer is None else self.detokenizer.text

    def take(self) -> Update:
        """Return the output since the last call, without tokens that a stop string may still remove."""
        if self.detokenizer is None:
            text, decided = "", len(self.tokens)
        else:
            text, decided = self.detokenizer.take(), self.detokenizer.decided_ids
        end = len(self.tokens) if self.finish_reason is not None else max(decided, self._taken)
        new = slice(self._taken, end)
        self._taken = end
        return Update(text, self.tokens[new], self.logprobs[new], self.top_logprobs[new], self.finish_reason)

    def read(self, emitted: Emitted, row: int) -> None:
        """Append this row's tokens of one call (host arrays), and end the completion if the row ended."""
        if self.finish_reason is not None:
            return
        before, top = len(self.tokens), slice(0, self.sampling.logprobs)
        for step in np.flatnonzero(emitted.tokens[row] >= 0):
            self.tokens.append(int(emitted.tokens[row, step]))
            self.logprobs.append(float(emitted.logprobs[row, step]))
            likeliest = zip(emitted.top_ids[row, step, top], emitted.top_logprobs[row, step, top], strict=True)
            self.top_logprobs.append({int(token): float(logprob) for token, logprob in likeliest})
        if self.detokenizer is not None:
            self.detokenizer.push(self.tokens[before:])
            if self.detokenizer.ids_before_stop is not None:
                return self.end("stop")
        if emitted.status[row] != RUNNING:
            self.end("length" if emitted.status[row] == FULL else "stop")

    def end(self, reason: str) -> None:
        """End the completion, and drop tokens that came after a stop string."""
        self.finish_reason = reason
        if self.detokenizer is None:
            return
        self.detokenizer.finish()
        kept = self.detokenizer.ids_before_stop
        if kept is not None:
            self.finish_reason = "stop"
            del self.tokens[kept:], self.logprobs[kept:], self.top_logprobs[kept:]


def detokenizer(decoder: Decoder | None, prompt: Prompt, sampling: Sampling) -> Detokenizer | None:
    """Return the detokenizer of a continuation of this prompt; None without a tokenizer."""
    return None if decoder is None else Detokenizer(decoder, prompt, sampling.stop_strings)


def columns(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the fields of `Generated` from completions that have ended."""
    names = [field.name for field in dataclasses.fields(Generated)]
    values = {name: [getattr(completion, name) for completion in completions] for name in names}
    has_text = all(completion.detokenizer is not None for completion in completions)
    return values if has_text else values | {"text": None}
