"""Which array axis goes onto which mesh axis. For now one axis, "data": rows are split, parameters repeated."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.errors import InputError


def make_mesh(axes: dict[str, int] | None = None) -> Mesh:
    """A mesh over the first devices, e.g. {"data": 8}; None: all devices on "data"."""
    devices = jax.devices()
    axes = axes or {"data": len(devices)}
    if set(axes) != {"data"}:
        raise InputError(f"mesh axes {sorted(axes)} are not known; give data=N")
    size = math.prod(axes.values())
    if not 1 <= size <= len(devices):
        raise InputError(f"a mesh of {size} devices was asked for; there are {len(devices)}")
    return Mesh(np.array(devices[:size]).reshape(tuple(axes.values())), tuple(axes))


def parse_mesh(text: str) -> dict[str, int]:
    """Read `data=8`."""
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InputError(f"--mesh {text!r} is not of the form data=8") from None


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split the array's batch axis, number `axis`, over the data axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def weight_sharding(mesh: Mesh, shape: tuple[int, ...], stacked: bool = False) -> NamedSharding:
    """Split one axis of a weight over the data axis, for models that do not fit on one device.

    stacked: the first axis counts layers. It is never split, nor is an axis of experts: a weight's last two axes are
    its inputs and outputs, and of these the larger that the mesh divides is split. Vectors are repeated.
    """
    matrix = range(len(shape))[int(stacked) :][-2:]
    size = mesh.shape["data"]
    axes = [axis for axis in matrix if shape[axis] % size == 0] if len(matrix) == 2 else []
    if not axes or size == 1:
        return replicated(mesh)
    return over_rows(mesh, max(axes, key=lambda axis: shape[axis]))
