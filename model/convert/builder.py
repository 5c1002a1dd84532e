"""Filling stacks of layers on the devices, one tensor at a time, each piece going straight to its shard."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from model.convert.plan import Leaf, Part, Shapes, Step
from model.sharding import spec_for


class Places:
    """Parameters that are being read.

    At any moment the host holds one tensor and the devices what has been read so far. A stack's bytes are taken when
    its first tensor comes; every further one is written into it in place.
    """

    def __init__(self, shapes: Shapes, dtype: str, mesh: Mesh | None):
        self.shapes, self.dtype, self.mesh = shapes, jnp.dtype(dtype), mesh
        self.leaves: dict[Leaf, Array] = {}

    def write(self, step: Step, read: Callable[[], Shaped[np.ndarray, "..."]]) -> None:
        """Put the tensor that `read` gives into the leaves that hold its parts."""
        for part, value in zip(step.parts, self._pieces(step, read()), strict=True):
            self._write(part, value, step.row.transposed)

    def tree(self) -> dict:
        """The finished parameters."""
        return traverse_util.unflatten_dict(self.leaves)

    def _pieces(self, step: Step, tensor: np.ndarray) -> list[Array]:
        """The parts on the devices. The host's tensor is free when this returns, before room is made for a leaf."""
        values = []
        for part in step.parts:
            piece = tensor if len(step.parts) == 1 else _cut(tensor, part.start, part.stop, step.axis)
            sharding = self._sharding(part.leaf)
            of_piece = None if sharding is None else _of_piece(sharding, piece.ndim, step.row.transposed)
            values.append(jax.device_put(piece, of_piece))
        return jax.block_until_ready(values)

    def _write(self, part: Part, value: Array, transposed: bool) -> None:
        leaf, index, sharding = part.leaf, part.index, self._sharding(part.leaf)
        if not index:
            self.leaves[leaf] = _convert(value, transposed, self.dtype, sharding)
        else:
            if leaf not in self.leaves:
                self.leaves[leaf] = _empty(self.shapes[leaf], self.dtype, sharding)
            self.leaves[leaf] = _insert(self.leaves[leaf], value, np.asarray(index, np.int32), transposed, sharding)
        # Without this, reading would run ahead of writing and hold many tensors at once.
        self.leaves[leaf].block_until_ready()

    def _sharding(self, leaf: Leaf) -> NamedSharding | None:
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, spec_for(self.mesh, leaf, self.shapes[leaf]))


def _cut(tensor: np.ndarray, start: int, stop: int, axis: int) -> np.ndarray:
    axis = max(axis, -tensor.ndim)  # a bias has one axis only
    return tensor[(..., slice(start, stop)) if axis == -1 else (..., slice(start, stop), slice(None))]


def _of_piece(sharding: NamedSharding, ndim: int, transposed: bool) -> NamedSharding:
    """The leaf's sharding as it is for one layer's tensor, which may be transposed in the file."""
    spec = list(sharding.spec)[-ndim:] if ndim else []
    spec = [None] * (ndim - len(spec)) + spec
    if transposed:
        spec[-1], spec[-2] = spec[-2], spec[-1]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _convert(value: Array, transposed: bool, dtype: jnp.dtype, sharding: NamedSharding | None) -> Array:
    value = (value.mT if transposed else value).astype(dtype)
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding | None) -> Array:
    value = jnp.zeros(shape, dtype)
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _insert(stack: Array, value: Array, index: Array, transposed: bool, sharding: NamedSharding | None) -> Array:
    value = _convert(value, transposed, stack.dtype, None)
    value = value.reshape((1,) * (stack.ndim - value.ndim) + value.shape)
    starts = [index[axis] if axis < index.shape[0] else 0 for axis in range(stack.ndim)]
    stack = jax.lax.dynamic_update_slice(stack, value, starts)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)
