"""IsoFLOP valleys: known minima are found, broken valleys are rejected with the reason."""

import numpy as np
import pytest

from experiments.scaling import fit_isoflop
from experiments.scaling.fit import fit_both, isoflop_warnings
from experiments.scaling.known_laws import CLEAN, TRUTH, simulate
from experiments.scaling.known_valleys import CLOUD_KINDS, cloud
from experiments.scaling.law.intervals import own_interval_warnings
from experiments.scaling.rows.table import clean
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
            assert best.flops == pytest.approx(budget)
            assert best.params == pytest.approx(0.3 * budget**0.47)
            assert best.params * best.tokens * 6 == pytest.approx(budget)
            assert best.loss == pytest.approx(2 + 50 * budget**-0.1)
            assert best.curvature == pytest.approx(0.06)
        assert fit.optimal(1e20).params == pytest.approx(0.3 * 1e20**0.47)
        assert fit.optimal(np.array([1e19, 1e20])).tokens.shape == (2,)


def test_given_flops_need_not_be_six_n_d():
    runs = ladder()
    fit = fit_isoflop(flops=9 * runs["params"] * runs["tokens"], **runs)
    assert fit.optima[0].flops == pytest.approx(1.5 * BUDGETS[0])
    assert fit.optima[0].params * fit.optima[0].tokens * 6 == pytest.approx(BUDGETS[0])


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
    assert fit.rejected[0].flops == pytest.approx(1e19)
    assert reason in fit.rejected[0].reason
    assert fit.a == pytest.approx(0.47, rel=1e-6)


def test_a_concave_curve_and_a_vertex_outside_are_rejected():
    C, N = 1e19, np.array([1e8, 2e8, 4e8, 8e8, 1.6e9])
    for loss, reason in (
        ([2.0, 2.5, 1.9, 2.5, 2.0], "not convex"),
        ([3.0, 2.7, 2.45, 2.2, 2.21], "outside"),
    ):
        fit = fit_isoflop(**joined(ladder(), {"params": N, "tokens": C / 6 / N, "loss": np.array(loss)}))
        assert reason in fit.rejected[0].reason


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


def test_the_default_is_the_spline_which_is_right_where_the_parabola_is_not():
    """Windows off centre, no noise: a parabola's exponent is wrong by 9e-4."""
    runs, _ = simulate(CLEAN[1], 0)
    fit = fit_isoflop(**runs)
    assert fit.method == "spline"
    assert fit.a == pytest.approx(TRUTH["a"], rel=1e-4)
    document = fit_both(clean(**ladder(noise=0.002)), bootstraps=30).document()["isoflop"]
    assert document["method"] == "spline"
    assert list(document["methods"]) == ["spline", "skewed", "parabola"]
    for name, found in document["methods"].items():
        assert found["method"] == name
        assert found["a"] == pytest.approx(0.47, abs=0.03)
        assert found["a"] + found["b"] == pytest.approx(1)
        assert found["intervals"]["a"]["95"][0] < found["intervals"]["b"]["95"][1]
        assert len(found["optima"]) == 4
    assert {name: document[name] for name in ("a", "b", "intervals")} == {
        name: document["methods"]["spline"][name] for name in ("a", "b", "intervals")
    }


def test_the_spline_bends_only_where_runs_ask_for_it():
    """Of exact parabolas with noise, one in twenty may be given a bend by chance; a kink asks for one."""
    bent = 0
    for seed in range(30):
        runs = ladder(factors=FACTORS[1:-1], noise=0.002, seed=seed)
        bent += abs(fit_isoflop(**runs).a - fit_isoflop(**runs, method="parabola").a) > 1e-6
    assert bent <= 4
    runs = ladder(noise=1e-4)
    best = 0.3 * (6 * runs["params"] * runs["tokens"]) ** 0.47
    runs["loss"] = runs["loss"] + 0.1 * np.maximum(np.log(best / runs["params"]) - 0.5, 0)
    assert fit_isoflop(**runs).shape.smoothing < 1


