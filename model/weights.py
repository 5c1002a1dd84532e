"""The forms in which a weight can be stored, and the product with each.

Rows are outputs, (out, in), but of experts and of the two factors of `LowRank`, which are read as plain matrices are.

Their fields are Any because JAX also fills such trees with shapes and shardings.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Transposed:
    """A weight stored as (out, in): the layout in which small-batch decode reads fastest on CPU."""

    weight: Any  # float32 or bfloat16 [out, in]


@struct.dataclass
class Bits:
    """A bfloat16 weight as the whole numbers that its bits are.

    A CPU's compiler widens bfloat16 itself as a whole, before any loop and slowly; these it reads as they are stored.
    """

    weight: Any  # uint16 [out, in]


@struct.dataclass
class Int8:
    """weight · scale, one scale per output; activations stay as they are."""

    weight: Any  # int8 [out, in]
    scale: Any  # float32 [out]


@struct.dataclass
class Int8Dynamic:
    """As `Int8`; activations are rounded to int8 too, with one scale per row of theirs, and summed as int32.

    A row's scale is its own, so that what stands beside it in a batch changes nothing.
    """

    weight: Any  # int8 [out, in]
    scale: Any  # float32 [out]


@struct.dataclass
class Int4:
    """(nibble − 8) · scale, one scale per output and group of neighbouring inputs.

    Two inputs a byte: of each group the first half lies in the low nibbles, the second in the high ones. The last
    group is padded; d_in says how many inputs there are.
    """

    packed: Any  # uint8 [out, groups · half a group]
    scale: Any  # float32 [out, groups]
    d_in: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Int8Experts:
    """The stacked matrices of a mixture's experts: weight · scale, one scale per expert and output.

    For the products of `model.grouped` alone. Outputs come last, as these read plain matrices.
    """

    weight: Any  # int8 [count, in, out]
    scale: Any  # float32 [count, out]


@struct.dataclass
class LowRank:
    """base + (a · mask) @ b · scale: a matrix in any form and a trained change of low rank (LoRA, Hu et al. 2021).

    mask is 1 for the columns of a that count and 0 for the others: adapters of several ranks have one shape, and
    `jax.vmap` over a, b, mask and scale leaves the base as it is. Stacked layers put their axis before all of these.
    """

    base: Any  # [in, out], or any other stored form
    a: Any  # float32 [in, rank]
    b: Any  # float32 [rank, out]
    mask: Any  # float32 [rank]
    scale: Any  # float32 []


_NAN_BITS = 0x7FC0  # of a bfloat16
TYPES = (Transposed, Bits, Int8, Int8Dynamic, Int4, Int8Experts, LowRank)


def is_weight(x: Any) -> bool:
    """Whether x is one of the stored forms; a plain array is not."""
    return isinstance(x, TYPES)


def matmul(x: Float[Array, "*batch d_in"], weight: Any) -> Float[Array, "*batch d_out"]:
    """`x @ weight` for every stored form, and for a plain array (in, out); the product runs in x's precision."""
    alone = jax.sharding.get_abstract_mesh().size <= 1  # rows that lie on several devices must not be joined
    joins = jax.default_backend() == "cpu" and alone
    if isinstance(weight, LowRank):
        inner = matmul(x, weight.a) * (weight.mask * weight.scale).astype(x.dtype)
        return matmul(x, weight.base) + matmul(inner, weight.b)
    if isinstance(weight, Int8Dynamic):
        return _dynamic_product(x, weight)
    if is_weight(weight):
        rows = x.size // max(x.shape[-1], 1)
        if joins and 0 < rows <= _FEW_ROWS.get(type(weight), 0):
            y = _product_in_blocks(x.reshape(rows, -1).astype(jnp.float32), weight)
            return y.reshape(*x.shape[:-1], -1).astype(x.dtype)
        return _product_of_rows(x, weight)
    weight = jnp.asarray(weight, x.dtype)
    if not joins or weight.ndim != 2:
        return x @ weight
    return _product(x, weight)


