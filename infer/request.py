"""A request to the serving engine: its prompt and settings, its output so far, and timestamps."""

import dataclasses

import numpy as np

from infer.completion import Completion
from infer.constraint import Constraint, allows, words_of
from infer.decode import Emitted
from infer.prompts import Prompt


@dataclasses.dataclass(kw_only=True, eq=False)
class Request(Completion):
    """A prompt and its output so far. Times are seconds of the engine's clock; None: not yet.

    finish_reason: None while it waits or runs, then "stop", "length", "cancelled", or "error", whose cause is `error`.
    started: time at which it left the queue. first_token: time at which the host had the first token, or the stop id in
    its place. token_times: one per token; tokens of one step arrive together. prefix_hits: tokens of the prompt that
    were not read again because an earlier prompt begins with them.
    """

    prompt: Prompt
    max_new_tokens: int
    submitted: float
    constraint: Constraint | None = None
    prefix_hits: int = 0
    error: Exception | None = None
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)
    _mask: np.ndarray | None = dataclasses.field(default=None, repr=False)  # of the next token

    # Requests with equal contents are different requests.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def receive(self, emitted: Emitted, row: int, now: float) -> bool:
        """Append this row's tokens of one call (host arrays); return True if there were any or the request ended.

        A failure of the detokenizer or the constraint ends the request.
        """
        if self.finish_reason is not None:
            return False
        before = len(self.tokens)
        try:
            self.read(emitted, row)
            if self.constraint is not None and self.finish_reason is None:
                self._accept(self.constraint, self.tokens[before:])
        except Exception as error:
            self.fail(error)
        self.token_times += [now] * (len(self.tokens) - len(self.token_times))
        if self.finish_reason is not None:
            self.finished = now
        changed = len(self.tokens) != before or self.finish_reason is not None
        if changed and self.first_token is None:
            self.first_token = now
        return changed

    def next_mask(self, vocab_size: int) -> np.ndarray | None:
        """Return the constraint's mask for the next token; None: the request has ended.

        It ends where the constraint is finished or fails.
        """
        assert self.constraint is not None
        try:
            if self.constraint.finished:
                self.end("stop")
                return None
            self._mask = np.asarray(self.constraint.mask(), np.uint32)
            if self._mask.shape != (words_of(vocab_size),):
                raise ValueError(
                    f"a mask of {vocab_size} tokens has {words_of(vocab_size)} words, not {self._mask.shape}"
                )
            if not self._mask.any():
                raise ValueError("the constraint allows no token although it is not finished")
        except Exception as error:
            self.fail(error)
            return None
        return self._mask

    def end(self, reason: str) -> None:
        """End the request; tokens dropped with a stop string lose their times too.

        A failure of the detokenizer, which ends the text, ends it with the finish reason "error".
        """
        try:
            super().end(reason)
        except Exception as error:
            self.fail(error)
        del self.token_times[len(self.tokens) :]

    def fail(self, error: Exception) -> None:
        """End the request with the finish reason "error", without another call to what may have failed."""
        self.finish_reason, self.error = "error", error

    def _accept(self, constraint: Constraint, tokens: list[int]) -> None:
        for token in tokens:
            if self._mask is None or not allows(self._mask, token):
                raise ValueError(f"the model gave token {token}, which the constraint does not allow")
            constraint.accept(token)
        if constraint.finished:
            self.end("stop")
