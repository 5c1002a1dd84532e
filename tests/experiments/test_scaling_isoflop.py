"""IsoFLOP valleys: known minima are found, broken valleys are rejected with the reason."""

import numpy as np
import pytest

from experiments.scaling import fit_isoflop
from experiments.scaling.valleys.isoflop import group_budgets
from model.errors import InputError

BUDGETS = np.geomspace(1e15, 1e18, 4)
FACTORS = np.geomspace(1 / 4, 4, 7)


def ladder(budgets=BUDGETS, factors=FACTORS, a=0.47, noise=0.0, seed=0, depth=0.06):
    """Exact parabolas in log N whose minima follow N* = 0.3·C^a."""
    rng = np.random.default_rng(seed)
    C = np.repeat(budgets, len(factors))
    best = 0.3 * C**a
    N = best * np.tile(factors, len(budgets))
    loss = 2 + 50 * C**-0.1 + depth * np.log(N / best) ** 2
    return {"params": N, "tokens": C / 6 / N, "loss": loss * np.exp(rng.normal(0, noise, len(C)))}


def test_recovers_exact_valleys():
    runs = ladder()
    for fit in (fit_isoflop(**runs), fit_isoflop(flops=6 * runs["params"] * runs["tokens"], **runs)):
        assert fit.a == pytest.approx(0.47, rel=1e-6)
        assert fit.b == pytest.approx(0.53, rel=1e-6)
        assert fit.rejected == []
        for best, budget in zip(fit.optima, BUDGETS, strict=True):
            assert best["flops"] == pytest.approx(budget)
            assert best["params"] == pytest.approx(0.3 * budget**0.47)
            assert best["params"] * best["tokens"] * 6 == pytest.approx(budget)
            assert best["loss"] == pytest.approx(2 + 50 * budget**-0.1)
            assert best["curvature"] == pytest.approx(0.06)
        assert fit.optimal(1e20).params == pytest.approx(0.3 * 1e20**0.47)
        assert fit.optimal(np.array([1e19, 1e20])).tokens.shape == (2,)


def test_given_flops_need_not_be_six_n_d():
    runs = ladder()
    fit = fit_isoflop(flops=9 * runs["params"] * runs["tokens"], **runs)
    assert fit.optima[0]["flops"] == pytest.approx(1.5 * BUDGETS[0])
    assert fit.optima[0]["params"] * fit.optima[0]["tokens"] * 6 == pytest.approx(BUDGETS[0])


def test_budgets_within_five_per_cent_are_one():
    flops = np.array([1.0, 1.04, 1.2, 1.26, 1.0, 2.0])
    assert [list(group) for group in group_budgets(flops)] == [[0, 1, 4], [2, 3], [5]]
    chain = 1.03 ** np.arange(20)
    assert max(chain[g].max() / chain[g].min() for g in group_budgets(chain)) <= 1.05**2
    runs = ladder()
    runs["tokens"] = runs["tokens"] * np.tile([1.02, 0.98, 1.01, 1, 0.99, 1.02, 0.98], 4)
    assert len(fit_isoflop(**runs).optima) == 4


def joined(*parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in ("params", "tokens", "loss")}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (ladder([1e19], [1.1, 1.5, 2, 3]), "smallest size"),
        (ladder([1e19], [0.2, 0.4, 0.8]), "largest size"),
        (ladder([1e19], [0.5, 2]), "2 model sizes"),
        (ladder([1e19], [1]), "1 model size "),
        (ladder([1e19], FACTORS, depth=-0.06), "edge"),
    ],
)
def test_broken_valleys_are_rejected_with_the_reason_and_change_nothing(broken, reason):
    fit = fit_isoflop(**joined(ladder(), broken))
    assert len(fit.optima) == 4
    assert len(fit.rejected) == 1
    assert fit.rejected[0]["flops"] == pytest.approx(1e19)
    assert reason in fit.rejected[0]["reason"]
    assert fit.a == pytest.approx(0.47, rel=1e-6)


def test_a_concave_curve_and_a_vertex_outside_are_rejected():
    C, N = 1e19, np.array([1e8, 2e8, 4e8, 8e8, 1.6e9])
    for loss, reason in (
        ([2.0, 2.5, 1.9, 2.5, 2.0], "not convex"),
        ([3.0, 2.7, 2.45, 2.2, 2.21], "outside"),
    ):
        fit = fit_isoflop(**joined(ladder(), {"params": N, "tokens": C / 6 / N, "loss": np.array(loss)}))
        assert reason in fit.rejected[0]["reason"]


def test_fewer_than_two_valleys_is_refused_with_the_reasons():
    with pytest.raises(InputError, match=r"1 of 2 budgets.*smallest size"):
        fit_isoflop(**joined(ladder([1e18]), ladder([1e19], [1.1, 2, 3])))
    with pytest.raises(InputError, match="0 of 0"):
        fit_isoflop(params=[], tokens=[], loss=[])


def test_order_and_duplicates_do_not_matter():
    runs = ladder(noise=0.002)
    order = np.random.default_rng(0).permutation(len(runs["loss"]))
    shuffled = {key: np.append(values[order], values[0]) for key, values in runs.items()}
    fit, again = fit_isoflop(**runs), fit_isoflop(**shuffled)
    assert (fit.a, fit.optima, fit.intervals) == (again.a, again.optima, again.intervals)
    assert len(again.dropped) == 1


@pytest.mark.parametrize("sizes", [5, pytest.param(7, marks=pytest.mark.long)])
def test_intervals_cover_the_truth(sizes):
    """A hundred noisy ladders, also with only five runs a budget, where resampling runs would degenerate."""
    inside = {80: 0, 95: 0}
    for seed in range(100):
        fit = fit_isoflop(
            **ladder(factors=np.geomspace(1 / 4, 4, sizes), noise=0.002, seed=seed), bootstraps=200, seed=seed
        )
        for level in inside:
            low, high = fit.intervals["a"][level]
            inside[level] += low <= 0.47 <= high
    assert 85 <= inside[95] <= 99
    assert 70 <= inside[80] <= 92


def test_intervals_are_nested_reproducible_and_refused_without_noise_to_see():
    fit = fit_isoflop(**ladder(noise=0.002))
    (low80, high80), (low95, high95) = fit.intervals["a"][80], fit.intervals["a"][95]
    assert low95 <= low80 < fit.a < high80 <= high95
    assert fit.broken_draws == 0
    low, high = fit.optimal_interval(np.array([1e17, 1e20]))["params"]
    assert (np.diff(np.log(high / low)) > 0).all(), "wider where extrapolated"
    with pytest.raises(InputError, match="just three runs"):
        _ = fit_isoflop(**ladder(factors=[0.5, 1.1, 2])).intervals