def take_rows(weight: Any, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d_in"]:
    """Rows of a token table in any form, as numbers; NaN for an id outside the table."""
    if isinstance(weight, Transposed) or not is_weight(weight):
        table = weight.weight if isinstance(weight, Transposed) else weight
        return jnp.take(table, ids, axis=0)
    flat = ids.reshape(-1)
    # Whole numbers have no NaN to give for an id outside; the bits of a bfloat16 have, and so have scales.
    outside = _NAN_BITS if isinstance(weight, Bits) else 0
    take = lambda leaf: jnp.take(leaf, flat, axis=0, fill_value=jnp.nan if leaf.dtype == jnp.float32 else outside)
    rows = _widened(jax.tree.map(take, weight), jnp.float32)
    return rows.reshape(*ids.shape, rows.shape[-1])


def plain(weight: Any) -> Float[Array, "d_in d_out"]:
    """The weight as a float array (in, out), for products that take it apart."""
    if not is_weight(weight):
        return weight
    if isinstance(weight, LowRank):
        return merged(weight)
    return (weight.weight if isinstance(weight, Transposed) else _widened(weight, jnp.float32)).T


def merged(weight: LowRank) -> Float[Array, "*stack d_in d_out"]:
    """The float32 matrices that a form with a change of low rank stands for, stacked as it is."""
    if weight.a.ndim > 2:
        return jax.vmap(merged)(weight)
    change = jnp.matmul(weight.a * (weight.mask * weight.scale), weight.b, precision="highest")
    return plain(weight.base).astype(jnp.float32) + change


def shape_of(weight: Any) -> tuple[int, ...]:
    """(…, in, out) of a matrix in any form, or of its shapes; experts' matrices are no single one."""
    if isinstance(weight, LowRank):
        return shape_of(weight.base)
    if isinstance(weight, Int4):
        return (*weight.packed.shape[:-2], weight.d_in, weight.packed.shape[-2])
    if is_weight(weight):
        *stack, outputs, inputs = weight.weight.shape
        return (*stack, inputs, outputs)
    return tuple(weight.shape)


def outputs_of(weight: Any) -> int:
    """How many outputs a matrix in any form has."""
    if isinstance(weight, LowRank):
        return outputs_of(weight.base)
    return jax.tree.leaves(weight)[0].shape[0] if is_weight(weight) else weight.shape[-1]


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays in a tree, as they are stored."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_of(tree: Any) -> int:
    """How many numbers all arrays of a tree have."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# On a CPU the product of few rows with anything but x's own type first widens the whole matrix, at a fraction of the
# memory's speed (docs/LOG.md). Widened a block at a time, which stays in the core's cache, it is read once as stored.
_FEW_ROWS = {Int8: 3, Bits: 16, Int4: 16}
_BLOCK = 2**15  # entries of a block


def _product_in_blocks(x: Array, weight: Any) -> Array:
    """As `_product_of_rows`, some outputs after the other; x is [rows, in]. The last block overlaps the one before."""
    outputs = outputs_of(weight)
    length = min(outputs, max(8, _BLOCK // x.shape[-1]))

    def block(number, y):
        first = number * length  # a slice that would end outside starts earlier, where it is read and written alike
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, length), weight)
        return jax.lax.dynamic_update_slice_in_dim(y, _product_of_rows(x, part), first, axis=1)

    return jax.lax.fori_loop(0, -(-outputs // length), block, jnp.zeros((x.shape[0], outputs), x.dtype))


def _product_of_rows(x: Array, weight: Any) -> Array:
    """The product with a matrix that is stored (out, in), in x's dtype."""
    if isinstance(weight, Int4):
        return _product_of_halves(x, weight)
    if isinstance(weight, Int8):
        return _contract(x, weight.weight.astype(x.dtype)) * weight.scale.astype(x.dtype)
    return _contract(x, _widened(weight, x.dtype))


def _product_of_halves(x: Array, weight: Int4) -> Array:
    """Low and high nibbles apart, each with the inputs that it belongs to: to join them would be a copy."""
    groups = weight.scale.shape[1]
    padded = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, 2 * weight.packed.shape[1] - weight.d_in)))
    halves = padded.reshape(*x.shape[:-1], groups, 2, -1)
    scale = weight.scale[..., None].astype(x.dtype)
    rows = lambda whole: (whole.astype(x.dtype) * scale).reshape(len(whole), -1)
    inputs = lambda half: halves[..., half, :].reshape(*x.shape[:-1], -1)
    low, high = _nibbles(weight)
    return _contract(inputs(0), rows(low)) + _contract(inputs(1), rows(high))


