"""Products of rows with the matrix of the group that they belong to: the arithmetic of a mixture of experts.

Three forms of the same product, for three kinds of machine:

- `loop_product`: blocks of rows in turn, each with its group's matrix read in place. A CPU is busy with one product of
  a block, and gathering matrices first costs it more than the products.
- `batched_product`: all blocks at once, each with its own copy of its group's matrix. For GPUs, which need the
  parallel work, and on which jaxlib 0.10 expands a ragged product to one of every row with every matrix.
- `ragged_product`: `jax.lax.ragged_dot`, rows sorted by group without padding. TPUs have a kernel for it.

All take matrices with a change of low rank (`LowRank`): three products, the change's two without its matrix.

All take matrices in int8 too. Those are widened where they are used, a block's or a row's at a time: their scales
belong to outputs, so that the product can be scaled instead.

Autodiff would give the loop a gradient of all matrices per block, and `ragged_dot` cannot be `vmap`ped after it was
differentiated. Both therefore bring rules of their own: reverse mode of every order (no forward mode), and lanes of a
`vmap` that become more groups of one product.
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
    """The form for the default backend, when tracing.

    `jax.lax.platform_dependent` would decide when lowering, but has to trace and differentiate every form first.
    """
    forms: dict[str, Form] = {"cpu": "loop", "tpu": "ragged"}
    return forms.get(jax.default_backend(), "batched")


def _takes_low_rank(product: Callable) -> Callable:
    """The product, which then takes `LowRank`s of such matrices as it takes the matrices."""

    @functools.wraps(product)
    def run(rows: Array, weights: Matrices, *groups: Array) -> Array:
        if not isinstance(weights, LowRank):
            return product(rows, weights, *groups)
        a = weights.a * (weights.mask * weights.scale[:, None])[:, None]
        return product(rows, weights.base, *groups) + product(product(rows, a, *groups), weights.b, *groups)

    return run


@_takes_low_rank
def own_product(rows: Float[Array, "count size d_in"], weights: Plain) -> Float[Array, "count size d_out"]:
    """As many blocks as matrices, each times its own, in the rows' precision."""
    if isinstance(weights, Int8Experts):
        return rows @ weights.weight.astype(rows.dtype) * weights.scale[:, None].astype(rows.dtype)
    return rows @ weights.astype(rows.dtype)


@_takes_low_rank
def batched_product(
    rows: Float[Array, "blocks size d_in"], weights: Plain, group: Int[Array, " blocks"]
) -> Float[Array, "blocks size d_out"]:
    """Every block times its group's matrix, in the rows' precision."""
    return own_product(rows, jax.tree.map(lambda leaf: leaf[group], weights))


def _with_rules(
    times: Product, times_transposed: Product, outer: Callable, lanes_of_groups: Callable, share_weights: bool
) -> Product:
    """`times` with rules for reverse mode and `vmap`.

    times(rows, weights, groups) and times_transposed, with every matrix transposed, give rows. outer(rows, others,
    groups, start) adds to `start`, a float32 [count, d_in, d_out], the sum of rowᵀ · other over every group's rows.
    They are each other's derivatives, so that three rules close the set. lanes_of_groups(groups [lanes, …], count)
    numbers the groups of all lanes in a row; share_weights: lanes can take one set of matrices together.
    """
    merge = lambda array: array.reshape(-1, *array.shape[2:])
    spread = lambda array, is_batched, lanes: array if is_batched else jnp.broadcast_to(array, (lanes, *array.shape))

    def laned(function: Callable) -> Callable:
        function = jax.custom_batching.custom_vmap(function)

        @function.def_vmap
        def rule(lanes: int, batched: Sequence[bool], rows: Array, weights: Array, groups: Array):
            rows, groups = spread(rows, batched[0], lanes), spread(groups, batched[2], lanes)
            if batched[1] or not share_weights:
                weights = spread(weights, batched[1], lanes)
                groups, weights = lanes_of_groups(groups, weights.shape[1]), merge(weights)
            result = function(merge(rows), weights, merge(groups))
            return result.reshape(*rows.shape[:-1], result.shape[-1]), True

        return function

    times, times_transposed, outer = laned(times), laned(times_transposed), jax.custom_batching.custom_vmap(outer)

    @outer.def_vmap
    def outer_rule(lanes: int, batched: Sequence[bool], *arguments: Array):
        rows, others, groups, start = (spread(a, b, lanes) for a, b in zip(arguments, batched, strict=True))
        groups = lanes_of_groups(groups, start.shape[1])
        return outer(merge(rows), merge(others), merge(groups), merge(start)).reshape(start.shape), True

    @jax.custom_vjp
    def product(rows, weights, groups):
        return times(rows, weights, groups)

    @jax.custom_vjp
    def product_transposed(rows, weights, groups):
        return times_transposed(rows, weights, groups)

    @jax.custom_vjp
    def gradient(rows, others, groups, like):
        return outer(rows, others, groups, jnp.zeros(like.shape, jnp.float32)).astype(like.dtype)

    def back(saved, change):
        rows, weights, groups = saved
        return product_transposed(change, weights, groups), gradient(rows, change, groups, weights), None

    def back_transposed(saved, change):
        rows, weights, groups = saved
        return product(change, weights, groups), gradient(change, rows, groups, weights), None

    def back_gradient(saved, change):
        rows, others, groups, like = saved
        return (
            product_transposed(others, change, groups).astype(rows.dtype),
            product(rows, change, groups).astype(others.dtype),
            None,
            jnp.zeros_like(like),
        )

    product.defvjp(lambda *arguments: (product(*arguments), arguments), back)
    product_transposed.defvjp(lambda *arguments: (product_transposed(*arguments), arguments), back_transposed)
    gradient.defvjp(lambda *arguments: (gradient(*arguments), arguments), back_gradient)
    return product


