"""Parameters on the devices, filled one tensor at a time; each slice goes directly to its shard."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from model.convert.plan import Leaf, LeafSlice, Shapes, TensorPlan
from model.sharding import spec_for


class ParameterBuilder:
    """Parameters under construction.

    The host holds one tensor at a time, the devices everything read so far. A stack of layers is allocated with its
    first tensor; the others are written into it in place.
    """

    def __init__(self, shapes: Shapes, dtype: str, mesh: Mesh | None):
        self.shapes, self.dtype, self.mesh = shapes, jnp.dtype(dtype), mesh
        self.leaves: dict[Leaf, Array] = {}

    def write(self, plan: TensorPlan, read: Callable[[], Shaped[np.ndarray, "..."]]) -> None:
        """Write the tensor that `read` returns into its leaves."""
        for target, value in zip(plan.slices, self._slices_on_device(plan, read()), strict=True):
            self._write_slice(target, value, plan.rule.transposed)

    def tree(self) -> dict:
        """Return the finished parameters."""
        return traverse_util.unflatten_dict(self.leaves)

    def _slices_on_device(self, plan: TensorPlan, tensor: np.ndarray) -> list[Array]:
        """Copy the slices to the devices. On return the host's tensor is free, before a leaf is allocated."""
        values = []
        for target in plan.slices:
            value = tensor if len(plan.slices) == 1 else _slice(tensor, target.start, target.stop, plan.axis)
            sharding = self._sharding(target.leaf)
            if sharding is not None:
                sharding = _sharding_of_slice(sharding, value.ndim, plan.rule.transposed)
            values.append(jax.device_put(value, sharding))
        return jax.block_until_ready(values)

    def _write_slice(self, target: LeafSlice, value: Array, transposed: bool) -> None:
        leaf, index, sharding = target.leaf, target.index, self._sharding(target.leaf)
        if not index:
            self.leaves[leaf] = _convert(value, transposed, self.dtype, sharding)
        else:
            if leaf not in self.leaves:
                self.leaves[leaf] = _empty(self.shapes[leaf], self.dtype, sharding)
            self.leaves[leaf] = _insert(self.leaves[leaf], value, np.asarray(index, np.int32), transposed, sharding)
        # Otherwise reading would run ahead of writing and hold many tensors at once.
        self.leaves[leaf].block_until_ready()

    def _sharding(self, leaf: Leaf) -> NamedSharding | None:
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, spec_for(self.mesh, leaf, self.shapes[leaf]))


def _slice(tensor: np.ndarray, start: int, stop: int, axis: int) -> np.ndarray:
    axis = max(axis, -tensor.ndim)  # a bias has one axis only
    return tensor[(..., slice(start, stop)) if axis == -1 else (..., slice(start, stop), slice(None))]


def _sharding_of_slice(sharding: NamedSharding, ndim: int, transposed: bool) -> NamedSharding:
    """Return the sharding of one layer's tensor, which may be transposed in the file.

    For a stack [layer, in, out] with the spec (None, "fsdp", "tensor"), a transposed tensor [out, in] has
    ("tensor", "fsdp").
    """
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
