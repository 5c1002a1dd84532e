"""Dispatch to experts: all forms of the products agree, blocks hold every choice once and in order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.dispatch import block_size, plan_blocks, plan_capacity, sort_choices, through_experts
from model.grouped import batched_product, loop_product, ragged_product

D_MODEL, D_FF, SIZE = 8, 12, 11
REAL = np.arange(SIZE) < 9
FORMS = ("loop", "batched", "ragged")


def assert_close(left, right, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def case(count, top_k, seed=0):
    """Tokens, their experts, gates, and the experts' matrices."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    skew = np.linspace(0, 2, count)  # some experts are chosen often, some perhaps never
    chosen = np.argsort(random.normal(size=(SIZE, count)) + skew, axis=1)[:, -top_k:].astype(np.int32)
    weights = {"up": normal(count, D_MODEL, D_FF), "down": normal(count, D_FF, D_MODEL)}
    return normal(SIZE, D_MODEL), chosen, normal(SIZE, top_k), weights


def dense(x, chosen, weights):
    """Every expert for every token, then those that were chosen."""
    hidden = jnp.tanh(jnp.einsum("td,edf->tef", x, weights["up"]))
    all_outputs = jnp.einsum("tef,efd->ted", hidden, weights["down"])
    return jnp.where(REAL[:, None, None], jnp.take_along_axis(all_outputs, chosen[..., None], axis=1), 0)


def sparse(form, x, chosen, weights):
    through = lambda rows, product: product(jnp.tanh(product(rows, weights["up"])), weights["down"])
    return through_experts(x, chosen, jnp.asarray(REAL), len(weights["up"]), through, form=form)[0]


@functools.cache
def gradients(form):
    """Of the experts' gated sum, with its value: a compiled program; None: of `dense`."""
    made_by = dense if form is None else functools.partial(sparse, form)

    def total(x, chosen, gates, weights):
        return jnp.sum(jnp.sin(jnp.einsum("tkd,tk->td", made_by(x, chosen, weights), gates)))

    return jax.jit(jax.value_and_grad(total, (0, 2, 3)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "top_k"), [(4, 2), (16, 3)])
def test_every_form_is_the_dense_one(form, count, top_k):
    """With padding, with blocks of several rows, and with more experts than tokens."""
    arguments = case(count, top_k)
    assert_close(gradients(form)(*arguments), gradients(None)(*arguments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_lanes_of_a_vmap_are_solo_runs(form, shared):
    cases = [case(4, 2, seed) for seed in range(3)]
    if shared:
        cases = [(*arguments[:3], cases[0][3]) for arguments in cases]
    stacked = list(jax.tree.map(lambda *leaves: np.stack(leaves), *cases))
    axes = (0, 0, 0, None if shared else 0)
    stacked[3] = cases[0][3] if shared else stacked[3]
    together = jax.jit(jax.vmap(gradients(form), in_axes=axes))(*stacked)
    for lane, arguments in enumerate(cases):
        assert_close(jax.tree.map(lambda leaf, lane=lane: leaf[lane], together), gradients(form)(*arguments))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_in_the_precision_of_its_rows(form):
    x, *others = case(4, 2)
    high = gradients(None)(x, *others)[1]
    low = gradients(form)(x.astype(jnp.bfloat16), *others)[1]
    assert low[0].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in low[2].values())
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_second_derivatives_are_those_of_the_plain_product():
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    arguments, group = (normal(5, 1, 4), normal(3, 4, 5)), jnp.array([0, 0, 2, 2, 2])

    def slope(product):
        loss = lambda rows, weights: jnp.sum(jnp.sin(product(rows, weights)))
        norm = lambda rows, weights: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(rows, weights))
        return jax.jit(jax.grad(norm, (0, 1)))(*arguments)

    plain = slope(lambda rows, weights: batched_product(rows, weights, group))
    assert_close(slope(lambda rows, weights: loop_product(rows, weights, group)), plain)
    sizes = jnp.array([2, 0, 3])
    assert_close(slope(lambda rows, weights: ragged_product(rows[:, 0], weights, sizes)[:, None]), plain)


@functools.partial(jax.jit, static_argnums=2)
def block_plan(chosen, real, count):
    return plan_blocks(sort_choices(chosen, real, count), block_size(chosen.size, count))


@pytest.mark.parametrize(("size", "top_k", "count"), [(1, 1, 8), (1, 4, 4), (37, 2, 3), (64, 2, 8), (300, 1, 2)])
def test_blocks_hold_every_choice_once_whatever_the_balance(size, top_k, count):
    random = np.random.default_rng(size)
    for skew in (0.0, 1.0, 50.0):
        draw = random.normal(size=(size, count)) + skew * np.arange(count)
        chosen = np.argsort(draw, axis=1)[:, -top_k:].astype(np.int32)
        real = random.uniform(size=size) < 0.8
        slot, source, expert = (np.asarray(part) for part in block_plan(chosen, real, count))
        for choice in range(size * top_k):
            token, rank = choice % size, choice // size
            if not real[token]:
                assert slot[choice] == source.size
                continue
            assert source.flat[slot[choice]] == choice
            assert expert[slot[choice] // source.shape[1]] == chosen[token, rank]
        assert (source < size * top_k).sum() == real.sum() * top_k


def test_one_token_reads_only_its_experts():
    """Blocks of one row, as many as choices: the cost of a decode step does not grow with the number of experts."""
    plan = block_plan(np.array([[5, 90, 17]], np.int32), np.ones(1, bool), 128)
    assert plan.source.shape == (3, 1)
    assert plan.expert.tolist() == [5, 17, 90]


def test_an_expert_takes_first_choices_before_second_ones_up_to_its_capacity():
    """Six tokens: expert 0 is the first choice of three and the second of the others; it has room for four."""
    chosen = jnp.array([[1, 0], [0, 2], [1, 0], [0, 3], [2, 0], [0, 1]])
    plan = jax.jit(lambda chosen: plan_capacity(sort_choices(chosen, jnp.ones(6, bool), 4), capacity=4))(chosen)
    taken = np.asarray(plan.slot < plan.source.size).reshape(2, 6)
    assert taken[0].all()
    assert taken[1].tolist() == [True, True, False, True, False, True]
    assert plan.source[0].tolist() == [1, 3, 5, 6 + 0]
