"""Plan of a conversion: all tensors of one model, with their shapes and positions in our leaves."""

import dataclasses
import functools
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from model.config import ModelConfig
from model.convert.entries import MAX_COUNT
from model.convert.rules import TensorRule
from model.errors import InputError
from model.layout import places
from model.transformer import init

Leaf = tuple[str, ...]
"""Path of a leaf, such as ("layers", "dense", "attention", "query", "weight")."""
Shapes = dict[Leaf, tuple[int, ...]]
Location = tuple[Leaf, tuple[int, ...]]
"""A leaf and an index into it: of the layer in its stack, then of the expert; () for all of it."""


@dataclasses.dataclass(frozen=True)
class LeafSlice:
    """The part of a tensor that is leaf[index]: outputs `start` to `stop`."""

    leaf: Leaf
    index: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """One tensor of a file: its name without prefix, its shape there, and its slices along the output axis."""

    name: str
    rule: TensorRule
    shape: tuple[int, ...]
    slices: tuple[LeafSlice, ...]

    @property
    def axis(self) -> int:
        """The output axis in the file."""
        return -2 if self.rule.transposed else -1


@functools.lru_cache(maxsize=256)
def shapes_of(config: ModelConfig) -> Shapes:
    """Return the shape of every parameter of a config, without allocating any.

    Raises InputError for sizes that no model has.
    """
    layers, experts = config.num_layers, config.experts
    counts = {"layers": max(layers, config.num_encoder_layers), "features of a head": config.head_dim}
    counts["experts in its layers"] = layers * experts.count if experts is not None else 0
    for name, count in counts.items():
        if count > MAX_COUNT:
            raise InputError(f"its sizes are not those of a model: {count} {name}, where at most {MAX_COUNT} are read")
    try:
        tree: Any = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    except (ArithmeticError, ValueError) as error:
        raise InputError(f"its sizes are not those of a model: {error}") from None
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def plan_tensors(
    rules: Iterable[TensorRule], config: ModelConfig, shapes: Shapes, names: Collection[str] | None = None
) -> list[TensorPlan]:
    """Return the tensors of a model. names: those of the file to read; None to write.

    The first rule that applies to a leaf fills it; later rules for the same leaf are skipped. Raises InputError if a
    leaf has no rule.
    """
    plan: list[TensorPlan] = []
    filled: set[Location] = set()
    for rule in rules:
        if not rule.when(config):
            continue
        for numbers in _numbers(rule, config):
            name = rule.tensor.format(**numbers)
            if rule.fallback is not None and names is not None and name not in names:
                name = rule.fallback.format(**numbers)
            if rule.optional and (names is None or name not in names):
                continue
            locations = [_locate(leaf, numbers, config) for leaf in rule.leaves]
            if not all(leaf in shapes for leaf, _ in locations):
                continue
            if any(_is_filled(location, filled) for location in locations):
                continue
            filled.update(locations)
            plan.append(_plan_tensor(name, rule, locations, shapes))
    _check_complete(filled, shapes)
    return plan


def _numbers(rule: TensorRule, config: ModelConfig) -> list[dict[str, int]]:
    """Return the values of {i} and {e}: with 2 layers of 2 experts, (i, e) = (0, 0), (0, 1), (1, 0), (1, 1)."""
    numbers: list[dict[str, int]] = [{}]
    if "{i}" in rule.leaves[0]:
        layers = config.num_encoder_layers if rule.leaves[0].startswith("encoder/") else config.num_layers
        numbers = [{"i": index} for index in range(layers)]
    if "{e}" in rule.tensor:
        experts = range(config.experts.count if config.experts is not None else 0)
        numbers = [{**layer, "e": index} for layer in numbers for index in experts]
    return numbers


def _locate(leaf: str, numbers: dict[str, int], config: ModelConfig) -> Location:
    """Return the location of a leaf, where {i} becomes a kind of layer in the path and an index into its stack.

    If layers 0 and 1 are dense and layer 2 has experts, layers/{i}/attention_norm/scale with i = 1 is element 1 of the
    leaf ("layers", "dense", "attention_norm", "scale"), and i = 2 is element 0 of the other kind's leaf.
    """
    path: list[str] = []
    index: tuple[int, ...] = ()
    for word in leaf.split("/"):
        if word == "{i}":
            kind, number = places(config, encoder="encoder" in path)[numbers["i"]]
            path.append(kind)
            index = (number,)
        else:
            path.append(word)
    if "e" in numbers:
        index = (*index, numbers["e"])
    return tuple(path), index


def _is_filled(location: Location, filled: set[Location]) -> bool:
    """Return whether a location, or one that contains it, is filled: expert 3 of layer 0, by all of layer 0's."""
    leaf, index = location
    return any((leaf, index[:length]) in filled for length in range(len(index) + 1))


def _plan_tensor(name: str, rule: TensorRule, locations: list[Location], shapes: Shapes) -> TensorPlan:
    slices: list[LeafSlice] = []
    start = 0
    inner: tuple[int, ...] = ()
    for leaf, index in locations:
        inner = shapes[leaf][len(index) :]
        width = inner[-1] if inner else 1
        slices.append(LeafSlice(leaf, index, start, start + width))
        start += width
    shape: tuple[int, ...] = (*inner[:-1], start)
    if rule.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return TensorPlan(name, rule, shape, tuple(slices))


def _check_complete(filled: set[Location], shapes: Shapes) -> None:
    counts = dict.fromkeys(shapes, 0)
    for leaf, index in filled:
        counts[leaf] += int(np.prod(shapes[leaf][len(index) :]))
    for leaf, count in counts.items():
        if count != int(np.prod(shapes[leaf])):
            raise InputError(f"this model_type has no tensor for the parameter {'/'.join(leaf)}")
