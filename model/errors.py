"""Errors in a user's input."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An error in a user's input; the message says what was wrong, with which value, where, and what would be right.

    The command line prints the message on stderr and exits with code 2; in a library call it is a `ValueError`.
    """


class UnknownNameError(InputError, KeyError):
    """A name that is not in a known set.

    The message lists the closest known names, or with guess=False all of them.
    """

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
