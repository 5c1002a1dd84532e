"""Define the interface of constraints on the tokens of an output, such as a grammar that it must match."""

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The tokens that may come next in one output. The engine calls it in its own thread, one token at a time.

    A constraint belongs to one request. An exception that it raises ends that request with the finish reason "error".
    """

    @property
    def finished(self) -> bool:
        """True if nothing more may come: the request ends with the finish reason "stop"."""

    def mask(self) -> np.ndarray:
        """Return uint32 [ceil(vocab_size / 32)]: bit i mod 32 of word i // 32 is set if token i may come next.

        The bits of the stop ids are set where the text may end.
        """

    def accept(self, token: int) -> None:
        """Append a token, one that the last mask allows."""


def words_of(vocab_size: int) -> int:
    """Return the number of 32-bit words of a mask."""
    return -(-vocab_size // 32)


def allows(mask: np.ndarray, token: int) -> bool:
    """Return whether the token's bit is set."""
    return bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))
