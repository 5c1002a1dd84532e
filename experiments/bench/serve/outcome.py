"""Record what became of one request of a load, in this process or over HTTP. Needs nothing but Python."""

import dataclasses
from typing import Any, Literal, Self

Status = Literal["served", "refused", "failed"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Times are seconds of one monotonic clock.

    due: when the request arrived; sent: when it was sent, which is later if the client or the engine was busy.
    chunk_times, chunk_tokens: when pieces of the output were received, and how many tokens each had. status: "refused"
    if the server said that it has no room (429 or 503), "failed" for any other error and for a stream that broke off.
    ended: when the last byte, the refusal or the failure was there.
    """

    due: float
    sent: float
    ended: float
    status: Status
    chunk_times: tuple[float, ...] = ()
    chunk_tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    first: float | None = None
    """When the first token, or in its place the end, was received."""
    note: str | None = None
    """The error of a failure; of a served request, what is inconsistent in its token counts."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output."""
        return cls(
            **values | {"chunk_times": tuple(values["chunk_times"]), "chunk_tokens": tuple(values["chunk_tokens"])}
        )

    @property
    def seconds_per_output_token(self) -> float | None:
        """Seconds from the first token to the end over the tokens after the first; None for one token or none."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.ended - self.first) / (self.output_tokens - 1)


def spread(tokens: int, chunks: int) -> tuple[int, ...]:
    """Return whole numbers of tokens, as equal as possible, for chunks whose tokens are known in total only.

    spread(10, 4) is (2, 3, 2, 3).
    """
    return tuple(tokens * (k + 1) // chunks - tokens * k // chunks for k in range(chunks))
