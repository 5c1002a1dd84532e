"""Define the kinds of spaces, each with its size, its axes, `points` and `draw`."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.sweep.space.values import Distribution, Values
from model.errors import InputError

__all__ = ["Point", "Replicate", "Space", "Suggest", "describe", "key_of", "merged"]  # the other kinds are one Space

Point = dict[str, Any]
Suggest = Callable[[str, Distribution], Any]
_MOST_POINTS = 1_000_000


class Space:
    """Points that a sweep may take. Built by the functions of `experiments/sweep/space/build.py`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that a point may have, except those that `derive` adds."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Largest number of points. Raises InputError if an interval has no count."""
        raise NotImplementedError

    def axes(self) -> dict[str, Distribution]:
        """Return all axes that `draw` may request, by the names that it passes to `suggest`."""
        raise NotImplementedError

    def draw(self, suggest: Suggest) -> Point:
        """Return one point, of values that `suggest(name, distribution)` chooses."""
        raise NotImplementedError

    def points(self) -> list[Point]:
        """Return all points, always in the same order, each once. Raises InputError if an interval has no count."""
        if self.size > _MOST_POINTS:
            raise InputError(f"the space has {self.size:,} points; draw some: random(space, count)")
        found: dict[str, Point] = {}
        for point in self._points():
            found.setdefault(key_of(point), point)
        return list(found.values())

    def _points(self) -> Iterable[Point]:
        raise NotImplementedError


class Grid(Space):
    """Axes that do not depend on one another."""

    def __init__(self, axes: dict[str, Distribution]):
        self._axes = axes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._axes)

    @property
    def size(self) -> int:
        return math.prod(len(axis.enumerate(name)) for name, axis in self._axes.items())

    def axes(self) -> dict[str, Distribution]:
        return {name: axis for name, axis in self._axes.items() if not axis.fixed}

    def draw(self, suggest: Suggest) -> Point:
        return {name: axis.at(0) if axis.fixed else suggest(name, axis) for name, axis in self._axes.items()}

    def _points(self) -> Iterable[Point]:
        values = [axis.enumerate(name) for name, axis in self._axes.items()]
        return (dict(zip(self._axes, row, strict=True)) for row in itertools.product(*values))


class Product(Space):
    """Every point of each space with every point of the others."""

    def __init__(self, spaces: Sequence[Space]):
        self._spaces = tuple(spaces)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for space in self._spaces for name in space.names)

    @property
    def size(self) -> int:
        return math.prod(space.size for space in self._spaces)

    def axes(self) -> dict[str, Distribution]:
        return {name: axis for space in self._spaces for name, axis in space.axes().items()}

    def draw(self, suggest: Suggest) -> Point:
        return merged([space.draw(suggest) for space in self._spaces])

    def _points(self) -> Iterable[Point]:
        return map(merged, itertools.product(*(space.points() for space in self._spaces)))


class Chain(Space):
    """One of several spaces. labels: what a search chooses from; name: of that choice."""

    def __init__(self, spaces: Sequence[Space], labels: Values | None = None, name: str | None = None):
        self._spaces = tuple(spaces)
        self._labels = labels or Values(tuple(range(len(self._spaces))))
        self._name = name or f"which {'|'.join(self.names)}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for space in self._spaces for name in space.names))

    @property
    def size(self) -> int:
        return sum(space.size for space in self._spaces)

    def _own(self, index: int, name: str) -> str:
        """Return an axis under a name unique to its space: several spaces may have different values for it."""
        shared = sum(name in space.axes() for space in self._spaces) > 1
        return f"{name}@{self._labels.values[index]}" if shared else name

    def axes(self) -> dict[str, Distribution]:
        found: dict[str, Distribution] = {} if self._labels.fixed else {self._name: self._labels}
        for index, space in enumerate(self._spaces):
            found |= {self._own(index, name): axis for name, axis in space.axes().items()}
        return found

    def draw(self, suggest: Suggest) -> Point:
        index = 0 if self._labels.fixed else self._labels.values.index(suggest(self._name, self._labels))
        return self._spaces[index].draw(lambda name, axis: suggest(self._own(index, name), axis))

    def _points(self) -> Iterable[Point]:
        return itertools.chain.from_iterable(space.points() for space in self._spaces)


