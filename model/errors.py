"""The one way to tell a person that an input is wrong."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was wrong, with which value, where, and what would be right, in one sentence.

    The command line prints it on stderr and exits with code 2; a library user sees a `ValueError`.
    """


class UnknownNameError(InputError, KeyError):
    """A name that is not in a known set; the message lists the close ones, or all where a guess would mislead."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, guess: bool = True):
        known = list(known)
        if guess:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            hint = f"did you mean {' or '.join(repr(k) for k in close)}?"
        else:
            hint = f"supported are {', '.join(repr(k) for k in known)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])
