"""From rows to steps: every tensor of one model, with its shape and where its parts stand in our leaves."""

import dataclasses
import functools
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from model.config import ModelConfig
from model.convert.fields import MOST
from model.convert.rows import Row
from model.errors import InputError
from model.layout import places
from model.transformer import init

Leaf = tuple[str, ...]
Shapes = dict[Leaf, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Outputs `start` to `stop` of a tensor are leaf[index]."""

    leaf: Leaf
    index: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One tensor: its row's name without prefix, its shape in the file, and its parts along the output axis."""

    name: str
    row: Row
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def axis(self) -> int:
        """The output axis in the file."""
        return -2 if self.row.transposed else -1


@functools.lru_cache(maxsize=256)
def shapes_of(config: ModelConfig) -> Shapes:
    """The shape of every leaf of the configuration's parameters; no array is made.

    Raises InputError on sizes that no model has.
    """
    layers, experts = config.num_layers, config.experts
    counts = {"layers": max(layers, config.num_encoder_layers), "features of a head": config.head_dim}
    counts["experts in its layers"] = layers * experts.count if experts is not None else 0
    for name, count in counts.items():
        if count > MOST:
            raise InputError(f"its sizes make no model: it would have {count} {name}, and isoflop converts {MOST}")
    try:
        tree: Any = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    except (ArithmeticError, ValueError) as error:
        raise InputError(f"its sizes make no model: {error}") from None
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def steps(rows: Iterable[Row], config: ModelConfig, shapes: Shapes, names: Collection[str] | None = None) -> list[Step]:
    """The tensors of a model of that configuration; `names` are those of a file that is read, None when writing.

    Raises InputError on a leaf that no row gives a name.
    """
    found: list[Step] = []
    filled: set[tuple[Leaf, tuple[int, ...]]] = set()
    for row in rows:
        if not row.when(config):
            continue
        for numbers in _numbers(row, config):
            name = row.theirs.format(**numbers)
            if row.fallback is not None and names is not None and name not in names:
                name = row.fallback.format(**numbers)
            if row.optional and (names is None or name not in names):
                continue
            targets = [_target(leaf, numbers, config) for leaf in row.ours]
            if not all(leaf in shapes for leaf, _ in targets):
                continue
            if any((leaf, index[:n]) in filled for leaf, index in targets for n in range(len(index) + 1)):
                continue
            filled.update(targets)
            found.append(_step(name, row, targets, shapes))
    _check_filled(filled, shapes)
    return found


def _numbers(row: Row, config: ModelConfig) -> list[dict[str, int]]:
    """The values of {i} and {e} that a row stands for."""
    numbers: list[dict[str, int]] = [{}]
    if "{i}" in row.ours[0]:
        layers = config.num_encoder_layers if row.ours[0].startswith("encoder/") else config.num_layers
        numbers = [{"i": index} for index in range(layers)]
    if "{e}" in row.theirs:
        experts = range(config.experts.count if config.experts is not None else 0)
        numbers = [{**given, "e": index} for given in numbers for index in experts]
    return numbers


def _target(leaf: str, numbers: dict[str, int], config: ModelConfig) -> tuple[Leaf, tuple[int, ...]]:
    """The leaf's path and the index in it, with the layer's kind in place of {i}."""
    path: list[str] = []
    index: tuple[int, ...] = ()
    for word in leaf.split("/"):
        if word == "{i}":
            kind, number = places(config, encoder="encoder" in path)[numbers["i"]]
            path.append(kind)
            index = (number,)
        else:
            path.append(word)
    return tuple(path), index + ((numbers["e"],) if "e" in numbers else ())


def _step(name: str, row: Row, targets: list[tuple[Leaf, tuple[int, ...]]], shapes: Shapes) -> Step:
    parts: list[Part] = []
    start = 0
    inner: tuple[int, ...] = ()
    for leaf, index in targets:
        inner = shapes[leaf][len(index) :]
        width = inner[-1] if inner else 1
        parts.append(Part(leaf, index, start, start + width))
        start += width
    shape: tuple[int, ...] = (*inner[:-1], start)
    if row.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return Step(name, row, shape, tuple(parts))


def _check_filled(filled: set[tuple[Leaf, tuple[int, ...]]], shapes: Shapes) -> None:
    counts = dict.fromkeys(shapes, 0)
    for leaf, index in filled:
        counts[leaf] += int(np.prod(shapes[leaf][len(index) :]))
    for leaf, count in counts.items():
        if count != int(np.prod(shapes[leaf])):
            raise InputError(f"this model_type has no tensor for the parameter {'/'.join(leaf)}")
