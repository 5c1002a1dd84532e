"""Bringing tokens to their experts and back: sorting, capacity, blocks.

A choice is one (token, expert) pair. Choices are numbered choice-major, all tokens' first choices before all second
ones, so that first choices have priority where an expert's capacity runs out (GShard, section 2.2). Each gets a slot,
a row of a buffer that is cut into blocks of one expert each: one block of `capacity` rows for every expert, or, where
nothing may be dropped, as many small blocks as the expert needs.

On a mesh that splits the experts, a device's blocks are those of its own experts: tokens travel, matrices stay.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.grouped import Form, Matrices, batched_product, form_for_backend, loop_product, own_product, ragged_product
from model.sharding import constrain, parts_of

LARGEST_BLOCK = 128  # rows; more gains no speed and pads more


class Sorted(NamedTuple):
    """The choices by expert. Those of padding tokens come last and belong to none.

    expert: of every choice; `count` for padding. order: the choices, sorted stably. place: the position of every
    choice in that order. start: where each expert's choices begin in it; the last entry is where padding begins.
    """

    expert: Int[Array, " choices"]
    order: Int[Array, " choices"]
    place: Int[Array, " choices"]
    start: Int[Array, " count_and_1"]


class Plan(NamedTuple):
    """Where every choice stands in a buffer of blocks.

    slot: the row of every choice; blocks · size for one without. source: the choice in every row; the number of
    choices for an empty row. expert: of every block.
    """

    slot: Int[Array, " choices"]
    source: Int[Array, "blocks size"]
    expert: Int[Array, " blocks"]


def sort_choices(chosen: Int[Array, "tokens top_k"], real: Bool[Array, " tokens"], count: int) -> Sorted:
    """Sort the choices among `count` experts."""
    expert = jnp.where(real[:, None], chosen, count).T.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    start = jnp.searchsorted(expert[order], jnp.arange(count + 1))
    return Sorted(expert, order, jnp.argsort(order), start)


def plan_capacity(choices: Sorted, capacity: int) -> Plan:
    """One block per expert; choices beyond its capacity get no slot."""
    count = choices.start.shape[0] - 1
    first_row = capacity * jnp.arange(count)
    return _plan(choices, first_row, jnp.arange(count), capacity)


def plan_blocks(choices: Sorted, size: int, parts: int = 1, most: int | None = None, multiple: int = 1) -> Plan:
    """As many blocks of `size` rows for every expert as its choices fill, the last in part; nobody is left out.

    parts: equal runs of experts, with as many blocks each, a multiple of `multiple`. most: choices that one part can
    get (None: all).
    Σ ceil(n_e / size) over at most min(experts, choices) experts that have any, with Σ n_e = choices, bounds the
    number of blocks.
    """
    count, most = choices.start.shape[0] - 1, choices.order.shape[0] if most is None else most
    experts = count // parts
    blocks = (most + min(experts, most) * (size - 1)) // size
    blocks = -(-blocks // multiple) * multiple
    blocks_of_expert = -(-jnp.diff(choices.start).reshape(parts, experts) // size)
    end = jnp.cumsum(blocks_of_expert, axis=1)
    expert = jax.vmap(lambda end: jnp.searchsorted(end, jnp.arange(blocks), side="right"))(end)
    expert = jnp.minimum(expert, experts - 1) + experts * jnp.arange(parts)[:, None]  # spare blocks stay empty
    first_block = blocks * jnp.arange(parts)[:, None] + end - blocks_of_expert
    return _plan(choices, size * first_block.reshape(-1), expert.reshape(-1), size)


def _plan(choices: Sorted, first_row: Array, expert: Array, size: int) -> Plan:
    """The plan in which an expert's choices fill its blocks in order from its first row on."""
    count, total, rows = choices.start.shape[0] - 1, choices.order.shape[0], expert.shape[0] * size
    # How many choices of its expert stand before each row, and the choice that is next.
    before = jnp.arange(rows).reshape(-1, size) - first_row[expert][:, None]
    place = choices.start[expert][:, None] + before
    filled = place < choices.start[expert + 1][:, None]
    source = jnp.where(filled, choices.order[jnp.minimum(place, total - 1)], total)
    own = jnp.minimum(choices.expert, count - 1)
    slot = first_row[own] + choices.place - choices.start[own]
    # Only with a capacity can a choice stand beyond its expert's last block.
    last_row = jnp.append(first_row[1:], rows)[own]
    return Plan(jnp.where((choices.expert < count) & (slot < last_row), slot, rows), source, expert)


