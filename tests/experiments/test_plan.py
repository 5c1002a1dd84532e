"""The ladder's plan: budgets kept, valleys with two walls, repeated data marked."""

import math

import pytest

from experiments.scaling.plan import (
    Recipe,
    budgets_from,
    expected_optimum,
    held_out_rung,
    largest_smallest_budget,
    plan_ladder,
)
from model import InputError

RECIPE = Recipe(
    vocab_size=1024,
    batch_size=8,
    seq_len=128,
    tokens_per_epoch=4_000_000,
    proxy_d_model=24,
    proxy_learning_rate=0.04,
)


@pytest.mark.parametrize("smallest", [3e10, 3e11, 1e13, 1e16])
def test_every_valley_has_sizes_on_both_sides_of_the_expected_optimum(smallest):
    budgets = budgets_from(smallest)
    rungs = plan_ladder(RECIPE, budgets)
    for budget in budgets:
        members = [rung for rung in rungs if rung.budget == budget]
        assert len(members) >= 4
        assert sum(rung.params < 0.9 * expected_optimum(budget) for rung in members) >= 1
        assert sum(rung.params > 1.1 * expected_optimum(budget) for rung in members) >= 1
    assert len({rung.d_model for rung in rungs}) <= 9, "neighbouring budgets should share shapes"


def test_books_of_a_rung():
    for rung in plan_ladder(RECIPE, budgets_from(5e10)):
        assert rung.flops == 6.0 * rung.params * rung.tokens
        assert rung.tokens == rung.steps * 8 * 128
        assert abs(rung.flops / rung.budget - 1) < 0.02, "budgets are kept to a step"
        assert rung.epochs == rung.tokens / 4_000_000
        assert rung.repeated == (rung.epochs > 1)
        assert rung.learning_rate == pytest.approx(0.04 * 24 / rung.d_model)


def test_repeated_data_is_marked():
    small = Recipe(1024, 8, 128, 100_000, 24, 0.04)
    assert all(rung.repeated for rung in plan_ladder(small, budgets_from(1e11)))


def test_held_out_run_has_at_least_three_times_the_compute():
    rungs = plan_ladder(RECIPE, budgets_from(4e10))
    for optimal in (1e4, 5e4, 3e5):
        rung = held_out_rung(RECIPE, rungs, optimal)
        assert rung.flops >= 3 * max(other.flops for other in rungs)
        assert abs(math.log(rung.params / optimal)) < 0.3


def test_too_small_a_budget_is_refused():
    with pytest.raises(InputError, match="too small"):
        plan_ladder(RECIPE, [1e8])


def test_budget_by_bisection():
    assert largest_smallest_budget(lambda budget: budget / 1e10, 100) == pytest.approx(1e12, rel=0.03)
