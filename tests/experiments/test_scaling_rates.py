"""Laws for learning rate and batch size: known laws come back, intervals hold, thin data are refused."""

import json

import numpy as np
import pytest

from experiments.scaling.forms.rates import fit_rate
from model.errors import InputError

SIZES = np.geomspace(1e6, 1e9, 7)


def test_clean_laws_come_back():
    fit = fit_rate(SIZES, 3.0 * SIZES**-0.4)
    assert fit.exponents["params"] == pytest.approx(-0.4, rel=1e-9)
    assert fit.predict(1e10) == pytest.approx(3.0 * 1e10**-0.4, rel=1e-9)
    tokens = SIZES[::-1] ** 0.5 * np.array([1, 5, 2, 9, 1, 3, 7]) * 1e6
    both = fit_rate(SIZES, 1.8 * SIZES**-0.7 * tokens**0.3, tokens=tokens)
    assert both.exponents == pytest.approx({"params": -0.7, "tokens": 0.3}, rel=1e-9)
    assert both.predict(1e9, 1e11) == pytest.approx(1.8 * 1e9**-0.7 * 1e11**0.3, rel=1e-9)
    json.dumps(both.document(), allow_nan=False)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered, predicted, trials = 0, 0, 400
    for seed in range(trials):
        noise = rng.normal(0, 0.2, 5)
        fit = fit_rate(SIZES[:5], SIZES[:5] ** -0.4 * np.exp(noise), bootstraps=400, seed=seed)
        low, high = fit.intervals["params"][95]
        covered += low <= -0.4 <= high
        low, high = fit.predict_interval(1e9)
        predicted += low <= 1e9**-0.4 * np.exp(rng.normal(0, 0.2)) <= high
    assert 0.91 <= covered / trials <= 0.98
    assert 0.91 <= predicted / trials <= 0.98


def test_a_wide_interval_counts_little():
    best = SIZES**-0.4
    best[3] *= 3
    width = np.stack([best / 1.05, best * 1.05], axis=1)
    width[3] = best[3] / 10, best[3] * 10
    plain, weighted = fit_rate(SIZES, best), fit_rate(SIZES, best, intervals=width)
    assert abs(weighted.predict(1e8) / 1e8**-0.4 - 1) < 0.01 < abs(plain.predict(1e8) / 1e8**-0.4 - 1)


def test_an_optimum_at_the_edge_is_left_out_and_listed():
    best = SIZES**-0.4
    best[0] = 1.0
    fit = fit_rate(SIZES, best, at_edge=np.arange(7) == 0)
    assert fit.exponents["params"] == pytest.approx(-0.4)
    assert fit.dropped == [{"row": 1, "reason": "the optimum is at the edge of the values tried"}]
    assert fit.rows == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": [1e6, 1e7], "best": [0.1, 0.05]}, "2 different sizes"),
        ({"params": [1e6, 1e7, 1e8], "best": [0.1, 0.05, 0.02], "at_edge": [True, False, False]}, "edge of the values"),
        ({"params": SIZES, "best": SIZES**-0.4, "tokens": 20 * SIZES}, "move together"),
        ({"params": [1e6, 1e7, 1e8], "best": [0.1, 0.05, 0.02], "tokens": [1e8, 5e8, 1e8]}, "3 rows cannot carry 3"),
        ({"params": [1e6, 1e7, 1e8], "best": [0.1, 0.05]}, "one entry per row"),
        ({"params": ["a", "b", "c"], "best": [0.1, 0.05, 0.02]}, "must be numbers"),
    ],
)
def test_refusals_are_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message) as refusal:
        fit_rate(**arguments)
    assert "\n" not in str(refusal.value)
