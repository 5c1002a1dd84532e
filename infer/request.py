"""A request to the serving engine: its prompt and settings, its output so far, and timestamps."""

import dataclasses

from infer.completion import Completion
from infer.decode import Emitted
from infer.prompts import Prompt


@dataclasses.dataclass(kw_only=True, eq=False)
class Request(Completion):
    """A prompt and its output so far. Times are seconds of the engine's clock; None: not yet.

    finish_reason: None while it waits or runs, then "stop", "length" or "cancelled". first_token: time at which the
    host had the first token, or the stop id in its place. token_times: one per token; tokens of one step arrive
    together.
    """

    prompt: Prompt
    max_new_tokens: int
    submitted: float
    first_token: float | None = None
    finished: float | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)

    # Requests with equal contents are different requests.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def receive(self, emitted: Emitted, row: int, now: float) -> bool:
        """Append this row's tokens of one call (host arrays); return True if there were any or the request ended."""
        if self.finish_reason is not None:
            return False
        before = len(self.tokens)
        self.read(emitted, row)
        self.token_times += [now] * (len(self.tokens) - len(self.token_times))
        if self.finish_reason is not None:
            self.finished = now
        changed = len(self.tokens) != before or self.finish_reason is not None
        if changed and self.first_token is None:
            self.first_token = now
        return changed

    def end(self, reason: str) -> None:
        """End the request; tokens dropped with a stop string lose their times too."""
        super().end(reason)
        del self.token_times[len(self.tokens) :]
