"""Define the values that one field of a sweep may take: a list or an interval."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from experiments.inputs import read_value
from model.errors import InputError, UnknownNameError


@dataclasses.dataclass(frozen=True)
class Values:
    """A list of distinct values."""

    values: tuple[Any, ...]

    @classmethod
    def of(cls, given: Any, name: str) -> "Distribution":
        """Return an axis as `grid` takes it: a sequence of values, one value, or a distribution. Raises InputError."""
        if isinstance(given, (Values, Interval)):
            return cls.of(given.values, name) if isinstance(given, Values) else given
        if isinstance(given, (set, frozenset)):
            raise InputError(f"the axis {name} is a set, which has no order; give a list")
        if isinstance(given, (str, dict)) or not hasattr(given, "__iter__"):
            given = (given,)
        values = tuple(value.item() if hasattr(value, "item") else value for value in given)
        if not values:
            raise InputError(f"the axis {name} has no values")
        for number, value in enumerate(values):
            if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values[:number]):
                raise InputError(f"the axis {name} has the value {value!r} twice")
        return cls(values)

    @property
    def fixed(self) -> bool:
        """True if there is only one value."""
        return len(self.values) == 1

    def enumerate(self, name: str) -> tuple[Any, ...]:
        """Return all values of the axis `name`."""
        return self.values

    def at(self, unit: float) -> Any:
        """Return the value at quantile `unit` in [0, 1); all values are equally likely."""
        return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]


@dataclasses.dataclass(frozen=True)
class Interval:
    """All numbers from low to high, both included, evenly or by their logarithm; integer: whole ones only."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (self.low, self.high))
        if not numbers or not self.low < self.high:
            raise InputError(f"an interval goes from a number to a larger one, not from {self.low!r} to {self.high!r}")
        if self.log and not self.low > 0:
            raise InputError(f"an interval of logarithms begins above 0, not at {self.low!r}")
        if self.integer and not all(isinstance(x, int) for x in (self.low, self.high)):
            raise InputError(f"an interval of whole numbers has whole ends, not {self.low!r} and {self.high!r}")

    def enumerate(self, name: str) -> tuple[Any, ...]:
        """Raise InputError: an interval has no list of values."""
        kind = "logspace" if self.log else "linspace"
        raise InputError(
            f"{name} is an interval, which has no list of values; give {kind} with a count, draw random(space, count), "
            "or search it with a sampler"
        )

    def at(self, unit: float) -> float:
        """Return the number at quantile `unit` in [0, 1)."""
        high = self.high + 1 if self.integer else self.high
        value = self.low * (high / self.low) ** unit if self.log else self.low + (high - self.low) * unit
        return min(math.floor(value), int(self.high)) if self.integer else min(max(value, self.low), self.high)


Distribution = Values | Interval


def choice(*values: Any) -> Distribution:
    """Return a distribution over the given values."""
    return Values.of(values, "choice")


def uniform(low: float, high: float) -> Interval:
    """Return numbers from low to high, evenly."""
    return Interval(low, high)


def loguniform(low: float, high: float) -> Interval:
    """Return numbers from low to high, their logarithm evenly."""
    return Interval(low, high, log=True)


def integers(low: int, high: int, log: bool = False) -> Interval:
    """Return whole numbers from low to high, both included."""
    return Interval(low, high, log=log, integer=True)


def linspace(low: float, high: float, count: int) -> Values:
    """Return `count` numbers from low to high with equal steps; integers if all are whole."""
    return _spaced("linspace", low, high, count, lambda share: low + (high - low) * share)


def logspace(low: float, high: float, count: int) -> Values:
    """Return `count` numbers from low to high with equal ratios; integers if all are whole."""
    if not low > 0:
        raise InputError(f"logspace begins above 0, not at {low!r}")
    return _spaced("logspace", low, high, count, lambda share: low * (high / low) ** share)


def _spaced(kind: str, low: float, high: float, count: int, at: Callable[[float], float]) -> Values:
    if not low < high or not math.isfinite(high):
        raise InputError(f"{kind} goes from a number to a larger one, not from {low!r} to {high!r}")
    if not isinstance(count, int) or count < 2:
        raise InputError(f"{kind} needs a count of at least 2, not {count!r}")
    # Twelve digits: the middle of 1e-4 to 1e-2 is 0.001, not its neighbour.
    values = [low, *(float(f"{at(i / (count - 1)):.12g}") for i in range(1, count - 1)), high]
    whole = isinstance(low, int) and isinstance(high, int) and all(value == int(value) for value in values)
    return Values(tuple(map(int, values)) if whole else tuple(map(float, values)))


_KINDS: dict[str, tuple[Callable[..., Distribution], str]] = {
    "logspace": (logspace, "LOW:HIGH:COUNT"),
    "linspace": (linspace, "LOW:HIGH:COUNT"),
    "loguniform": (loguniform, "LOW:HIGH"),
    "uniform": (uniform, "LOW:HIGH"),
    "integers": (integers, "LOW:HIGH"),
}


def parse_axis(text: str) -> tuple[str, Distribution]:
    """Read `NAME=1,2,3`, `NAME=cosine,wsd`, `NAME=logspace:1e-4:1e-2:9` and the like. Raises InputError."""
    name, equals, values = text.partition("=")
    if not equals or not name:
        raise InputError(f"--set {text!r} is not of the form NAME=v1,v2 or NAME=logspace:LOW:HIGH:COUNT")
    kind, colon, rest = values.partition(":")
    if not colon or kind[:1] in ("[", "{", '"'):
        return name, Values.of(_values(name, values), name)
    if kind not in _KINDS:
        raise UnknownNameError(f"kind of values in --set {text!r}:", kind, _KINDS)
    make, form = _KINDS[kind]
    numbers = [_number(number) for number in rest.split(":")]
    if None in numbers or len(numbers) != form.count(":") + 1:
        raise InputError(f"--set {text!r} is not of the form NAME={kind}:{form}")
    try:
        return name, make(*numbers)
    except InputError as error:
        raise InputError(f"--set {text!r}: {error}") from None


def parse_axes(texts: Sequence[str]) -> dict[str, Distribution]:
    """Return all axes by name. Raises InputError if a name occurs twice."""
    axes: dict[str, Distribution] = {}
    for name, values in map(parse_axis, texts):
        if name in axes:
            raise InputError(f"--set gives {name} twice; give all its values in one axis")
        axes[name] = values
    return axes


def _values(name: str, text: str) -> list[Any]:
    if not text:
        return []
    whole = read_value(f"[{text}]")  # lists and objects contain commas
    values = whole if isinstance(whole, list) else [read_value(part) for part in text.split(",")]
    if "" in values:
        raise InputError(f"the axis {name} has an empty value: {text!r}")
    return values


def _number(text: str) -> float | None:
    value = read_value(text)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
