"""Sharding: logical axis names → mesh axes, by one table of rules and one of the axes of every parameter.

XLA inserts the communication (GSPMD, Xu et al. 2021). The mesh axes are

- "data": splits rows and replicates the state;
- "fsdp": splits rows and the state, whose weights are gathered where they are used (ZeRO stage 3, Rajbhandari et al.
  2020);
- "tensor": splits heads, hidden features and the vocabulary (Megatron-LM, Shoeybi et al. 2019);
- "expert": splits rows and experts (GShard, Lepikhin et al. 2021);
- "sequence": splits the tokens of a row: queries stay on the device of their token, keys and values are gathered;
- "population": splits the lanes of a program that trains many models, so that each device trains its own.

A split of features may divide a head between devices, which costs communication but changes no result.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from model.errors import InputError, UnknownNameError, check_whole
from model.parameterization import names_of

# From the outermost to the innermost axis: the one with the most communication is on neighbouring devices.
AXES = ("population", "data", "fsdp", "expert", "sequence", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # of activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("sequence",),
    "rows": ("data", "fsdp", "sequence"),  # tokens dispatched to an expert
    "blocks": ("expert", "data", "fsdp", "sequence"),  # blocks of such rows, sorted by part of the experts
    # of weights and activations
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    # of weights
    "embed": ("fsdp",),
    # of stacked trees: not split by fsdp either
    "layers": (),
    "lanes": ("population",),
}
_SMALL = 2**10  # elements; smaller leaves without axes in the tables are not split

Axes = tuple[str | None, ...]
# The logical axes of a parameter of the public tree, without those of layers and lanes, by the last two names of its
# path or else by the last one (_BY_NAME).
_BY_PAIR: dict[tuple[str, str], Axes] = {
    ("embedding", "tokens"): ("vocab", "embed"),
    ("embedding", "positions"): (None, "embed"),
    ("embedding", "types"): (None, "embed"),
    ("relative_bias", "table"): (None, "heads"),
    ("query", "weight"): ("embed", "heads"),
    ("key", "weight"): ("embed", "kv_heads"),
    ("value", "weight"): ("embed", "kv_heads"),
    ("output", "weight"): ("heads", "embed"),
    ("query", "bias"): ("heads",),
    ("key", "bias"): ("kv_heads",),
    ("value", "bias"): ("kv_heads",),
    ("query_down", "weight"): ("embed", None),
    ("query_up", "weight"): (None, "heads"),
    ("key_value_down", "weight"): ("embed", None),
    ("key_value_up", "weight"): (None, "heads"),
    ("query_down", "bias"): (None,),
    ("key_value_down", "bias"): (None,),
    ("query_norm", "scale"): (None,),
    ("key_norm", "scale"): (None,),
    ("key_value_norm", "scale"): (None,),
    ("up", "weight"): ("embed", "hidden"),
    ("gate", "weight"): ("embed", "hidden"),
    ("down", "weight"): ("hidden", "embed"),
    ("up", "bias"): ("hidden",),
    ("gate", "bias"): ("hidden",),
    ("router", "weight"): ("embed", None),
    ("shared_gate", "weight"): ("embed", None),
    ("experts", "up"): ("experts", "embed", "hidden"),
    ("experts", "gate"): ("experts", "embed", "hidden"),
    ("experts", "down"): ("experts", "hidden", "embed"),
    ("transform", "weight"): ("embed", None),
    ("pooler", "weight"): ("embed", None),
    ("head", "weight"): ("embed", "vocab"),
    ("head", "bias"): ("vocab",),
}
# The axes of the matrices in a `model.weights.LowRank`, from the axes of the plain matrix.
_OF_LOW_RANK: dict[str, Callable[[Axes], Axes]] = {
    "base": lambda axes: axes,
    "a": lambda axes: (*axes[:-1], None),
    "b": lambda axes: (*axes[:-2], None, axes[-1]),
}
_BY_NAME: dict[str, Axes] = {
    "scale": ("embed",),
    "bias": ("embed",),
    "sinks": ("heads",),
    "selection_bias": (None,),
}


def make_mesh(axes: Mapping[str, int] | None = None, platform: str | None = None) -> Mesh:
    """Return a mesh with all AXES over the first devices of all processes.

    axes: sizes such as {"data": 2, "fsdp": 4}; the others have size 1. None: all devices on "data". platform: None:
    JAX's default. Raises InputError for an unknown axis, for more devices than there are, and for a platform without
    devices.
    """
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        raise InputError(f"platform={platform!r}: there is no such device here; leave it out") from None
    sizes = _sizes(axes or {"data": len(devices)})
    size = math.prod(sizes)
    if size > len(devices):
        raise InputError(f"a mesh of {size} devices was requested; there are {len(devices)}")
    if size < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"a mesh of {size} devices leaves some of {jax.process_count()} processes idle; use all {len(devices)}"
        )
    return Mesh(np.array(devices[:size]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_axes(rows: int) -> dict[str, int]:
    """Return the axes of a mesh with all devices on "data"; on a CPU, with the most devices that divide `rows`."""
    count = len(jax.devices())
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        count = max(size for size in range(1, count + 1) if rows % size == 0)
    return {"data": count}


def abstract_mesh(axes: Mapping[str, int]) -> AbstractMesh:
    """Return a mesh as `make_mesh` does, without devices: for shapes and accounting of other machines."""
    return AbstractMesh(_sizes(axes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(axes: Mapping[str, int]) -> tuple[int, ...]:
    for name, size in axes.items():
        if name not in AXES:
            raise UnknownNameError("mesh axis", name, AXES)
        check_whole(f"mesh axis {name}", size, 1)
    return tuple(axes.get(name, 1) for name in AXES)


def parse_mesh(text: str) -> dict[str, int]:
    """Parse text such as `data=2,fsdp=4`. Raises InputError if it is malformed."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals:
            raise InputError(f"--mesh {text!r} is not of the form data=2,fsdp=4")
        if name not in AXES:
            raise UnknownNameError("mesh axis", name, AXES)
        if name in axes:
            raise InputError(f"--mesh {text!r} names {name} twice")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise InputError(f"--mesh {text!r}: {name}={size} must be a whole number of at least 1")
        axes[name] = int(size)
    return axes


