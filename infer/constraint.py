"""What a constrained request may write next: the engine asks for a mask before every token."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Constraint(Protocol):
    """The state of one constrained text. Its methods are called by one thread at a time."""

    def mask(self) -> np.ndarray:
        """Return uint32 [ceil(vocab / 32)]: bit i % 32 of word i // 32 is set if token i may come next.

        The bits of end tokens are set where the text may end.
        """

    def accept(self, token: int) -> None:
        """Append a token; an end token ends the text."""

    @property
    def finished(self) -> bool:
        """True if nothing more may come but the end."""