class _Within(Space):
    """A space with the axes of another."""

    def __init__(self, space: Space):
        self.space = space

    @property
    def names(self) -> tuple[str, ...]:
        return self.space.names

    @property
    def size(self) -> int:
        return self.space.size

    def axes(self) -> dict[str, Distribution]:
        return self.space.axes()


class Replicate(_Within):
    """A space and its seeds; `experiments/sweep/definition.py` uses the outermost seeds for the sweep."""

    def __init__(self, space: Space, seeds: tuple[int, ...]):
        super().__init__(space)
        self.seeds = seeds
        self._all = Product((space, Grid({"seed": Values(seeds)})))

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the space, and "seed"."""
        return self._all.names

    @property
    def size(self) -> int:
        """Points times seeds."""
        return self._all.size

    def draw(self, suggest: Suggest) -> Point:
        """Raise InputError: seeds are not searched."""
        raise InputError("a search draws no seeds: put replicate outermost, or give --seeds")

    def _points(self) -> Iterable[Point]:
        return self._all._points()


class Derived(_Within):
    """The points of a space with further fields, each computed from the point."""

    def __init__(self, space: Space, function: Callable[[Point], Point]):
        super().__init__(space)
        self._function = function

    def draw(self, suggest: Suggest) -> Point:
        return self._with(self.space.draw(suggest))

    def _points(self) -> Iterable[Point]:
        return map(self._with, self.space.points())

    def _with(self, point: Point) -> Point:
        try:
            return {**point, **self._function(dict(point))}
        except InputError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(f"the fields derived from {describe(point)} cannot be computed ({problem})") from error


class Drawn(_Within):
    """Some points of a space: independent ones, or those of a Sobol sequence."""

    _TRIES = 100  # draws per requested point, after which a space counts as exhausted

    def __init__(self, space: Space, count: int, seed: int, sobol: bool):
        super().__init__(space)
        self._count, self._seed, self._sobol = count, seed, sobol

    @property
    def size(self) -> int:
        return self._count

    def draw(self, suggest: Suggest) -> Point:
        return self.space.draw(suggest)

    def _points(self) -> Iterable[Point]:
        found: dict[str, Point] = {}
        for units in self._sobol_rows() if self._sobol else self._independent_rows():
            point = self._point_at(units)
            found.setdefault(key_of(point), point)
            if len(found) == self._count:
                break
        return found.values()

    def _point_at(self, units: Mapping[str, float]) -> Point:
        return self.space.draw(lambda name, axis: axis.at(units[name]))

    def _independent_rows(self) -> Iterable[dict[str, float]]:
        import numpy as np

        names, generator = list(self.space.axes()), np.random.default_rng(self._seed)
        for _ in range(self._TRIES * self._count):
            yield dict(zip(names, generator.random(len(names)).tolist(), strict=True))

    def _sobol_rows(self) -> Iterable[dict[str, float]]:
        from scipy.stats import qmc

        names = list(self.space.axes())
        if not names:
            yield {}
            return
        # Only a power of two makes the sequence balanced; its beginning is the same for any length.
        rows = qmc.Sobol(len(names), rng=self._seed).random_base2(math.ceil(math.log2(self._count)) + 1)
        for row in rows:
            yield dict(zip(names, row.tolist(), strict=True))


def describe(point: Mapping[str, Any]) -> str:
    """Return a point for people: `d_model=64, schedule=wsd`; the base itself if it is empty."""

    def show(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name}={show(value)}" for name, value in point.items()) or "the base"


def key_of(point: Mapping[str, Any]) -> str:
    """Return a hashable key; equal points have equal keys."""
    return json.dumps(point, sort_keys=True, default=str)


def merged(points: Iterable[Point]) -> Point:
    """Return one point of several. Raises InputError if two of them have the same field."""
    one: Point = {}
    for point in points:
        for name, value in point.items():
            if name in one:  # a derived field: those of axes are refused when the space is made
                raise InputError(f"{name} is on two sides of a product; a field can vary in one place only")
            one[name] = value
    return one
