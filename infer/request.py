"""One request to the engine: what was asked, what has come of it, and when."""

import dataclasses

from infer.decode import Emitted
from infer.generate import Completion
from infer.prompts import Prompt
from model import KVCache


@dataclasses.dataclass(kw_only=True, eq=False)
class Request(Completion):
    """A prompt and what has come of it so far. Times are seconds of the engine's clock, None: not yet.

    finish_reason: None while it waits or runs, then "stop", "length" or "cancelled". first_token: when the host had
    the first token, or the stop id in its place. token_times: of every token; those of one step come together.
    """

    prompt: Prompt
    max_new_tokens: int
    submitted: float
    first_token: float | None = None
    finished: float | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)

    # Two requests that say the same are two.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def receive(self, emitted: Emitted, row: int, now: float) -> bool:
        """Take in what a call made (host arrays) of this row; whether that was anything."""
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
        """End as any completion does; a token that a stop string takes back has no time."""
        super().end(reason)
        del self.token_times[len(self.tokens) :]


@dataclasses.dataclass
class Reading:
    """A request whose prompt is being read. width: tokens of a chunk. done: tokens that its cache holds."""

    request: Request
    cache: KVCache
    width: int
    done: int = 0
