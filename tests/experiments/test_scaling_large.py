"""Large tables: the fit is of every row, what is thinned is said, and nothing grows with the square of the rows."""

import tracemalloc

import numpy as np
import pytest

from experiments.report.style import svg
from experiments.scaling import fit_isoflop, fit_parametric
from experiments.scaling.figures import laws
from experiments.scaling.forms.choose import choose
from experiments.scaling.known_tables import TRUTH
from experiments.scaling.large_tables import table
from experiments.scaling.law.intervals import draw_counts
from experiments.scaling.rows.table import clean


@pytest.fixture(scope="module")
def large():
    columns = table("cloud", 8000)
    return columns, fit_parametric(**columns, bootstraps=200)


def test_the_law_is_fitted_to_every_row_and_its_intervals_narrow_with_the_root_of_the_rows(large):
    columns, fit = large
    assert len(fit.table) == 8000
    assert fit.gradient < 1e-9, "at the minimum of all rows, not of the sample that chose the start"
    x = np.abs(np.log(fit.predict(columns["params"], columns["tokens"]) / columns["loss"]))
    assert np.where(x <= 1e-3, x**2 / 2, 1e-3 * (x - 5e-4)).sum() == pytest.approx(fit.objective, rel=1e-9)
    assert "4 separate samples of 2,000 runs" in fit.thinned
    small = fit_parametric(**{name: values[:2000] for name, values in columns.items()}, bootstraps=200)
    assert small.thinned is None
    for name in ("E", "alpha", "beta", "a"):
        low, high = fit.intervals[name][95]
        assert low < getattr(fit, name) < high
        assert low - (high - low) < TRUTH[name] < high + (high - low)
        below, above = small.intervals[name][95]
        assert (high - low) / (above - below) == pytest.approx(0.5, abs=0.12), name


def test_resamples_take_no_square_of_the_rows():
    """50,000 rows, all different, once took 20 GB here."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(2, 20_000))
    tracemalloc.start()
    counts = draw_counts(list(columns), 5, rng, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts.sum(1).tolist() == [20_000, 20_000]
    assert peak < 2e7
    few = draw_counts((np.repeat([1.0, 2.0, 3.0], 2), np.arange(6.0)), 3, rng, 50)
    assert all(len(np.unique(np.repeat([1, 2, 3], 2)[row > 0])) == 3 for row in few), "all three values are drawn"


def test_valleys_of_large_budgets_use_fewer_runs_and_say_so():
    columns = table("ladder", 8000)
    fit = fit_isoflop(**columns, method="spline", bootstraps=20)
    assert [len(valley.loss) for valley in fit.valleys] == [400] * 10
    assert "4,000 of 8,000 runs, at most 400 of a budget" in fit.thinned
    assert fit.a == pytest.approx(TRUTH["a"], abs=0.01)
    for valley in fit.valleys:
        inside = np.isclose(6 * columns["params"] * columns["tokens"], valley.flops)
        assert valley.params.min() == columns["params"][inside].min()
        assert valley.params.max() == columns["params"][inside].max()
    assert fit_isoflop(**table("ladder", 1000), bootstraps=1).thinned is None


def test_forms_are_compared_on_a_sample_and_say_so():
    choice = choose(clean(**table("cloud", 3000)), ("chinchilla", "no-floor"), bootstraps=5)
    assert (choice.winner, choice.held_out.runs, choice.held_out.of_runs) == ("chinchilla", 2000, 3000)
    assert "2,000 of 3,000 runs" in choice.thinned


def test_figures_of_many_runs_stay_small(large):
    figures = laws.residuals(large[1])
    for figure in figures:
        assert figure.axes[0].get_title(loc="right").endswith(", 2,000 of 8,000 runs")
    assert sum(len(svg(figure, "residuals")) for figure in figures) < 1_500_000
