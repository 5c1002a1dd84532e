"""Define the phases of a run, each a number of tokens with data, shapes and learning rates of its own."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from model.errors import InputError, check_number, check_whole
from model.parts import Part

RateShape = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class Phase(Part):
    """Number of tokens of a run with data, shapes and learning rates of their own (`train/plan.py`).

    batch_sizes: in order, each for an equal share of the tokens; empty: the TrainConfig's. seq_len None: the
    TrainConfig's. mixture: (source, weight) pairs with relative weights; empty: the first source alone. rate: how the
    factor of the peak changes from the end of the previous phase (0 at the start of the run) to `final`; "constant":
    `final` throughout. rope_base: the model's from this phase on; None: unchanged.
    """

    name: str
    tokens: int
    batch_sizes: tuple[int, ...] = ()
    seq_len: int | None = None
    mixture: tuple[tuple[str, float], ...] = ()
    rate: RateShape = "constant"
    final: float = 1.0
    rope_base: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"Phase.name={self.name!r} must be a word")
        sizes = self.batch_sizes
        if not isinstance(sizes, (list, tuple)) or not all(type(size) is int and size >= 1 for size in sizes):
            raise InputError(f"phase {self.name!r}: batch_sizes={sizes!r} must be a list of whole numbers, at least 1")
        object.__setattr__(self, "batch_sizes", tuple(sizes))
        object.__setattr__(self, "mixture", self._weights())
        check_whole(f"phase {self.name!r}: tokens", self.tokens, max(1, len(sizes)))
        if self.seq_len is not None:
            check_whole(f"phase {self.name!r}: seq_len", self.seq_len, 1)
        if self.rope_base is not None:
            check_number(f"phase {self.name!r}: rope_base", self.rope_base, above=0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with lists for tuples."""
        mixture = [list(pair) for pair in self.mixture]
        return {**super().to_dict(), "batch_sizes": list(self.batch_sizes), "mixture": mixture}

    def _weights(self) -> tuple[tuple[str, float], ...]:
        given: Any = self.mixture.items() if isinstance(self.mixture, dict) else self.mixture
        try:
            pairs = tuple((str(name), float(weight)) for name, weight in given)
        except (TypeError, ValueError):
            raise InputError(
                f"phase {self.name!r}: mixture={self.mixture!r} must be pairs of a source's name and its weight"
            ) from None
        for name, weight in pairs:
            check_number(f"phase {self.name!r}: weight of {name!r}", weight, above=0)
        if len({name for name, _ in pairs}) < len(pairs):
            raise InputError(f"phase {self.name!r}: a source occurs twice in the mixture {self.mixture!r}")
        return pairs


def standard_phases(
    total_tokens: int,
    batch_size: int,
    seq_len: int,
    *,
    mixture: Sequence[tuple[str, float]] = (),
    annealing_mixture: Sequence[tuple[str, float]] = (),
    long_seq_len: int | None = None,
    long_rope_base: float | None = None,
    warmup: float = 0.01,
    annealing: float = 0.15,
    long_context: float = 0.05,
    final: float = 0.1,
) -> tuple[Phase, ...]:
    """Return the usual phases of a pre-training run of `total_tokens`.

    These are a linear warm-up; the bulk at the peak, one third each with batches of a quarter, a half and all of
    `batch_size`; annealing, linear to `final` of the peak, on `annealing_mixture`; and, with `long_seq_len`, a last
    phase of longer rows at the annealed rate, with `long_rope_base` and as many tokens per step. warmup, annealing and
    long_context: shares of the tokens. An empty mixture is the first source; an empty annealing_mixture is `mixture`.
    """
    if long_seq_len is None:
        long_context = 0.0
    elif long_seq_len > batch_size * seq_len:
        raise InputError(f"one row of long_seq_len={long_seq_len} exceeds the {batch_size * seq_len} tokens of a batch")
    bulk = 1 - warmup - annealing - long_context
    if min(warmup, annealing) <= 0 or bulk <= 0:
        raise InputError(
            f"warmup={warmup} and annealing={annealing} must be positive and, with long_context={long_context}, leave "
            "a share of the tokens for the bulk"
        )
    growth = tuple(dict.fromkeys(max(1, batch_size // divisor) for divisor in (4, 2, 1)))  # of 2 rows: 1, 2
    before, after = tuple(mixture), tuple(annealing_mixture) or tuple(mixture)

    def tokens(share: float) -> int:
        return math.ceil(total_tokens * share)

    shape: dict[str, Any] = {"seq_len": seq_len}
    phases = [
        Phase("warm-up", tokens(warmup), growth[:1], mixture=before, rate="linear", **shape),
        Phase("bulk", tokens(bulk), growth, mixture=before, **shape),
        Phase("annealing", tokens(annealing), (batch_size,), mixture=after, rate="linear", final=final, **shape),
    ]
    if long_seq_len is not None:
        rows = (batch_size * seq_len // long_seq_len,)
        phases.append(
            Phase(
                "long context", tokens(long_context), rows, long_seq_len, after, final=final, rope_base=long_rope_base
            )
        )
    return tuple(phases)
