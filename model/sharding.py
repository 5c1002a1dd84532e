"""Logical axis names → mesh axes: one table of rules, one of the axes of every parameter, and nothing else decides.

XLA inserts the communication (GSPMD, Xu et al. 2021). "data" splits rows and repeats the state. "fsdp" splits rows and
the state too, whose weights are gathered where they are used (ZeRO stage 3, Rajbhandari et al. 2020). "tensor" splits
heads, hidden features and the vocabulary (Megatron-LM, Shoeybi et al. 2019), "expert" rows and experts (GShard,
Lepikhin et al. 2021), "sequence" the tokens of a row: queries stay where their tokens are, keys and values are
gathered. "population" splits the lanes of a program that trains many models; each device then runs its own. A split of
features may cut through a head; that costs communication, never correctness.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from model.checks import check_whole
from model.errors import InputError, UnknownNameError
from model.parameterization import names_of

# From the outermost to the innermost: what talks most has the nearest neighbours.
AXES = ("population", "data", "fsdp", "expert", "sequence", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # of activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("sequence",),
    "rows": ("data", "fsdp", "sequence"),  # of tokens at their expert
    "blocks": ("expert", "data", "fsdp", "sequence"),  # of such rows, those of one part of the experts after another
    # of weights and activations
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    # of weights
    "embed": ("fsdp",),
    # of what counts trees: not even fsdp splits these
    "layers": (),
    "lanes": ("population",),
}
_SMALL = 2**10  # elements; less than that of an unknown leaf is not worth splitting

Axes = tuple[str | None, ...]
# The logical axes of a parameter of the public tree, without those of layers and lanes, by its last two names, …
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
# … those of the matrices in a `model.weights.LowRank` by the axes of its matrix, …
_OF_LOW_RANK: dict[str, Callable[[Axes], Axes]] = {
    "base": lambda axes: axes,
    "a": lambda axes: (*axes[:-1], None),
    "b": lambda axes: (*axes[:-2], None, axes[-1]),
}
# … or else by its last name.
_BY_NAME: dict[str, Axes] = {
    "scale": ("embed",),
    "bias": ("embed",),
    "sinks": ("heads",),
    "selection_bias": (None,),
}


def make_mesh(axes: Mapping[str, int] | None = None, platform: str | None = None) -> Mesh:
    """A mesh of all AXES over the first devices of all processes, e.g. {"data": 2, "fsdp": 4}; the others have size 1.

    None: all devices on "data". platform: whose devices; None: JAX's default. Raises InputError for an unknown axis, a
    size that the devices do not give, and a platform that is not here.
    """
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        raise InputError(f"platform={platform!r}: there is no such device here; leave it out") from None
    sizes = _sizes(axes or {"data": len(devices)})
    size = math.prod(sizes)
    if size > len(devices):
        raise InputError(f"a mesh of {size} devices was asked for; there are {len(devices)}")
    if size < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"a mesh of {size} devices leaves some of {jax.process_count()} processes idle; use all {len(devices)}"
        )
    return Mesh(np.array(devices[:size]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_axes(rows: int) -> dict[str, int]:
    """All devices on "data"; of a CPU's cores as many as divide the rows of every step."""
    count = len(jax.devices())
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        count = max(size for size in range(1, count + 1) if math.gcd(size, rows) == size)
    return {"data": count}


