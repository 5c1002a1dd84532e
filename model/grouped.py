"""Grouped matrix products, the arithmetic of a mixture of experts: each row times the matrix of its group.

Three forms of the same product, for three kinds of hardware:

- `loop_product`: blocks of rows one after another, each with its group's matrix read in place. One block keeps a CPU
  busy, and gathering matrices first costs it more than the products.
- `batched_product`: all blocks at once, each with its own copy of its group's matrix. For GPUs, which need the
  parallel work, and on which jaxlib 0.10 expands a ragged product to one of every row with every matrix.
- `ragged_product`: `jax.lax.ragged_dot`, rows sorted by group without padding. TPUs have a kernel for it.

All take matrices with low-rank factors (`LowRank`) as x @ W + (x @ a) @ b, and matrices in int8, which are widened
where they are used, a block or a row at a time: scales belong to outputs, so that the product can be scaled instead.

By autodiff the loop would get a gradient of all matrices per block, and `ragged_dot` cannot be `vmap`ped after it was
differentiated. Both therefore have rules of their own: reverse mode of every order (no forward mode), and under `vmap`
one product with more groups.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.weights import Int8Experts, LowRank

Form = Literal["loop", "batched", "ragged"]
Product = Callable[[Array, Array, Array], Array]
Plain = Float[Array, "count d_in d_out"] | Int8Experts
Matrices = Plain | LowRank


def form_for_backend() -> Form:
    """Return the form for the default backend at trace time.

    `jax.lax.platform_dependent` would decide at lowering time, but traces and differentiates every form.
    """
    forms: dict[str, Form] = {"cpu": "loop", "tpu": "ragged"}
    return forms.get(jax.default_backend(), "batched")


def _takes_low_rank(product: Callable) -> Callable:
    """Extend a product of rows with matrices to rows with `LowRank`s of such matrices."""

    @functools.wraps(product)
    def run(rows: Array, weights: Matrices, *groups: Array) -> Array:
        if not isinstance(weights, LowRank):
            return product(rows, weights, *groups)
        a = weights.a * (weights.mask * weights.scale[:, None])[:, None]
        return product(rows, weights.base, *groups) + product(product(rows, a, *groups), weights.b, *groups)

    return run


@_takes_low_rank
def own_product(rows: Float[Array, "count size d_in"], weights: Plain) -> Float[Array, "count size d_out"]:
    """Return block i times matrix i, for as many blocks as matrices, in the rows' precision."""
    if isinstance(weights, Int8Experts):
        return rows @ weights.weight.astype(rows.dtype) * weights.scale[:, None].astype(rows.dtype)
    return rows @ weights.astype(rows.dtype)


@_takes_low_rank
def batched_product(
    rows: Float[Array, "blocks size d_in"], weights: Plain, group: Int[Array, " blocks"]
) -> Float[Array, "blocks size d_out"]:
    """Return every block times its group's matrix, in the rows' precision."""
    return own_product(rows, jax.tree.map(lambda leaf: leaf[group], weights))


def _with_rules(
    times: Product,
    times_transposed: Product,
    outer: Callable[[Array, Array, Array, Array], Array],
    renumber: Callable[[Array, int], Array],
    share_weights: bool,
) -> Product:
    """Return `times` with rules for reverse-mode differentiation and `vmap`.

    With R_g the rows of group g and W_g its matrix, of `count` matrices:

        times(R, W, groups)             R_g @ W_g              [n, …, d_in] → [n, …, d_out]
        times_transposed(R, W, groups)  R_g @ W_gᵀ             [n, …, d_out] → [n, …, d_in]
        outer(R, O, groups, start)      start_g + R_gᵀ @ O_g   [count, d_in, d_out], float32

    groups: the group of each block for the loop, [n]; the number of rows of each group for the ragged product, [count].

    Differentiation: the gradients of Y = times(R, W) are times_transposed(dY, W) and outer(R, dY). Those of
    times_transposed and outer are products of the same three, so that three rules are enough for every order.

    vmap: lanes become more groups of one product. Two lanes with three matrices each, W [2, 3, d_in, d_out], become
    W [6, d_in, d_out], in which group g of lane l is 3 · l + g: renumber(groups [lanes, …], count=3) returns the groups
    for that. share_weights: lanes with one W [3, d_in, d_out] for all of them can use it as it is, without renumbering.
    """

    def merge(array: Array) -> Array:
        """Reshape [lanes, n, …] to [lanes · n, …]."""
        return array.reshape(-1, *array.shape[2:])

    def spread(array: Array, is_batched: bool, lanes: int) -> Array:
        """Give an array that all lanes share an axis of lanes."""
        return array if is_batched else jnp.broadcast_to(array, (lanes, *array.shape))

    def with_vmap(function: Product) -> Product:
        function = jax.custom_batching.custom_vmap(function)

        @function.def_vmap
        def rule(lanes: int, batched: Sequence[bool], rows: Array, weights: Array, groups: Array):
            rows, groups = spread(rows, batched[0], lanes), spread(groups, batched[2], lanes)
            if batched[1] or not share_weights:
                weights = spread(weights, batched[1], lanes)
                groups, weights = renumber(groups, weights.shape[1]), merge(weights)
            result = function(merge(rows), weights, merge(groups))
            return result.reshape(*rows.shape[:-1], result.shape[-1]), True

        return function

    times, times_transposed = with_vmap(times), with_vmap(times_transposed)
    outer = jax.custom_batching.custom_vmap(outer)

    @outer.def_vmap
    def outer_rule(lanes: int, batched: Sequence[bool], *arguments: Array):
        rows, others, groups, start = (spread(a, b, lanes) for a, b in zip(arguments, batched, strict=True))
        groups = renumber(groups, start.shape[1])
        return outer(merge(rows), merge(others), merge(groups), merge(start)).reshape(start.shape), True

    @jax.custom_vjp
    def product(rows, weights, groups):
        return times(rows, weights, groups)

    @jax.custom_vjp
    def product_transposed(rows, weights, groups):
        return times_transposed(rows, weights, groups)

    @jax.custom_vjp
    def weight_gradient(rows, others, groups, like):
        return outer(rows, others, groups, jnp.zeros(like.shape, jnp.float32)).astype(like.dtype)

    def back(saved, cotangent):
        rows, weights, groups = saved
        return product_transposed(cotangent, weights, groups), weight_gradient(rows, cotangent, groups, weights), None

    def back_transposed(saved, cotangent):
        rows, weights, groups = saved
        return product(cotangent, weights, groups), weight_gradient(cotangent, rows, groups, weights), None

    def back_weight_gradient(saved, cotangent):
        rows, others, groups, like = saved
        return (
            product_transposed(others, cotangent, groups).astype(rows.dtype),
            product(rows, cotangent, groups).astype(others.dtype),
            None,
            jnp.zeros_like(like),
        )

    product.defvjp(lambda *arguments: (product(*arguments), arguments), back)
    product_transposed.defvjp(lambda *arguments: (product_transposed(*arguments), arguments), back_transposed)
    weight_gradient.defvjp(lambda *arguments: (weight_gradient(*arguments), arguments), back_weight_gradient)
    return product


