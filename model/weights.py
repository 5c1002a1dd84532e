"""The forms in which a weight can be stored, and the product with each.

Plain arrays are [d_in, d_out]. Stored forms are transposed, [d_out, d_in], except the matrices of experts and the two
factors of a `LowRank`, which are oriented as plain arrays. Fields are Any because JAX also fills such trees with shapes
and shardings.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Transposed:
    """A transposed weight, the layout that decoding of small batches reads fastest on a CPU."""

    weight: Any  # float32 or bfloat16 [d_out, d_in]


@struct.dataclass
class Bits:
    """A bfloat16 weight stored by its bits, as uint16.

    On CPUs XLA converts a whole bfloat16 matrix to float32 before any loop, slowly; uint16 it reads as it is stored.
    """

    weight: Any  # uint16 [d_out, d_in]


@struct.dataclass
class Int8:
    """weight · scale, with one scale per output; activations are not quantized."""

    weight: Any  # int8 [d_out, d_in]
    scale: Any  # float32 [d_out]


@struct.dataclass
class Int8Dynamic:
    """As `Int8`, with activations also rounded to int8, one scale per row, and sums in int32.

    Each row has its own scale, so that the other rows of a batch do not change its result.
    """

    weight: Any  # int8 [d_out, d_in]
    scale: Any  # float32 [d_out]


@struct.dataclass
class Int4:
    """(nibble − 8) · scale, with one scale per output and group of consecutive inputs.

    A byte holds two inputs of a group: the low nibble one of its first half, the high nibble one of its second. With
    groups of 4, the inputs 0 … 7 are packed into the bytes (0, 2), (1, 3), (4, 6), (5, 7). The last group is padded;
    d_in is the number of inputs without padding.
    """

    packed: Any  # uint8 [d_out, groups · group / 2]
    scale: Any  # float32 [d_out, groups]
    d_in: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Int8Experts:
    """The stacked matrices of routed experts: weight · scale, with one scale per expert and output.

    Only the products of `model.grouped` take it.
    """

    weight: Any  # int8 [count, d_in, d_out]
    scale: Any  # float32 [count, d_out]


@struct.dataclass
class LowRank:
    """base + (a · mask) @ b · scale: a matrix in any form and a trained update of low rank (LoRA, Hu et al. 2021).

    mask: 1 for the columns of a that are used, 0 for the others: adapters of different ranks have the same shapes, and
    `jax.vmap` over a, b, mask and scale shares the base. Stacked layers add a leading axis to all fields.
    """

    base: Any  # [d_in, d_out], or any other stored form
    a: Any  # float32 [d_in, rank]
    b: Any  # float32 [rank, d_out]
    mask: Any  # float32 [rank]
    scale: Any  # float32 []


_NAN_BITS = 0x7FC0  # the bits of NaN in bfloat16
TYPES = (Transposed, Bits, Int8, Int8Dynamic, Int4, Int8Experts, LowRank)


def is_weight(x: Any) -> bool:
    """Return whether x is one of the stored forms; a plain array is not."""
    return isinstance(x, TYPES)


def matmul(x: Float[Array, "*batch d_in"], weight: Any) -> Float[Array, "*batch d_out"]:
    """Return `x @ weight` for a weight in any stored form or a plain array, in x's precision."""
    # Reshaping *batch to one axis of rows would gather rows that are split over devices.
    one_device = jax.sharding.get_abstract_mesh().size <= 1
    folds_rows = jax.default_backend() == "cpu" and one_device
    if isinstance(weight, LowRank):
        inner = matmul(x, weight.a) * (weight.mask * weight.scale).astype(x.dtype)
        return matmul(x, weight.base) + matmul(inner, weight.b)
    if isinstance(weight, Int8Dynamic):
        return _dynamic_product(x, weight)
    if is_weight(weight):
        rows = x.size // max(x.shape[-1], 1)
        if folds_rows and 0 < rows <= _FEW_ROWS.get(type(weight), 0):
            y = _product_in_blocks(x.reshape(rows, -1).astype(jnp.float32), weight)
            return y.reshape(*x.shape[:-1], -1).astype(x.dtype)
        return _product_of_rows(x, weight)
    weight = jnp.asarray(weight, x.dtype)
    if not folds_rows or weight.ndim != 2:
        return x @ weight
    return _product(x, weight)