def abstract_mesh(axes: Mapping[str, int]) -> AbstractMesh:
    """The same without devices: for shapes and books of machines that are not here."""
    return AbstractMesh(_sizes(axes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(axes: Mapping[str, int]) -> tuple[int, ...]:
    for name, size in axes.items():
        if name not in AXES:
            raise UnknownNameError("mesh axis", name, AXES)
        check_whole(f"mesh axis {name}", size, 1)
    return tuple(axes.get(name, 1) for name in AXES)


def parse_mesh(text: str) -> dict[str, int]:
    """Read `data=2,fsdp=4`."""
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
    """The context in which programs are traced for the mesh over which a tree's arrays lie; none for one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(mesh: Mesh | AbstractMesh, batch: Any, lanes: bool = False) -> Any:
    """Return a sharding for every array of a batch, [batch], [batch, seq], …; lanes: with an axis of lanes before.

    The axes must divide the rows: see `check_batch`. A sequence that they do not divide is not split.
    """
    names = ("lanes",) * lanes + ("batch", "sequence")

    def of(leaf: Any) -> NamedSharding:
        rules = [RULES[name] for name in names[: len(leaf.shape)]]
        if len(rules) == len(names):
            parts = math.prod(mesh.shape.get(axis, 1) for axis in rules[-1])
            rules[-1] = rules[-1] if leaf.shape[len(names) - 1] % parts == 0 else ()
        return NamedSharding(mesh, _spec(rules))

    return jax.tree.map(of, batch)


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, seq_len: int) -> None:
    """Raise InputError unless the mesh divides a batch evenly."""
    for field, length, name in (("batch_size", batch_size, "batch"), ("seq_len", seq_len, "sequence")):
        parts = math.prod(mesh.shape.get(axis, 1) for axis in RULES[name])
        if length % parts:
            by = " · ".join(axis for axis in RULES[name] if mesh.shape.get(axis, 1) > 1)
            raise InputError(f"{field}={length} does not divide over {parts} devices ({by}); make it a multiple")


def parameter_axes(path: tuple[str, ...]) -> Axes:
    """The logical axes of the parameter at `path` in the public tree, those of layers and lanes left out."""
    if _is_of_low_rank(path):
        return _OF_LOW_RANK[path[-1]](parameter_axes(path[:-1]))
    axes = _BY_PAIR.get(path[-2:]) or _BY_NAME.get(path[-1])  # type: ignore[arg-type]
    if axes is None:
        raise KeyError(f"parameter {'/'.join(path)} has no axes in model/sharding.py")
    return axes


def spec_for(
    mesh: Mesh | AbstractMesh, path: tuple[str, ...], shape: tuple[int, ...], lanes: bool = False
) -> PartitionSpec:
    """How the parameter at `path` of the public tree is split, or what mirrors it in an optimizer's state.

    A mesh axis that does not divide its dimension is left out there; "fsdp" then goes to the largest one that it does
    divide, so that the state really shrinks by it. A leaf of another rank than the parameter (the factored moments of
    Adafactor) has nothing but that. lanes: the first axis counts them, and "population" splits it.
    """
    stacking = ["lanes"] * lanes + ["layers"] * _is_stacked(path)
    names = (*stacking, *parameter_axes(path))
    if len(names) != len(shape):
        return _spec_of_unknown(mesh.shape, shape, stacking)
    return _spec(_with_fsdp(mesh.shape, shape, _divided(mesh.shape, names, shape), len(stacking)))


def shardings(mesh: Mesh | AbstractMesh, tree: Any, lanes: bool = False) -> Any:
    """A NamedSharding for every leaf (array or shape) of parameters, optimizer states, or whole training states.

    Leaves under the path of a parameter go by `spec_for`. Of others fsdp splits the large ones; the rest is repeated.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # Parameters stand in dicts, some of their parts in a LowRank; counters and keys are attributes of states.
        names = names_of(path)
        if path and (isinstance(path[-1], jax.tree_util.DictKey) or _is_of_low_rank(names)):
            return NamedSharding(mesh, spec_for(mesh, names, leaf.shape, lanes))
        return NamedSharding(mesh, _spec_of_unknown(mesh.shape, leaf.shape, ["lanes"] * lanes))

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain(x: Any, *names: str | None) -> Any:
    """x, split by its logical axes while a program is traced under `jax.set_mesh`; without a mesh x itself.

    None: not split. A mesh axis that does not divide its dimension is left out. Works under vmap, scan and remat.
    """
    sizes = _traced_mesh()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(_divided(sizes, names, x.shape)))


def parts_of(name: str, length: int | None = None) -> int:
    """Into how many parts `constrain` splits a logical axis of this length; None: of a length that all divide."""
    sizes = _traced_mesh()
    length = math.prod(sizes.values()) if length is None else length
    return math.prod(sizes[axis] for axis in _divided(sizes, (name,), (length,))[0])


def parts_of_lanes(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Over how many devices a mesh spreads lanes; None: the mesh under which is traced."""
    return (_traced_mesh() if mesh is None else mesh.shape).get("population", 1)


def _traced_mesh() -> dict[str, int]:
    """The axes of the mesh under which is traced, without those that are not ours or not the compiler's to arrange."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in AXES if axis in mesh.auto_axes}


def _is_of_low_rank(path: tuple[str, ...]) -> bool:
    """Return whether a path ends in a matrix of a `LowRank`; its mask and scale are repeated."""
    return path[-1] in _OF_LOW_RANK and (path[-2:-1] == ("weight",) or path[-3:-2] == ("experts",))


def _is_stacked(path: tuple[str, ...]) -> bool:
    """Whether the first axis counts layers: not where layers were unstacked into a tuple."""
    return "layers" in path and not path[path.index("layers") + 1].isdigit()


def _divided(sizes: Mapping[str, int], names: Sequence[str | None], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The mesh axes of every dimension, without those that do not divide it."""
    found = []
    for name, length in zip(names, shape, strict=True):
        kept: list[str] = []
        for axis in () if name is None else RULES[name]:
            if sizes.get(axis, 1) > 1 and length % sizes[axis] == 0:
                kept.append(axis)
                length //= sizes[axis]
        found.append(tuple(kept))
    return found


def _with_fsdp(
    sizes: Mapping[str, int], shape: tuple[int, ...], axes: list[tuple[str, ...]], stacking: int
) -> list[tuple[str, ...]]:
    """The same with "fsdp" on the dimension of which a device has most, if it stands nowhere yet."""
    size = sizes.get("fsdp", 1)
    if size == 1 or any("fsdp" in of_one for of_one in axes):
        return axes
    held = [length // math.prod(sizes[axis] for axis in of_one) for length, of_one in zip(shape, axes, strict=True)]
    free = [index for index in range(stacking, len(shape)) if held[index] % size == 0]
    if not free:
        return axes
    best = max(free, key=lambda index: held[index])
    return [(*of_one, "fsdp") if index == best else of_one for index, of_one in enumerate(axes)]


def _spec_of_unknown(sizes: Mapping[str, int], shape: tuple[int, ...], stacking: list[str]) -> PartitionSpec:
    names = [*stacking, *[None] * (len(shape) - len(stacking))]
    axes = _divided(sizes, names, shape)
    if math.prod(shape) < _SMALL:
        return _spec(axes) if any(axes) else PartitionSpec()
    return _spec(_with_fsdp(sizes, shape, axes, len(stacking)))


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(of_one if len(of_one) > 1 else of_one[0] if of_one else None for of_one in axes))