def _dot(a: Array, b: Array, contract_a: int, contract_b: int, dtype=None) -> Array:
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=dtype)


def _matrix(weights: Array, index: Array, dtype) -> Array:
    return jax.lax.dynamic_index_in_dim(weights, index, keepdims=False).astype(dtype)


def _loop(contract: int) -> Product:
    """Return the product of each block with its group's matrix (contract=0), or with its transpose (contract=1)."""

    def times(rows: Array, weights: Array, group: Array) -> Array:
        def one_block(block: tuple[Array, Array]) -> Array:
            rows, group = block
            return _dot(rows, _matrix(weights, group, rows.dtype), 1, contract)

        return jax.lax.map(one_block, (rows, group))

    return times


def _loop_outer(rows: Array, others: Array, group: Array, start: Array) -> Array:
    """Add rowsᵀ @ others of each block to its group's matrix in `start` [count, d_in, d_out], in place."""

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        row, other, index = block
        new = _matrix(total, index, total.dtype) + _dot(row, other, 0, 0, total.dtype)
        return jax.lax.dynamic_update_index_in_dim(total, new, index, 0), None

    return jax.lax.scan(add, start, (rows, others, group))[0]


def _renumber_blocks(group: Int[Array, "lanes blocks"], count: int) -> Int[Array, "lanes blocks"]:
    """Return lane · count + group. With count = 3, the groups [[0, 2], [1, 1]] become [[0, 2], [4, 4]]."""
    return group + count * jnp.arange(group.shape[0], dtype=group.dtype)[:, None]


_RAGGED_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_outer(rows: Array, others: Array, sizes: Array, start: Array) -> Array:
    return start + jax.lax.ragged_dot_general(rows, others, sizes, _RAGGED_OUTER, preferred_element_type=start.dtype)


def _ragged(rows: Array, weights: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(rows, weights.astype(rows.dtype), sizes)


def _ragged_transposed(rows: Array, weights: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(rows, jnp.swapaxes(weights, 1, 2).astype(rows.dtype), sizes)


def _same_sizes(sizes: Int[Array, "lanes count"], count: int) -> Int[Array, "lanes count"]:
    """Return the sizes: those of a lane add up to its rows, so that the next lane's groups begin where its rows do."""
    return sizes


_loop_with_rules = _with_rules(_loop(0), _loop(1), _loop_outer, _renumber_blocks, share_weights=True)
_ragged_with_rules = _with_rules(_ragged, _ragged_transposed, _ragged_outer, _same_sizes, share_weights=False)


@_takes_low_rank
def loop_product(
    rows: Float[Array, "blocks size d_in"], weights: Plain, group: Int[Array, " blocks"]
) -> Float[Array, "blocks size d_out"]:
    """Return every block times its group's matrix, in the rows' precision.

    The gradient of the matrices is accumulated in float32.
    """
    if isinstance(weights, Int8Experts):
        return _loop_with_rules(rows, weights.weight, group) * weights.scale[group][:, None].astype(rows.dtype)
    return _loop_with_rules(rows, weights, group)


@_takes_low_rank
def ragged_product(
    rows: Float[Array, "rows d_in"], weights: Plain, sizes: Int[Array, " count"]
) -> Float[Array, "rows d_out"]:
    """Return rows, sorted by group, times their group's matrix, in the rows' precision.

    sizes: the number of rows in each group; they must add up to the number of rows. The gradient of the matrices is
    accumulated in float32.
    """
    if isinstance(weights, Int8Experts):
        # The kernel widens int8 itself.
        y = jax.lax.ragged_dot(rows, weights.weight, sizes, preferred_element_type=rows.dtype)
        return y * jnp.repeat(weights.scale.astype(y.dtype), sizes, axis=0, total_repeat_length=len(y))
    return _ragged_with_rules(rows, weights, sizes)