def _dynamic_product(x: Array, weight: Int8Dynamic) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    largest = jnp.max(jnp.abs(rows.astype(jnp.float32)), axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)  # a row that holds NaN keeps it in its scale
    whole = jnp.round(rows / scale).astype(jnp.int8)
    if jax.default_backend() == "cpu" and len(rows) == 1:  # the fast product starts at two rows
        whole = jnp.pad(whole, ((0, 1), (0, 0)))
    sums = jax.lax.dot_general(whole, weight.weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    y = sums[: len(rows)].astype(jnp.float32) * scale * weight.scale
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


_NARROW = 64  # rows of x up to which a CPU runs the product with the matrix on the left 1.5 times as fast


def _contract(x: Array, weight: Array) -> Array:
    rows = x.size // max(x.shape[-1], 1)
    if jax.default_backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1 or rows > _NARROW:
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    y = jax.lax.dot_general(weight, x.reshape(rows, x.shape[-1]), (((1,), (1,)), ((), ())))
    # Without the barrier the compiler would put the matrix on the right again.
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], weight.shape[0])


def _nibbles(weight: Int4) -> tuple[Array, Array]:
    """The whole numbers −8 … 7 of each group's first and second half, both int8 [out, groups, half a group]."""
    packed = weight.packed.reshape(*weight.scale.shape, -1)
    return (packed & 15).astype(jnp.int8) - 8, (packed >> 4).astype(jnp.int8) - 8


def _widened(weight: Any, dtype: Any) -> Array:
    """The numbers that a stored form stands for, [out, in]."""
    if isinstance(weight, Transposed):
        return weight.weight.astype(dtype)
    if isinstance(weight, Bits):
        return jax.lax.bitcast_convert_type(weight.weight.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)
    if isinstance(weight, Int4):
        whole = jnp.concatenate(_nibbles(weight), axis=-1)
        values = whole.astype(dtype) * weight.scale[..., None].astype(dtype)
        return values.reshape(values.shape[0], -1)[:, : weight.d_in]
    return weight.weight.astype(dtype) * weight.scale[:, None].astype(dtype)


@jax.custom_vjp
def _product(x: Float[Array, "*batch d_in"], weight: Float[Array, "d_in d_out"]) -> Float[Array, "*batch d_out"]:
    """`x @ weight` with a gradient of the weight that transposes the narrower of x and y's gradient.

    A CPU's product copies a transposed left side first, which for a wide one takes nearly as long as the product
    (docs/LOG.md). What is kept for the gradient is x itself, so that products of one x keep it once. Reverse mode only.
    """
    return _multiplied(x, weight)


def _multiplied(x: Float[Array, "*batch d_in"], weight: Float[Array, "d_in d_out"]) -> Float[Array, "*batch d_out"]:
    return (_rows(x) @ weight).reshape(*x.shape[:-1], weight.shape[-1])


def _rows(x: Float[Array, "*batch features"]) -> Float[Array, "rows features"]:
    return x.reshape(-1, x.shape[-1])


def _product_back(saved: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    x, weight = saved
    rows, of_rows = _rows(x), _rows(change)
    narrow = of_rows.shape[-1] < rows.shape[-1]
    of_weight = (of_rows.T @ rows).T if narrow else rows.T @ of_rows
    return (of_rows @ weight.T).reshape(x.shape), of_weight


# The forward rule is not `_product` itself, so that a remat policy sees its dot.
_product.defvjp(lambda x, weight: (_multiplied(x, weight), (x, weight)), _product_back)