def take_rows(weight: Any, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_in"]:
    """Return rows of a token table in any stored form, or NaN for ids outside the table.

    A plain table is [vocab, d_in], which is also the orientation of the stored forms.
    """
    if isinstance(weight, Transposed) or not is_weight(weight):
        table = weight.weight if isinstance(weight, Transposed) else weight
        return jnp.take(table, ids, axis=0)
    flat = ids.reshape(-1)

    def take(leaf: Any) -> Array:
        # Integers have no NaN, but the bits of a bfloat16 do, and the scales of a quantized row are NaN.
        integer_fill = _NAN_BITS if isinstance(weight, Bits) else 0
        fill_value = jnp.nan if leaf.dtype == jnp.float32 else integer_fill
        return jnp.take(leaf, flat, axis=0, fill_value=fill_value)

    rows = _widened(jax.tree.map(take, weight), jnp.float32)
    return rows.reshape(*ids.shape, rows.shape[-1])


def plain(weight: Any) -> Float[Array, "d_in d_out"]:
    """Return a weight in any stored form as a plain float array."""
    if not is_weight(weight):
        return weight
    if isinstance(weight, LowRank):
        return merged(weight)
    return (weight.weight if isinstance(weight, Transposed) else _widened(weight, jnp.float32)).T


def merged(weight: LowRank) -> Float[Array, "*stack d_in d_out"]:
    """Return base + (a · mask) @ b · scale in float32, with the leading axes of `weight`."""
    if weight.a.ndim > 2:
        return jax.vmap(merged)(weight)
    update = jnp.matmul(weight.a * (weight.mask * weight.scale), weight.b, precision="highest")
    return plain(weight.base).astype(jnp.float32) + update


def shape_of(weight: Any) -> tuple[int, ...]:
    """Return (…, d_in, d_out) of a matrix in any stored form but `Int8Experts`, or of its shapes."""
    if isinstance(weight, LowRank):
        return shape_of(weight.base)
    if isinstance(weight, Int4):
        return (*weight.packed.shape[:-2], weight.d_in, weight.packed.shape[-2])
    if is_weight(weight):
        *stack, d_out, d_in = weight.weight.shape
        return (*stack, d_in, d_out)
    return tuple(weight.shape)


def outputs_of(weight: Any) -> int:
    """Return d_out of a matrix in any stored form."""
    if isinstance(weight, LowRank):
        return outputs_of(weight.base)
    return jax.tree.leaves(weight)[0].shape[0] if is_weight(weight) else weight.shape[-1]


def bytes_of(tree: Any) -> int:
    """Return the bytes of all arrays in a tree, as they are stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_of(tree: Any) -> int:
    """Return the number of elements of all arrays in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# On a CPU a product with a matrix of another dtype than x first converts the whole matrix, at a fraction of the memory
# bandwidth (docs/LOG.md). Converted block by block, each of which stays in the core's cache, the matrix is read once.
# For more rows than these the whole conversion is faster.
_FEW_ROWS = {Int8: 3, Bits: 16, Int4: 16}
_BLOCK = 2**15  # entries of a block


def _product_in_blocks(x: Array, weight: Any) -> Array:
    """Return `_product_of_rows` of x [rows, d_in], computed for one block of outputs after another.

    With d_in = 4096 a block has 2**15 / 4096 = 8 outputs. 20 outputs are the blocks 0 … 7, 8 … 15 and 12 … 19: the
    last slice would end outside, so that JAX moves it back, in reading and writing, and it overlaps the one before.
    """
    d_out = outputs_of(weight)
    length = min(d_out, max(8, _BLOCK // x.shape[-1]))

    def add_block(number: Array, y: Array) -> Array:
        first = number * length
        block = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, length), weight)
        return jax.lax.dynamic_update_slice_in_dim(y, _product_of_rows(x, block), first, axis=1)

    return jax.lax.fori_loop(0, -(-d_out // length), add_block, jnp.zeros((x.shape[0], d_out), x.dtype))


def _product_of_rows(x: Array, weight: Any) -> Array:
    """Return the product with a matrix that is stored as [d_out, d_in], in x's dtype."""
    if isinstance(weight, Int4):
        return _product_of_halves(x, weight)
    if isinstance(weight, Int8):
        return _contract(x, weight.weight.astype(x.dtype)) * weight.scale.astype(x.dtype)
    return _contract(x, _widened(weight, x.dtype))


def _product_of_halves(x: Array, weight: Int4) -> Array:
    """Return the sum of the products of low and high nibbles, each with its inputs; joining them would be a copy.

    With groups of 4, the low nibbles are multiplied with the inputs 0, 1, 4, 5, … and the high ones with 2, 3, 6, 7, …
    """
    groups = weight.scale.shape[1]
    padded = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, 2 * weight.packed.shape[1] - weight.d_in)))
    halves = padded.reshape(*x.shape[:-1], groups, 2, -1)
    scale = weight.scale[..., None].astype(x.dtype)

    def inputs(half: int) -> Array:
        return halves[..., half, :].reshape(*x.shape[:-1], -1)

    def dequantized(nibbles: Array) -> Array:
        return (nibbles.astype(x.dtype) * scale).reshape(len(nibbles), -1)

    low, high = _nibbles(weight)
    return _contract(inputs(0), dequantized(low)) + _contract(inputs(1), dequantized(high))


