"""Errors in a user's input, and checks of numbers that raise them with the name, the value and its range."""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


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


_COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def check_whole(
    name: str, value: Any, least: int = 0, most: float = math.inf, *, plain: bool = False, hint: str = ""
) -> None:
    """Raise InputError unless a value is a whole number from `least` to `most`.

    True and False are no numbers. plain: NumPy's numbers are none either, as JSON cannot hold them. hint: the end of
    the message, such as "4 is usual".
    """
    is_whole = isinstance(value, numbers.Integral) and _is_number(value, plain)
    if not (is_whole and least <= value <= most):
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(_message(name, value, f"a whole number {bounds}", hint))


def check_at_least_one(**counts: Any) -> None:
    """Raise InputError, naming it, for the first count that is not a whole number of at least 1."""
    for name, count in counts.items():
        check_whole(name, count, 1)


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    plain: bool = False,
    hint: str = "",
) -> None:
    """Raise InputError unless a value is a finite number within the bounds that are given.

    A value may equal `least` and `most`, but not `above` and `below`: above=0, most=1 is the range (0, 1], in the
    message "a number above 0 and at most 1". plain, hint: as in `check_whole`.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    given = {words: bound for words, bound in bounds.items() if bound is not None}
    is_finite = _is_number(value, plain) and -math.inf < value < math.inf
    if not (is_finite and all(_COMPARISONS[words](value, bound) for words, bound in given.items())):
        range_ = " and ".join(f"{words} {bound:g}" for words, bound in given.items())
        wanted = "a finite number" if not given else f"a number {'of ' if least is not None else ''}{range_}"
        raise InputError(_message(name, value, wanted, hint))


def check_bool(name: str, value: Any) -> None:
    """Raise InputError unless a value is True or False."""
    if not isinstance(value, bool):
        raise InputError(_message(name, value, "true or false"))


def _is_number(value: Any, plain: bool) -> bool:
    return isinstance(value, int | float if plain else numbers.Real) and not isinstance(value, bool)


def _message(name: str, value: Any, wanted: str, hint: str = "") -> str:
    return f"{name}={value!r} must be {wanted}" + (f"; {hint}" if hint else "")