def test_a_valley_that_only_a_parabola_misses_is_found_by_the_default():
    """A long slope with a bend at its end, the minimum at 0.3·C^a: a parabola's vertex lies beyond the sizes."""
    C = np.repeat(BUDGETS[:3], 9)
    best = 0.3 * C**0.47
    N = best * np.tile(np.exp([-4.0, -3.4, -2.8, -2.2, -1.6, -1.0, -0.4, 0.1, 0.4]), 3)
    u = np.log(N / best) + 0.15
    runs = {"params": N, "tokens": C / 6 / N, "loss": 2 + 50 * C**-0.1 + 0.1 * np.sqrt(u**2 + 0.04) - 0.06 * u}
    with pytest.raises(InputError, match=r"0 of 3 budgets.*the parabola's minimum"):
        fit_isoflop(**runs, method="parabola")
    fit = fit_isoflop(**runs)
    assert fit.a == pytest.approx(0.47, abs=1e-6)
    assert fit.optima[0].params == pytest.approx(best[0], rel=0.3), "nearer than the next size"


@pytest.mark.parametrize("kind", CLOUD_KINDS)
@pytest.mark.parametrize("runs", [30, 200, 1000])
def test_a_cloud_of_runs_has_no_budgets(kind, runs):
    for seed in range(4):
        with pytest.raises(InputError, match="share no budgets" if runs > 30 else "budgets"):
            fit_isoflop(**cloud(kind, runs, seed))


def test_compute_of_few_digits_makes_no_budgets():
    runs = cloud("6ND", 300, 0)
    flops = np.array([float(f"{value:.1e}") for value in 6 * runs["params"] * runs["tokens"]])
    assert len(np.unique(flops)) < 210
    with pytest.raises(InputError, match="share no budgets"):
        fit_isoflop(**runs, flops=flops)


@pytest.mark.parametrize("sizes", [3, 5, 30])
@pytest.mark.parametrize("apart", [1.5, 10.0])
@pytest.mark.parametrize("more", ["nothing", "a stray run", "seeds", "unequal numbers"])
def test_budgets_are_recognised(sizes, apart, more):
    """Few sizes or many, budgets 1.5 times apart, compute that differs by up to 5 % within one."""
    rng = np.random.default_rng(sizes)
    runs = ladder(1e17 * apart ** np.arange(5), np.geomspace(1 / 4, 4, sizes) * 1.05)
    runs["tokens"] = runs["tokens"] * rng.uniform(0.976, 1.024, len(runs["loss"]))
    if more == "a stray run":
        runs = joined(runs, ladder([1e17 * apart**1.5], [1.0]))
    elif more == "seeds":
        runs = joined(runs, runs | {"loss": runs["loss"] * 1.001}, runs | {"loss": runs["loss"] * 0.999})
    elif more == "unequal numbers" and sizes > 3:
        runs = {name: np.delete(values, [0, 2 * sizes, 3 * sizes - 1]) for name, values in runs.items()}
    fit = fit_isoflop(**runs)
    assert [valley.flops for valley in fit.accepted] == pytest.approx(1e17 * apart ** np.arange(5), rel=0.03)
    assert fit.a == pytest.approx(0.47, abs=0.02)


def test_budgets_are_found_inside_a_cloud():
    """Runs of other experiments in the same table: the six budgets come back, and the rest has its reason."""
    budgets = np.geomspace(1e18, 1e21, 6)
    valleys, _ = simulate(CLEAN[0], 0)
    others = cloud("6ND", 150, 1)
    fit = fit_isoflop(**joined(valleys, others))
    assert fit.a == pytest.approx(TRUTH["a"], abs=0.02)
    assert [valley.flops for valley in fit.accepted] == pytest.approx(budgets, rel=0.03)
    assert any("by chance" in row.reason for row in fit.rejected)


def test_an_estimate_outside_its_own_interval_is_warned_of():
    intervals = {"a": {80: (0.41, 0.45), 95: (0.39, 0.47)}, "b": {80: (0.5, 0.6), 95: (0.4, 0.7)}}
    assert own_interval_warnings({"a": 0.42, "b": 0.5}, intervals) == []
    (text,) = own_interval_warnings({"a": 0.40, "b": 0.5}, intervals)
    assert text.startswith("a = 0.4 is outside its own 80 % interval, 0.41 … 0.45")
    assert "95 % interval" in own_interval_warnings({"a": 0.38}, intervals)[0]
    fit = fit_isoflop(**ladder(noise=0.002), bootstraps=100)
    assert not [text for text in isoflop_warnings(fit) if "its own" in text]
    fit.draws[:, 1] += 0.3
    del fit.__dict__["intervals"]
    (text,) = [text for text in isoflop_warnings(fit) if "its own" in text]
    assert text.startswith(f"a = {fit.a:.4g} is outside its own 95 % interval")