def _dot(a: Array, b: Array, contract_a: int, contract_b: int, dtype=None) -> Array:
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=dtype)


def _matrix(weights: Array, index: Array, dtype) -> Array:
    return jax.lax.dynamic_index_in_dim(weights, index, keepdims=False).astype(dtype)


def _loop(contract: int) -> Product:
    def times(rows: Array, weights: Array, group: Array) -> Array:
        one = lambda block: _dot(block[0], _matrix(weights, block[1], rows.dtype), 1, contract)
        return jax.lax.map(one, (rows, group))

    return times


def _loop_outer(rows: Array, others: Array, group: Array, start: Array) -> Array:
    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        row, other, index = block
        new = _matrix(total, index, total.dtype) + _dot(row, other, 0, 0, total.dtype)
        return jax.lax.dynamic_update_index_in_dim(total, new, index, 0), None

    return jax.lax.scan(add, start, (rows, others, group))[0]


_RAGGED_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_outer(rows: Array, others: Array, sizes: Array, start: Array) -> Array:
    return start + jax.lax.ragged_dot_general(rows, others, sizes, _RAGGED_OUTER, preferred_element_type=start.dtype)


_loop_with_rules = _with_rules(
    _loop(0),
    _loop(1),
    _loop_outer,
    lanes_of_groups=lambda group, count: group + count * jnp.arange(group.shape[0], dtype=group.dtype)[:, None],
    share_weights=True,
)
# Group sizes need no renumbering: those of a lane add up to its rows, so the next lane's groups begin where it does.
_ragged_with_rules = _with_rules(
    lambda rows, weights, sizes: jax.lax.ragged_dot(rows, weights.astype(rows.dtype), sizes),
    lambda rows, weights, sizes: jax.lax.ragged_dot(rows, jnp.swapaxes(weights, 1, 2).astype(rows.dtype), sizes),
    _ragged_outer,
    lanes_of_groups=lambda sizes, count: sizes,
    share_weights=False,
)


@_takes_low_rank
def loop_product(
    rows: Float[Array, "blocks size d_in"], weights: Plain, group: Int[Array, " blocks"]
) -> Float[Array, "blocks size d_out"]:
    """Every block times its group's matrix, in the rows' precision; the matrices' gradient adds up in float32."""
    if isinstance(weights, Int8Experts):
        return _loop_with_rules(rows, weights.weight, group) * weights.scale[group][:, None].astype(rows.dtype)
    return _loop_with_rules(rows, weights, group)


@_takes_low_rank
def ragged_product(
    rows: Float[Array, "rows d_in"], weights: Plain, sizes: Int[Array, " count"]
) -> Float[Array, "rows d_out"]:
    """Rows sorted by group times their group's matrix, as `loop_product`; `sizes` must add up to the number of rows."""
    if isinstance(weights, Int8Experts):
        # Whole numbers as they are: to widen them is the kernel's business.
        y = jax.lax.ragged_dot(rows, weights.weight, sizes, preferred_element_type=rows.dtype)
        return y * jnp.repeat(weights.scale.astype(y.dtype), sizes, axis=0, total_repeat_length=len(y))
    return _ragged_with_rules(rows, weights, sizes)
