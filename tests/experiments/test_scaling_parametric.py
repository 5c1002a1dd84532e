"""The parametric fit recovers known laws, truly converges, and its intervals mean what they say."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import minimize

from experiments.scaling import fit_parametric
from model.errors import InputError

TRUTHS = {
    "frontier": ({"E": 1.82, "A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}, (4e7, 1e11), (2e8, 1e13)),
    "tiny": ({"E": 2.5, "A": 30.0, "B": 60.0, "alpha": 0.31, "beta": 0.29}, (2e4, 2e6), (2e5, 1e8)),
    "no floor": ({"E": 0.0, "A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}, (4e7, 1e11), (2e8, 1e13)),
}


def runs(name, rows, noise=0.0, seed=0):
    truth, sizes, tokens = TRUTHS[name]
    rng = np.random.default_rng(seed)
    N, D = (np.exp(rng.uniform(*np.log(limits), rows)) for limits in (sizes, tokens))
    loss = truth["E"] + truth["A"] / N ** truth["alpha"] + truth["B"] / D ** truth["beta"]
    return truth, N, D, loss * np.exp(rng.normal(0, noise, rows))


def objective(x, N, D, loss, delta=1e-3):
    """Written apart from the package: log-sum-exp, then the sum of Huber."""
    e, a, b, alpha, beta = x
    predicted = np.logaddexp(np.logaddexp(e, a - alpha * np.log(N)), b - beta * np.log(D))
    r = np.abs(predicted - np.log(loss))
    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()


@pytest.mark.parametrize("name", TRUTHS)
def test_recovers_a_clean_law(name):
    truth, N, D, loss = runs(name, 60)
    fit = fit_parametric(N, D, loss)
    for key, value in truth.items():
        assert getattr(fit, key) == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert fit.a == pytest.approx(truth["beta"] / (truth["alpha"] + truth["beta"]), rel=1e-4)
    assert fit.a + fit.b == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["frontier", "tiny"])
def test_no_independent_optimiser_gets_lower(name, seed):
    """Nelder–Mead knows no gradients, so the kinks that stop L-BFGS early do not stop it."""
    truth, N, D, loss = runs(name, 60, noise=0.01, seed=seed)
    fit = fit_parametric(N, D, loss)
    x = [np.log(fit.E), np.log(fit.A), np.log(fit.B), fit.alpha, fit.beta]
    assert objective(x, N, D, loss) == pytest.approx(fit.objective, rel=1e-9)
    start = np.array([np.log(truth["E"]), np.log(truth["A"]), np.log(truth["B"]), truth["alpha"], truth["beta"]])
    best = np.inf
    for _ in range(4):  # restarts: a simplex that collapsed along a kink opens again
        result = minimize(
            objective,
            start,
            (N, D, loss),
            method="Nelder-Mead",
            options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-9, "fatol": 1e-14, "adaptive": True},
        )
        start, best = result.x, min(best, result.fun)
    assert fit.objective <= best * (1 + 1e-9)
    assert best <= fit.objective * 1.01, "the independent optimiser should come close"
    assert fit.gradient < 1e-9
    assert fit.starts_at_best > fit.starts // 2


def test_objective_is_the_sum_over_rows():
    """Shuffled tables agree to the bit; the objective grows with the rows, as a mean would not."""
    _, N, D, loss = runs("frontier", 60, noise=0.01)
    fit = fit_parametric(N, D, loss, bootstraps=20)
    order = np.random.default_rng(1).permutation(60)
    again = fit_parametric(N[order], D[order], loss[order], bootstraps=20)
    assert (again.theta == fit.theta).all()
    assert again.intervals == fit.intervals
    nearly = fit_parametric(np.tile(N, 2), np.tile(D, 2), np.concatenate([loss, loss * (1 + 1e-12)]))
    assert nearly.objective == pytest.approx(2 * fit.objective, rel=1e-6)
    np.testing.assert_allclose(nearly.theta, fit.theta, rtol=1e-5)


def test_duplicates_and_unusable_rows_are_dropped_and_listed():
    _, N, D, loss = runs("frontier", 30, noise=0.01)
    fit = fit_parametric(N, D, loss)
    dirty = fit_parametric(
        np.append(N, [N[0], 1e9, -1, 1e9]),
        np.append(D, [D[0], 1e9, 1e9, 1e9]),
        np.append(loss, [loss[0], np.nan, 3, 0]),
    )
    assert (dirty.theta == fit.theta).all()
    assert [row.row for row in dirty.table.dropped] == [31, 32, 33, 34]
    assert "duplicate" in dirty.table.dropped[0].reason


@pytest.mark.parametrize("tables", [12, pytest.param(20, marks=pytest.mark.long)])
def test_intervals_cover_the_truth(tables):
    """Noisy tables: 95 % intervals should miss rarely, 80 % ones more often, and neither always nor never."""
    inside = {80: 0, 95: 0}
    names = ("E", "alpha", "beta", "a")
    new = {80: 0, 95: 0}
    for seed in range(tables):
        truth, N, D, loss = runs("frontier", 60, noise=0.01, seed=seed)
        truth = truth | {"a": truth["beta"] / (truth["alpha"] + truth["beta"])}
        fit = fit_parametric(N, D, loss, bootstraps=100, seed=seed)
        rng = np.random.default_rng(1000 + seed)
        at = 1e10, 1e12
        measured = truth["E"] + truth["A"] / at[0] ** truth["alpha"] + truth["B"] / at[1] ** truth["beta"]
        measured *= np.exp(rng.normal(0, 0.01))
        for level in (80, 95):
            inside[level] += sum(fit.intervals[k][level][0] <= truth[k] <= fit.intervals[k][level][1] for k in names)
            low, high = fit.predict_interval(*at, level)
            new[level] += low <= measured <= high
    assert 0.87 <= inside[95] / (4 * tables) <= 1
    assert 0.68 <= inside[80] / (4 * tables) <= 0.97
    assert new[95] >= 0.85 * tables
    assert 0.6 * tables <= new[80] <= tables


def test_intervals_are_reproducible_lazy_and_nested():
    _, N, D, loss = runs("tiny", 40, noise=0.01)
    fit = fit_parametric(N, D, loss, bootstraps=100)
    assert "draws" not in vars(fit), "computed when first asked for"
    for name, by_level in fit.intervals.items():
        (low80, high80), (low95, high95) = by_level[80], by_level[95]
        assert low95 <= low80 <= high80 <= high95, name
    assert fit.intervals == fit_parametric(N, D, loss, bootstraps=100).intervals
    assert fit.intervals != fit_parametric(N, D, loss, bootstraps=100, seed=1).intervals
    low, high = fit.predict_interval(N[:3], D[:3])
    assert low.shape == (3,)
    assert (low < fit.predict(N[:3], D[:3])).all()
    assert (fit.predict(N[:3], D[:3]) < high).all()


def test_the_closed_form_optimum_is_the_lowest_point_of_the_budget():
    _, N, D, loss = runs("frontier", 40)
    fit = fit_parametric(N, D, loss)
    for budget in (1e18, 1e23):
        best = fit.optimal(budget)
        assert 6 * best.params * best.tokens == pytest.approx(budget)
        around = best.params * np.exp(np.linspace(-0.5, 0.5, 101))
        losses = fit.predict(around, budget / 6 / around)
        assert losses.argmin() == 50
        assert losses[50] == pytest.approx(best.loss)
    assert fit.optimal(np.array([1e18, 1e20])).params.shape == (2,)


def test_refuses_what_the_rows_cannot_carry():
    _, N, D, loss = runs("tiny", 20)
    rng = np.random.default_rng(0)
    cases = {
        "usable runs": (N[:5], D[:5], loss[:5]),
        "model sizes": (np.where(N > 1e5, 1e5, 1e6), D, loss),
        "token counts": (N, np.where(D > 1e6, 1e6, 1e7), loss),
        "same loss": (N, D, np.ones(20)),
        "one line": (N, 20 * N, loss),
        "does not fall with N|no power law in N": (N, D, 2 + 60 / D**0.3),
        "differ in length": (N, D[:-1], loss),
        "must be numbers": (N, D, ["low"] * 20),
    }
    for message, columns in cases.items():
        with pytest.raises(InputError, match=message):
            fit_parametric(*columns)
    with pytest.raises(InputError, match="delta"):
        fit_parametric(N, D, loss, delta=0)
    with pytest.raises(InputError, match=r"does not fall|power law"):
        fit_parametric(N, D, loss * (N / 1e5) ** 0.6 * np.exp(rng.normal(0, 0.001, 20)))


def test_importing_the_fits_does_not_import_plotting_or_parquet():
    code = "import sys, experiments.scaling; print([m for m in ('matplotlib', 'pyarrow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