def under_mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """Return a context that traces programs for the mesh of a tree's arrays; a null context for one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(mesh: Mesh | AbstractMesh, batch: Any, lanes: bool = False) -> Any:
    """Return a sharding for every array of a batch, [batch], [batch, seq], …; lanes: with a leading axis of lanes.

    The mesh must divide the rows: see `check_batch`. A sequence that it does not divide is not split.
    """
    names = ("lanes", "batch", "sequence") if lanes else ("batch", "sequence")

    def sharding_of(leaf: Any) -> NamedSharding:
        rules = [RULES[name] for name in names[: len(leaf.shape)]]
        if len(rules) == len(names):
            parts = math.prod(mesh.shape.get(axis, 1) for axis in RULES["sequence"])
            if leaf.shape[len(names) - 1] % parts:
                rules[-1] = ()
        return NamedSharding(mesh, _spec(rules))

    return jax.tree.map(sharding_of, batch)


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, seq_len: int) -> None:
    """Raise InputError unless the mesh divides a batch evenly."""
    for field, length, name in (("batch_size", batch_size, "batch"), ("seq_len", seq_len, "sequence")):
        parts = math.prod(mesh.shape.get(axis, 1) for axis in RULES[name])
        if length % parts:
            by = " · ".join(axis for axis in RULES[name] if mesh.shape.get(axis, 1) > 1)
            raise InputError(f"{field}={length} does not divide over {parts} devices ({by}); make it a multiple")


def parameter_axes(path: tuple[str, ...]) -> Axes:
    """Return the logical axes of the parameter at `path` in the public tree, without those of layers and lanes."""
    if _is_of_low_rank(path):
        return _OF_LOW_RANK[path[-1]](parameter_axes(path[:-1]))
    axes = _BY_PAIR.get(path[-2:]) or _BY_NAME.get(path[-1])  # type: ignore[arg-type]
    if axes is None:
        raise KeyError(f"parameter {'/'.join(path)} has no axes in model/sharding.py")
    return axes


def spec_for(
    mesh: Mesh | AbstractMesh, path: tuple[str, ...], shape: tuple[int, ...], lanes: bool = False
) -> PartitionSpec:
    """Return how the parameter at `path` of the public tree, or its counterpart in an optimizer state, is split.

    A mesh axis that does not divide its dimension is left out there; "fsdp" then goes to the largest dimension that it
    divides, so that the state is always split by it. For a leaf of another rank than the parameter, such as the
    factored moments of Adafactor, only that applies. lanes: the first axis is that of lanes, split by "population".

    On {"fsdp": 4} a query matrix [layers, 512, 512] with the axes ("layers", "embed", "heads") is split as
    (None, "fsdp", None), one of shape [layers, 510, 512] as (None, None, "fsdp").
    """
    stacking = (["lanes"] if lanes else []) + (["layers"] if _is_stacked(path) else [])
    names = (*stacking, *parameter_axes(path))
    if len(names) != len(shape):
        return _spec_of_unknown(mesh.shape, shape, stacking)
    return _spec(_with_fsdp(mesh.shape, shape, _divided(mesh.shape, names, shape), len(stacking)))


def shardings(mesh: Mesh | AbstractMesh, tree: Any, lanes: bool = False) -> Any:
    """Return a NamedSharding for every leaf (array or shape) of parameters, optimizer states or training states.

    Leaves at the path of a parameter: see `spec_for`. Other leaves are split by fsdp if they are large.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # Parameters are in dicts, parts of some in a LowRank; counters and keys are attributes of states.
        names = names_of(path)
        if path and (isinstance(path[-1], jax.tree_util.DictKey) or _is_of_low_rank(names)):
            return NamedSharding(mesh, spec_for(mesh, names, leaf.shape, lanes))
        return NamedSharding(mesh, _spec_of_unknown(mesh.shape, leaf.shape, ["lanes"] if lanes else []))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def constrain(x: Any, *names: str | None) -> Any:
    """Return x with its sharding constrained to its logical axes; without a mesh (`jax.set_mesh`), x itself.

    names: one logical axis per dimension; None: not split. A mesh axis that does not divide its dimension is left out.
    Works under vmap, scan and remat.
    """
    sizes = _traced_mesh()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(_divided(sizes, names, x.shape)))