def block_size(choices: int, count: int) -> int:
    """Rows of a block: the power of two up to half of what an expert gets on average, at least 1.

    Smaller blocks read matrices more often, larger ones multiply more padding. Single tokens make blocks of one row:
    only the matrices of chosen experts are then read.
    """
    return min(LARGEST_BLOCK, 2 ** int(math.log2(max(1, choices / count / 2))))


def capacity_of(choices: int, tokens: int, count: int, factor: float) -> int:
    """Rows of an expert, at least 1, from the static number of choices; no expert is chosen by a token twice."""
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
    """What every chosen expert makes of its token, and whether it took it.

    feed_forward(rows, product) applies the experts, each to its rows, by product(rows, weights [count, d_in, d_out]).
    capacity_factor: None drops nothing. form: of the products where nothing is dropped and no mesh splits the experts;
    None: the backend's. A choice that was dropped, or is of a padding token, gives zeros; x must be finite there.
    """
    tokens, top_k = chosen.shape
    total, parts = tokens * top_k, parts_of("experts", count)
    choices = sort_choices(chosen, real, count)
    back = lambda by_choice: jnp.swapaxes(by_choice.reshape(top_k, tokens, *by_choice.shape[1:]), 0, 1)
    form = form or form_for_backend()

    if capacity_factor is None and form == "ragged" and parts == 1:
        # Padding joins the last expert: its rows must belong to some group.
        sizes = jnp.diff(choices.start.at[-1].set(total)).astype(jnp.int32)
        y = feed_forward(x[choices.order % tokens], lambda rows, weights: ragged_product(rows, weights, sizes))
        y = jnp.where((choices.expert < count)[:, None], y[choices.place], 0)
        return back(y), jnp.broadcast_to(real[:, None], chosen.shape)

    names: tuple[str | None, ...]
    if capacity_factor is not None:
        plan = plan_capacity(choices, capacity_of(total, tokens, count, capacity_factor))
        product = own_product
        names = ("experts", "rows", None)
    elif form == "loop" and parts == 1:
        plan = plan_blocks(choices, block_size(total, count))
        product = lambda rows, weights: loop_product(rows, weights, plan.expert)
        names = (None, "rows", None)
    else:
        most, multiple = tokens * min(top_k, count // parts), parts_of("blocks") // parts
        plan = plan_blocks(choices, block_size(total, count), parts, most, multiple)
        product = lambda rows, weights: _product_by_part(rows, weights, plan.expert, parts)
        names = ("blocks", None, None)
    token = jnp.where(plan.source < total, plan.source % tokens, tokens)
    rows = constrain(x.at[token].get(mode="fill", fill_value=0), *names)
    y = constrain(feed_forward(rows, product), *names)
    y = y.reshape(-1, y.shape[-1]).at[plan.slot].get(mode="fill", fill_value=0)
    return back(y), back(plan.slot < plan.source.size)


def _product_by_part(
    rows: Float[Array, "blocks size d_in"],
    weights: Matrices,
    expert: Int[Array, " blocks"],
    parts: int,
) -> Float[Array, "blocks size d_out"]:
    """`batched_product` of every part of the blocks with its own part of the matrices."""
    if parts == 1:
        return batched_product(rows, weights, expert)
    by_part = lambda array: array.reshape(parts, -1, *array.shape[1:])
    by_part_of_all = jax.tree.map(by_part, weights)
    own = by_part(expert) % jax.tree.leaves(by_part_of_all)[0].shape[1]
    y = jax.vmap(batched_product)(by_part(rows), by_part_of_all, own)
    return y.reshape(*rows.shape[:-1], -1)
