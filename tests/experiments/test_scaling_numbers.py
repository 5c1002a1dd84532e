"""Arithmetic at its ends: no numerical warning reaches the user, and infinite draws stay infinite."""

import contextlib
import math
import warnings

import numpy as np
import pytest

from experiments.scaling import fit_isoflop, fit_parametric
from experiments.scaling.fit import fit_both
from experiments.scaling.law.intervals import percentile_interval
from experiments.scaling.random_clouds import summarise, trial
from experiments.scaling.rows.table import clean
from experiments.scaling.use import compute_for_loss, optimal, planned_loss
from model.errors import InputError


def awkward(seed):
    """Runs of a ladder or a cloud under a law, a valley or pure noise, with noise from none to larger than the loss."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        flops = np.repeat(10 ** np.sort(rng.uniform(12, 24, 5)), 6)
        params = 10 ** rng.uniform(-1, 1) * (flops / 6) ** rng.uniform(0.3, 0.7) * np.exp(rng.uniform(-3, 3, 30))
        tokens = flops / 6 / params
    else:
        params, tokens = 10 ** rng.uniform(*np.sort(rng.uniform(3, 13, 2)), 30), 10 ** rng.uniform(5, 14, 30)
    law = rng.uniform(0, 3) + 10 ** rng.uniform(0, 4) * params ** -rng.uniform(0.05, 1) + 300 * tokens**-0.3
    valley = 2 + 0.05 * np.log(params / np.median(params)) ** 2
    loss = (law, valley, np.exp(rng.normal(0, 1, 30)), 3 + rng.normal(0, 1e-4, 30))[seed % 4]
    return {"params": params, "tokens": tokens, "loss": loss * np.exp(rng.normal(0, 10 ** rng.uniform(-6, 0), 30))}


@pytest.mark.long
@pytest.mark.slow
def test_no_numerical_warning_escapes_from_awkward_tables():
    """Every estimator with its intervals and answers; a refusal in words is an answer."""

    def attempt(question):
        try:
            return question()
        except InputError:
            return None

    answers = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(24):
            columns = awkward(seed)
            fits = attempt(lambda: fit_both(clean(**columns), bootstraps=20, screen=seed % 3 == 0))  # noqa: B023
            known = {"parametric": fits.parametric, "isoflop": fits.isoflop}
            known = {name: fit for name, fit in known.items() if fit is not None}
            fits.document()
            optimal(known, 1e22)
            answers += len(known)
            if fits.parametric is not None:
                attempt(lambda: compute_for_loss(fits.parametric, 1.05 * fits.parametric.E + 1e-3))  # noqa: B023
                planned_loss(fits.parametric, 1e9, 1e11)
    assert answers > 12


def test_straight_and_steep_valleys_do_not_overflow():
    flops = np.repeat([1e15, 1e16, 1e17, 1e18], 5)
    params = 0.3 * flops**0.5 * np.tile([0.1, 0.3, 1, 3, 10], 4)
    loss = 2 + 1e-9 * np.log(params / (0.3 * flops**0.5)) ** 2 + 1e-7 * np.random.default_rng(0).normal(size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("parabola", "skewed", "spline"):
            with contextlib.suppress(InputError):  # refused in words, or fitted: either without a warning
                _ = fit_isoflop(params=params, tokens=flops / 6 / params, loss=loss, method=method).intervals


def test_percentiles_of_infinite_and_missing_draws():
    draws = np.array([1.0, 2.0, 3.0, math.inf, math.inf, math.inf, math.nan])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert percentile_interval(draws, 80) == (1.5, math.inf)
        assert np.isnan(percentile_interval(np.full(3, math.nan), 95)).all()
        low, high = percentile_interval(np.array([[1.0, math.nan], [3.0, math.nan]]), 100)
    np.testing.assert_array_equal([low, high], [[1, math.nan], [3, math.nan]])


def test_a_target_too_near_the_floor_is_refused_in_words():
    rng = np.random.default_rng(0)
    params, tokens = 10 ** rng.uniform(7, 10, 40), 10 ** rng.uniform(9, 12, 40)
    fit = fit_parametric(params, tokens, 1.7 + 2 * params**-0.05 + 2 * tokens**-0.05, bootstraps=5)
    with pytest.raises(InputError, match=r"so near the law's floor E=1\.7"):
        compute_for_loss(fit, fit.E * (1 + 1e-15))


def test_random_clouds_are_judged_against_their_own_laws():
    trials = [trial(seed, 20) for seed in range(2)]
    assert [one["crash"] for one in trials] == [None, None]
    document = summarise(trials, 20)
    assert document["fitted"] == 2
    assert document["met"]["crashes"]
    wrong = [one | {"crash": "ZeroDivisionError", "budgets": 3} for one in trials]
    met = summarise(wrong, 20)["met"]
    assert (met["crashes"], met["invented_budgets"]) == (False, False)
