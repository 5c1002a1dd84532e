"""Selection without a sort selects what a sort would, over many blocks of tokens, among equals and with rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.sampling.selection import argmax, draw, first_to_reach, ordered, total

VOCAB = 3001
select = jax.jit(lambda values, weights, target: first_to_reach(ordered(values), weights, target))


def rows_of(seed):
    """Rows with few and with many ties."""
    values = np.random.default_rng(seed).normal(size=(4, VOCAB)).astype(np.float32)
    values[1] = values[1].round(1)
    values[2] = np.abs(values[2]).round()
    values[3] = 1
    return jnp.asarray(values)


def test_integers_have_the_order_of_the_floats():
    values = np.array([-np.inf, -3e38, -1, -1e-30, -0.0, 0.0, 1e-30, 1, 3e38, np.inf], np.float32)
    integers = np.asarray(ordered(jnp.asarray(values[None])))[0]
    assert (np.diff(integers.astype(np.int64)) > 0).sum() == 8
    assert integers[4] == integers[5]


@pytest.mark.parametrize("seed", range(3))
def test_the_first_to_reach_are_those_of_a_stable_sort(seed):
    values = rows_of(seed)
    weights = jnp.exp(values)
    whole = np.asarray(total(weights))
    for fraction in (1e-4, 0.3, 0.9, 0.999):
        target = jnp.asarray(fraction * whole, jnp.float32)
        kept = np.asarray(select(values, weights, target))
        for row, value, weight, least in zip(kept, values, np.float64(weights), np.asarray(target), strict=True):
            order = np.argsort(-np.asarray(value), kind="stable")
            count = row.sum()
            np.testing.assert_array_equal(np.flatnonzero(row), np.sort(order[:count]))
            reached, slack = weight[order].cumsum(), 1e-6 * weight.sum()
            assert reached[count - 1] >= least - slack
            assert count == 1 or reached[count - 2] < least + slack, "one fewer would not reach it"


def test_sums_stay_exact_over_wide_rows():
    values = np.random.default_rng(0).random((2, 150_001)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(total)(values), values.sum(-1, dtype=np.float64), rtol=3e-7)


def test_argmax_is_the_first_of_equals():
    values = jnp.concatenate([rows_of(0), jnp.full((1, VOCAB), -jnp.inf)])
    np.testing.assert_array_equal(jax.jit(argmax)(values), np.asarray(values).argmax(axis=-1))


def test_draws_over_many_blocks_follow_the_weights_and_miss_every_zero():
    """Weights of very different size, in blocks of their own and side by side; the last block is not full."""
    weights = np.zeros(300, np.float32)
    places, shares = [0, 5, 127, 128, 260, 299], np.array([0.5, 1e-3, 0.2, 0.05, 0.2, 0.049])
    weights[places] = 1e6 * shares
    count = 20_000
    drawn = jax.jit(draw)(jax.random.split(jax.random.key(1), count), jnp.broadcast_to(weights, (count, 300)))
    counts = np.bincount(drawn, minlength=300)
    assert counts[places].sum() == count
    expected = count * shares / shares.sum()
    assert ((counts[places] - expected) ** 2 / expected).sum() < 20.5, "chi-square with 5 degrees, p = 0.001"
