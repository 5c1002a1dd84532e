"""Build the space of a sweep with a small algebra: which fields vary, and which vary together.

A space is read in two ways. `points()` enumerates it. `draw(suggest)` traverses it once and calls `suggest` for each
value, so that a search may choose them; of a branch only the axes of the chosen side are suggested. A point is a dict
of flat fields (`experiments/sweep/space/overlay.py`). A name that begins with "_" is not a field: `derive` and the
report may read it. A file of a sweep ends, for example, in

    space = product(
        grid(learning_rate=logspace(1e-4, 1e-2, 9), tokens_per_parameter=20),
        derive(grid(d_model=[64, 128, 256]), lambda point: {"num_heads": point["d_model"] // 32}),
    )
"""

import builtins
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.sweep.space.kinds import (
    Chain,
    Derived,
    Drawn,
    Grid,
    Point,
    Product,
    Replicate,
    Space,
    Suggest,
    merged,
)
from experiments.sweep.space.values import (
    Distribution,
    Interval,
    Values,
    choice,
    integers,
    linspace,
    logspace,
    loguniform,
    uniform,
)
from model.errors import InputError, check_at_least_one

__all__ = [
    "Distribution",
    "Interval",
    "Point",
    "Replicate",
    "Space",
    "Suggest",
    "Values",
    "branch",
    "chain",
    "choice",
    "derive",
    "grid",
    "integers",
    "linspace",
    "loguniform",
    "logspace",
    "product",
    "quasirandom",
    "random",
    "replicate",
    "uniform",
    "zip",
]


def grid(**axes: Any) -> Space:
    """Return every combination of the axes' values. An axis: a sequence of values, one value, or a distribution.

    The last axis varies fastest. Without axes: one point, the base itself. Names with a dot: `grid(**{"a.b": [1, 2]})`.
    """
    return Grid({name: Values.of(values, name) for name, values in axes.items()})


def product(*spaces: Space) -> Space:
    """Return every point of each space with every point of the others; the last varies fastest."""
    _check_any("product", spaces)
    _disjoint("product", spaces)
    return Product(spaces)


def chain(*spaces: Space) -> Space:
    """Return the points of one space after those of another."""
    _check_any("chain", spaces)
    return Chain(spaces)


def zip(*spaces: Space, **axes: Any) -> Space:
    """Return the first points of all spaces (or values of all axes) as one point, then the second ones, and so on."""
    sides = (*spaces, *(grid(**{name: values}) for name, values in axes.items()))
    _check_any("zip", sides)
    _disjoint("zip", sides)
    rows = [side.points() for side in sides]
    if len({len(side) for side in rows}) > 1:
        lengths = ", ".join(f"{'/'.join(s.names)}: {len(p)}" for s, p in builtins.zip(sides, rows, strict=True))
        raise InputError(f"a zip needs sides of equal length, not {lengths}")

    def fixed(point: Point) -> Grid:
        return Grid({name: Values((value,)) for name, value in point.items()})

    return Chain([fixed(merged(row)) for row in builtins.zip(*rows, strict=True)])


def branch(name: str, sides: Mapping[Any, Space]) -> Space:
    """Return a choice: the field `name` takes a key of `sides`, together with the points of its space."""
    if not sides:
        raise InputError(f"the branch {name} has no values")
    taken = [product(Grid({name: Values((value,))}), side) for value, side in sides.items()]
    return Chain(taken, Values(tuple(sides)), name)


def replicate(space: Space, seeds: int | Sequence[int]) -> Space:
    """Return every point with every seed, seeds varying fastest. seeds: how many, from 0 on, or which."""
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise InputError("replicate needs at least one seed")
    _disjoint("replicate", (space, grid(seed=chosen)))
    return Replicate(space, chosen)


def derive(space: Space, function: Callable[[Point], Point]) -> Space:
    """Return every point with the fields that `function(point)` gives, which replace fields of the same name."""
    return Derived(space, function)


def random(space: Space, count: int, seed: int = 0) -> Space:
    """Return `count` distinct random points, or all if there are fewer; a larger count extends the list.

    The same space and seed give the same points; the order of the axes matters.
    """
    check_at_least_one(count=count)
    return Drawn(space, count, seed, sobol=False)


def quasirandom(space: Space, count: int, seed: int = 0) -> Space:
    """`count` points of a scrambled Sobol sequence (Owen 1998), which fills the space more evenly than `random`."""
    check_at_least_one(count=count)
    return Drawn(space, count, seed, sobol=True)


def load_space(source: str, path: Path) -> Space:
    """Return the `space` that a file's text defines; only this file is copied into the sweep.

    Raises InputError, with file and line, if the file fails or defines no space.
    """
    names: dict[str, object] = {"__name__": "space", "__file__": str(path)}
    try:
        exec(compile(source, str(path), "exec"), names)
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path}, line {lines[-1] if lines else '?'}: {kind}{error}") from error
    space = names.get("space")
    if not isinstance(space, Space):
        found = "has no `space`" if space is None else f"has a {type(space).__name__} as its `space`"
        raise InputError(f"{path} {found}; end it with, for example, space = grid(learning_rate=[1e-3, 3e-3])")
    return space


def _check_any(what: str, spaces: Sequence[Space]) -> None:
    if not spaces:
        raise InputError(f"a {what} of no spaces has no points; give at least one space")


def _disjoint(what: str, spaces: Sequence[Space]) -> None:
    seen: set[str] = set()
    for space in spaces:
        for name in space.names:
            if name in seen:
                raise InputError(f"{name} is on two sides of a {what}; a field can vary in one place only")
        seen.update(space.names)
