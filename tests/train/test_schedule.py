"""Schedules are their formulas, end where they say, and compile nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import HParams, TrainConfig
from train.config import stack_hparams
from train.phases import Phase
from train.schedule import learning_rate, rate, uses_horizon

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def rates(schedule, steps, **values):
    """[len(steps)] rates."""
    return np.asarray(over_steps(schedule)(HParams(learning_rate=0.01, **values), jnp.array(steps)))


@functools.cache
def over_steps(schedule):
    return jax.jit(jax.vmap(functools.partial(learning_rate, schedule), in_axes=(None, 0)))


def by_hand(schedule, step, peak, warmup, total, decay_fraction, final):
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    if schedule == "constant":
        return peak * warm
    if schedule == "linear":
        return peak * warm * ((1 - progress) + final * progress)
    if schedule == "cosine":
        return peak * warm * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
    decay_start = total * (1 - decay_fraction)
    falling = min(max((step - decay_start) / (total - decay_start), 0.0), 1.0)
    return peak * warm * (1 - falling + final * falling)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_are_their_formulas(schedule):
    steps = (0, 1, 9, 10, 11, 39, 41, 45, 50, 79, 80, 81, 99, 100, 1000)
    compiled = over_steps(schedule)._cache_size()
    for warmup, total, final in ((0, 100, 0.1), (10, 100, 0.0), (40, 50, 0.5)):
        values = {"warmup_steps": warmup, "total_steps": total, "final_fraction": final, "decay_fraction": 0.2}
        expected = [by_hand(schedule, step, 0.01, warmup, total, 0.2, final) for step in steps]
        np.testing.assert_allclose(rates(schedule, steps, **values), expected, rtol=1e-5, atol=1e-9)
    assert over_steps(schedule)._cache_size() == compiled + 1


def test_schedules_end_where_they_say():
    for schedule in ("linear", "cosine", "wsd"):
        made = rates(schedule, (9, 100, 5000), total_steps=100, warmup_steps=10, final_fraction=0.1)
        np.testing.assert_allclose(made, [0.01, 0.001, 0.001], rtol=1e-5)


def test_inverse_sqrt_falls_with_the_root_of_the_step():
    steps = [0, 4, 9, 10, 39, 99, 100, 999, 10**6 - 1]
    expected = [0.01 * min((step + 1) / 10, 1 / math.sqrt((step + 1) / 10)) for step in steps]
    np.testing.assert_allclose(rates("inverse_sqrt", steps, warmup_steps=10, total_steps=100), expected, rtol=1e-5)
    assert expected[2] == 0.01, "the peak is where the warm-up ends"
    without = [0.01 / math.sqrt(step + 1) for step in steps]
    np.testing.assert_allclose(rates("inverse_sqrt", steps), without, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_fraction_is_so_many_steps(schedule):
    steps = [0, 1, 5, 6, 7, 8, 69, 70, 100]
    by_steps = rates(schedule, steps, warmup_steps=7, total_steps=70)
    np.testing.assert_array_equal(rates(schedule, steps, warmup_fraction=0.1, total_steps=70), by_steps)
    both = rates(schedule, steps, warmup_steps=7, warmup_fraction=0.5, total_steps=70)
    np.testing.assert_array_equal(both, by_steps, "a number of steps comes first")
    np.testing.assert_allclose(by_steps[:2], [0.01 / 7, 0.02 / 7], rtol=1e-6)


def test_decay_steps_are_the_length_of_the_cool_down():
    steps = [0, 79, 80, 81, 90, 99, 100, 101, 1000]
    by_fraction = rates("wsd", steps, total_steps=100, decay_fraction=0.2)
    np.testing.assert_allclose(
        rates("wsd", steps, total_steps=100, decay_steps=20, decay_fraction=0.7), by_fraction, rtol=1e-6
    )
    middle = rates("wsd", [995], total_steps=1000, decay_steps=10, final_fraction=0.0)
    np.testing.assert_allclose(middle, [0.005], rtol=1e-5)
    longer_than_the_run = rates("wsd", [0, 50, 100], total_steps=100, decay_steps=10**6, final_fraction=0.0)
    np.testing.assert_allclose(longer_than_the_run, [0.01, 0.005, 0.0], atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lanes_have_schedules_of_their_own(schedule):
    lanes = [
        HParams(warmup_steps=3, total_steps=20, final_fraction=0.2),
        HParams(warmup_fraction=0.25, total_steps=40, decay_steps=5),
    ]
    one = functools.partial(learning_rate, schedule)
    steps = jnp.array([11, 37])
    together = jax.jit(jax.vmap(one))(stack_hparams(lanes), steps)
    for index, hparams in enumerate(lanes):
        np.testing.assert_allclose(together[index], jax.jit(one)(hparams, steps[index]), rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 4}, {"warmup_fraction": 0.1}])
def test_uses_horizon_says_whether_a_rate_moves_with_it(schedule, warmup):
    steps = np.arange(0, 130, 3)
    short, long = (rates(schedule, steps, total_steps=total, **warmup) for total in (60, 120))
    said = uses_horizon(TrainConfig(schedule=schedule), HParams(**warmup))
    assert said == (not np.array_equal(short, long))


def test_phases_come_before_the_schedule():
    phases = (Phase("up", 32, rate="linear"), Phase("down", 64, rate="linear", final=0.0))
    train_config = TrainConfig(batch_size=1, seq_len=8, schedule="cosine", phases=phases)
    hparams = HParams(learning_rate=1.0, total_steps=5, warmup_steps=100)
    of_config = jax.jit(rate, static_argnums=0)
    made = [float(of_config(train_config, hparams, jnp.int32(step))) for step in range(13)]
    np.testing.assert_allclose(made[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(made[4:], [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0], atol=1e-6)
    assert not uses_horizon(train_config, hparams)
    plain = of_config(train_config.replace(phases=()), hparams, jnp.int32(3))
    assert float(plain) == float(jax.jit(learning_rate, static_argnums=0)("cosine", hparams, jnp.int32(3)))