def parts_of(name: str, length: int | None = None) -> int:
    """Return the number of parts into which `constrain` splits a logical axis.

    length: of the axis, which mesh axes that do not divide it do not split; None: one that all of them divide.
    """
    sizes = _traced_mesh()
    length = math.prod(sizes.values()) if length is None else length
    return math.prod(sizes[axis] for axis in _divided(sizes, (name,), (length,))[0])


def parts_of_lanes(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Return the number of parts into which a mesh splits lanes; None: the mesh of the trace."""
    return (_traced_mesh() if mesh is None else mesh.shape).get("population", 1)


def _traced_mesh() -> dict[str, int]:
    """Return the sizes of AXES in the mesh of the trace, without those that are not automatic (`AxisType.Auto`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in AXES if axis in mesh.auto_axes}


def _is_of_low_rank(path: tuple[str, ...]) -> bool:
    """Return whether a path ends in a matrix of a `LowRank`; its mask and scale are replicated."""
    return path[-1] in _OF_LOW_RANK and (path[-2:-1] == ("weight",) or path[-3:-2] == ("experts",))


def _is_stacked(path: tuple[str, ...]) -> bool:
    """Return whether the first axis is that of layers; it is not where `infer.prepare` made a tuple of layers."""
    return "layers" in path and not path[path.index("layers") + 1].isdigit()


def _divided(sizes: Mapping[str, int], names: Sequence[str | None], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Return the mesh axes of every dimension, without those that do not divide it.

    A batch of 6 on {"data": 2, "fsdp": 4, "expert": 3} is split by ("data", "expert"): after 2 parts of 3 rows, 4 does
    not divide 3.
    """
    axes_of_dimensions = []
    for name, length in zip(names, shape, strict=True):
        axes: list[str] = []
        for axis in () if name is None else RULES[name]:
            if sizes.get(axis, 1) > 1 and length % sizes[axis] == 0:
                axes.append(axis)
                length //= sizes[axis]
        axes_of_dimensions.append(tuple(axes))
    return axes_of_dimensions


def _with_fsdp(
    sizes: Mapping[str, int], shape: tuple[int, ...], axes: list[tuple[str, ...]], stacking: int
) -> list[tuple[str, ...]]:
    """Add "fsdp", if no dimension has it, to the dimension that is longest on a device and that it divides.

    stacking: the number of leading dimensions, of lanes and layers, that it must not split.
    """
    size = sizes.get("fsdp", 1)
    if size == 1 or any("fsdp" in of_dimension for of_dimension in axes):
        return axes
    on_device = [
        length // math.prod(sizes[axis] for axis in of_dimension)
        for length, of_dimension in zip(shape, axes, strict=True)
    ]
    divisible = [index for index in range(stacking, len(shape)) if on_device[index] % size == 0]
    if not divisible:
        return axes
    longest = max(divisible, key=lambda index: on_device[index])
    return [*axes[:longest], (*axes[longest], "fsdp"), *axes[longest + 1 :]]


def _spec_of_unknown(sizes: Mapping[str, int], shape: tuple[int, ...], stacking: list[str]) -> PartitionSpec:
    names = [*stacking, *[None] * (len(shape) - len(stacking))]
    axes = _divided(sizes, names, shape)
    if math.prod(shape) < _SMALL:
        return _spec(axes) if any(axes) else PartitionSpec()
    return _spec(_with_fsdp(sizes, shape, axes, len(stacking)))


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """Return a PartitionSpec with None for (), "data" for ("data",) and the tuple for several axes."""
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in axes))