def _dynamic_product(x: Array, weight: Int8Dynamic) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    largest = jnp.max(jnp.abs(rows.astype(jnp.float32)), axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)  # NaN stays, in the scale
    rounded = jnp.round(rows / scale).astype(jnp.int8)
    if jax.default_backend() == "cpu" and len(rows) == 1:  # the fast int8 product needs two rows
        rounded = jnp.pad(rounded, ((0, 1), (0, 0)))
    sums = jax.lax.dot_general(rounded, weight.weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    y = sums[: len(rows)].astype(jnp.float32) * scale * weight.scale
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


_NARROW = 64  # up to this number of rows, a CPU computes weight @ xᵀ 1.5 times as fast as x @ weightᵀ


def _contract(x: Array, weight: Array) -> Array:
    """Return x @ weightᵀ for x [*batch, d_in] and weight [d_out, d_in]."""
    rows = x.size // max(x.shape[-1], 1)
    if jax.default_backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1 or rows > _NARROW:
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    y = jax.lax.dot_general(weight, x.reshape(rows, x.shape[-1]), (((1,), (1,)), ((), ())))
    # Without the barrier the compiler would exchange the two sides again.
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], weight.shape[0])


def _nibbles(weight: Int4) -> tuple[Array, Array]:
    """Return the integers −8 … 7 of each group's first and second half, both int8 [d_out, groups, group / 2]."""
    packed = weight.packed.reshape(*weight.scale.shape, -1)
    return (packed & 15).astype(jnp.int8) - 8, (packed >> 4).astype(jnp.int8) - 8


def _widened(weight: Any, dtype: Any) -> Array:
    """Return the dequantized weight [d_out, d_in]."""
    if isinstance(weight, Transposed):
        return weight.weight.astype(dtype)
    if isinstance(weight, Bits):
        return jax.lax.bitcast_convert_type(weight.weight.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)
    if isinstance(weight, Int4):
        nibbles = jnp.concatenate(_nibbles(weight), axis=-1)
        values = nibbles.astype(dtype) * weight.scale[..., None].astype(dtype)
        return values.reshape(values.shape[0], -1)[:, : weight.d_in]
    return weight.weight.astype(dtype) * weight.scale[:, None].astype(dtype)


@jax.custom_vjp
def _product(x: Float[Array, "*batch d_in"], weight: Float[Array, "d_in d_out"]) -> Float[Array, "*batch d_out"]:
    """Return `x @ weight`, with a rule for the gradient of the weight that transposes the narrower factor.

    dW = xᵀ @ dy = (dyᵀ @ x)ᵀ. A CPU's product first copies a transposed left side, which for a wide one takes nearly as
    long as the product (docs/LOG.md). x itself is saved for the gradient, so that several products of one x save it
    once. Reverse mode only.
    """
    return _multiply_rows(x, weight)


def _multiply_rows(x: Float[Array, "*batch d_in"], weight: Float[Array, "d_in d_out"]) -> Float[Array, "*batch d_out"]:
    return (_rows(x) @ weight).reshape(*x.shape[:-1], weight.shape[-1])


def _rows(x: Float[Array, "*batch features"]) -> Float[Array, "rows features"]:
    return x.reshape(-1, x.shape[-1])


def _product_back(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weight = saved
    rows, dy = _rows(x), _rows(cotangent)
    narrow = dy.shape[-1] < rows.shape[-1]
    weight_gradient = (dy.T @ rows).T if narrow else rows.T @ dy
    return (dy @ weight.T).reshape(x.shape), weight_gradient


# The forward rule does not call `_product`, so that remat policies see its dot.
_product.defvjp(lambda x, weight: (_multiply_rows(x, weight), (x, weight)), _product_back)
