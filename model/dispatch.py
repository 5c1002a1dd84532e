"""Dispatch of tokens to their experts and back: sorting, capacity, blocks.

A choice is one (token, expert) pair. Choices are numbered choice-major, all tokens' first choices before all second
ones, so that first choices have priority where an expert's capacity runs out (GShard, section 2.2). Choice c belongs to
token c mod tokens. Each choice gets a slot: a row of a buffer of blocks, each for one expert. With a capacity there is
one block of `capacity` rows per expert; where nothing is dropped an expert has as many small blocks as it needs.

Example: three tokens choose two of three experts each, [[0, 1], [1, 2], [1, 0]].

    choice           0  1  2  3  4  5     first choices of tokens 0, 1, 2, then their second choices
    expert           0  1  1  1  2  0
    sorted (order)   0  5  1  2  3  4     choices 0 and 5 go to expert 0; 1, 2 and 3 to expert 1; 4 to expert 2
    start            0  2  5  6           expert 1's choices begin at place 2 of that order, padding at 6

In blocks of 2 rows that is [0, 5] of expert 0, [1, 2] and [3, –] of expert 1, [4, –] of expert 2. With a capacity of 2
it is [0, 5], [1, 2], [4, –], and choice 3 is dropped.

On a mesh that splits the experts, a device's blocks are those of its own experts: tokens are communicated, matrices
are not.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.grouped import Form, Matrices, batched_product, form_for_backend, loop_product, own_product, ragged_product
from model.sharding import constrain, parts_of

LARGEST_BLOCK = 128  # rows; larger blocks are no faster and pad more


class SortedChoices(NamedTuple):
    """All choices, sorted by expert; those of padding tokens come last.

    expert: the expert of each choice, `count` for padding. order: the choices in sorted order (stable). place: the
    index of each choice in that order. start: the place of each expert's first choice; the last entry is that of the
    first padding choice.
    """

    expert: Int[Array, " choices"]
    order: Int[Array, " choices"]
    place: Int[Array, " choices"]
    start: Int[Array, " count_and_1"]


class DispatchPlan(NamedTuple):
    """The place of every choice in a buffer of blocks, and back.

    slot: the row of each choice in the flattened buffer, blocks · size where it has none (dropped or padding). source:
    the choice in each row, the number of choices where a row is empty. expert: the expert of each block.

    In the module's example with blocks of 2 rows: slot [0, 2, 3, 4, 6, 1], source [[0, 5], [1, 2], [3, 6], [4, 6]],
    expert [0, 1, 1, 2].
    """

    slot: Int[Array, " choices"]
    source: Int[Array, "blocks size"]
    expert: Int[Array, " blocks"]


def sort_choices(chosen: Int[Array, "tokens top_k"], real: Bool[Array, " tokens"], count: int) -> SortedChoices:
    """Sort the choices among `count` experts; real: False for padding tokens."""
    expert = jnp.where(real[:, None], chosen, count).T.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    start = jnp.searchsorted(expert[order], jnp.arange(count + 1))
    return SortedChoices(expert, order, jnp.argsort(order), start)


def plan_capacity(choices: SortedChoices, capacity: int) -> DispatchPlan:
    """Plan one block of `capacity` rows per expert; choices beyond its capacity get no slot."""
    count = choices.start.shape[0] - 1
    first_row = capacity * jnp.arange(count)
    return _plan(choices, first_row, jnp.arange(count), capacity)


def plan_blocks(
    choices: SortedChoices, size: int, parts: int = 1, most: int | None = None, multiple: int = 1
) -> DispatchPlan:
    """Plan ceil(n / size) blocks of `size` rows for an expert with n choices; no choice is dropped.

    parts: the experts are split into this many equal runs with the same number of blocks each, a multiple of
    `multiple`. most: the number of choices that one part can get at most (None: all).

    The number of blocks is static, an upper bound. The last block of an expert with any choice has up to size − 1
    empty rows: Σ ceil(n / size) ≤ (most + min(experts, most) · (size − 1)) / size. Six choices among three experts in
    blocks of 2 rows take at most (6 + 3 · 1) // 2 = 4 blocks.
    """
    count, most = choices.start.shape[0] - 1, choices.order.shape[0] if most is None else most
    experts = count // parts
    blocks = (most + min(experts, most) * (size - 1)) // size
    blocks = _ceil_div(blocks, multiple) * multiple
    blocks_of_expert = _ceil_div(jnp.diff(choices.start).reshape(parts, experts), size)
    end = jnp.cumsum(blocks_of_expert, axis=1)
    expert = jax.vmap(lambda end: jnp.searchsorted(end, jnp.arange(blocks), side="right"))(end)
    expert = jnp.minimum(expert, experts - 1) + experts * jnp.arange(parts)[:, None]  # spare blocks stay empty
    first_block = blocks * jnp.arange(parts)[:, None] + end - blocks_of_expert
    return _plan(choices, size * first_block.reshape(-1), expert.reshape(-1), size)


def _ceil_div(a: Any, b: int) -> Any:
    return -(-a // b)


def _plan(
    choices: SortedChoices, first_row: Int[Array, " count"], expert: Int[Array, " blocks"], size: int
) -> DispatchPlan:
    """Fill an expert's blocks with its choices, in sorted order from the expert's first row on.

    first_row: of each expert in the flattened buffer. expert: of each block; an expert's blocks are consecutive.

    Row 4 of the module's example is the first of expert 1's second block. Two rows of that expert come before it
    (first_row is 2), so that it holds the choice at place start[1] + 2 = 4, which is 3. Row 5 would hold place 5, which
    belongs to expert 2 (start[2] = 5): it stays empty.
    """
    count, total, rows = choices.start.shape[0] - 1, choices.order.shape[0], expert.shape[0] * size
    rows_before = jnp.arange(rows).reshape(-1, size) - first_row[expert][:, None]  # of the same expert
    place = choices.start[expert][:, None] + rows_before
    filled = place < choices.start[expert + 1][:, None]
    source = jnp.where(filled, choices.order[jnp.minimum(place, total - 1)], total)

    own = jnp.minimum(choices.expert, count - 1)
    slot = first_row[own] + choices.place - choices.start[own]
    # Only with a capacity can a choice lie beyond its expert's last block.
    end_row = jnp.append(first_row[1:], rows)[own]
    return DispatchPlan(jnp.where((choices.expert < count) & (slot < end_row), slot, rows), source, expert)


def block_size(choices: int, count: int) -> int:
    """Return the rows of a block: the largest power of two up to half of the mean load of an expert, at least 1.

    256 choices among 8 experts are 32 per expert and make blocks of 16 rows. Smaller blocks read matrices more often,
    larger ones multiply more padding. A single token makes blocks of one row, so that only the matrices of its chosen
    experts are read.
    """
    return min(LARGEST_BLOCK, 2 ** int(math.log2(max(1, choices / count / 2))))


def capacity_of(choices: int, tokens: int, count: int, factor: float) -> int:
    """Return the capacity of an expert in rows: ceil(factor · choices / count), from 1 to the number of tokens."""
    rows = math.ceil(factor * choices / count - 1e-9)  # 1.1 · 10 is 11, not 11.000000000000002
    return min(tokens, max(1, rows))


def through_experts(
    x: Float[Array, "tokens d_model"],
    chosen: Int[Array, "tokens top_k"],
    real: Bool[Array, " tokens"],
    count: int,
    feed_forward: Callable[[Array, Callable[[Array, Matrices], Array]], Array],
    capacity_factor: float | None = None,
    form: Form | None = None,
) -> tuple[Float[Array, "tokens top_k d_model"], Bool[Array, "tokens top_k"]]:
    """Return the output of every chosen expert for its token, and whether the choice was computed.

    A choice that was dropped, or of a padding token, gives zeros; x must be finite there.

    feed_forward(rows, product) applies the experts, each to its rows, by product(rows, weights [count, d_in, d_out]).
    capacity_factor: None drops nothing. form: of the products where nothing is dropped and no mesh splits the experts;
    None: the backend's.
    """
    tokens, top_k = chosen.shape
    total, parts = tokens * top_k, parts_of("experts", count)
    choices = sort_choices(chosen, real, count)
    form = form or form_for_backend()

    def by_token(by_choice: Array) -> Array:
        """Reshape [choices, …] to [tokens, top_k, …]; choices are numbered choice-major."""
        return jnp.swapaxes(by_choice.reshape(top_k, tokens, *by_choice.shape[1:]), 0, 1)

    if capacity_factor is None and form == "ragged" and parts == 1:
        # Every row must belong to a group: padding joins the last expert.
        sizes = jnp.diff(choices.start.at[-1].set(total)).astype(jnp.int32)
        y = feed_forward(x[choices.order % tokens], lambda rows, weights: ragged_product(rows, weights, sizes))
        y = jnp.where((choices.expert < count)[:, None], y[choices.place], 0)
        return by_token(y), jnp.broadcast_to(real[:, None], chosen.shape)

    axes: tuple[str | None, ...]
    if capacity_factor is not None:
        plan = plan_capacity(choices, capacity_of(total, tokens, count, capacity_factor))
        axes = ("experts", "rows", None)

        def product(rows: Array, weights: Matrices) -> Array:
            return own_product(rows, weights)

    elif form == "loop" and parts == 1:
        plan = plan_blocks(choices, block_size(total, count))
        axes = (None, "rows", None)

        def product(rows: Array, weights: Matrices) -> Array:
            return loop_product(rows, weights, plan.expert)

    else:
        most, multiple = tokens * min(top_k, count // parts), parts_of("blocks") // parts
        plan = plan_blocks(choices, block_size(total, count), parts, most, multiple)
        axes = ("blocks", None, None)

        def product(rows: Array, weights: Matrices) -> Array:
            return _product_by_part(rows, weights, plan.expert, parts)

    token = jnp.where(plan.source < total, plan.source % tokens, tokens)
    rows = constrain(x.at[token].get(mode="fill", fill_value=0), *axes)
    y = constrain(feed_forward(rows, product), *axes)
    y = y.reshape(-1, y.shape[-1]).at[plan.slot].get(mode="fill", fill_value=0)
    return by_token(y), by_token(plan.slot < plan.source.size)


def _product_by_part(
    rows: Float[Array, "blocks size d_in"],
    weights: Matrices,
    expert: Int[Array, " blocks"],
    parts: int,
) -> Float[Array, "blocks size d_out"]:
    """Return `batched_product` with each part of the blocks gathering from its own part of the matrices.

    Four blocks of the experts [0, 1, 2, 3] in two parts are two products with two matrices each, of the experts
    [[0, 1], [0, 1]] within a part.
    """
    if parts == 1:
        return batched_product(rows, weights, expert)

    def by_part(array: Any) -> Any:
        """Reshape [parts · n, …] to [parts, n, …]."""
        return array.reshape(parts, -1, *array.shape[1:])

    weights = jax.tree.map(by_part, weights)
    experts_of_part = jax.tree.leaves(weights)[0].shape[1]
    index = by_part(expert) % experts_of_part
    y = jax.vmap(batched_product)(by_part(rows), weights, index)
    return y.reshape(*rows.shape[:-1], -1)
