"""Laws for learning rate and batch size: known laws come back, intervals hold, thin data are refused."""

import json

import numpy as np
import pytest

from experiments.scaling.study.design import Law
from experiments.sweep.analysis.size_law import fit_size_law
from model.errors import InputError

SIZES = np.geomspace(1e6, 1e9, 7)


def test_clean_laws_come_back():
    fit = fit_size_law({"params": SIZES}, 3.0 * SIZES**-0.4)
    assert fit.exponents["params"] == pytest.approx(-0.4, rel=1e-9)
    assert fit.predict(params=1e10) == pytest.approx(3.0 * 1e10**-0.4, rel=1e-9)
    tokens = SIZES[::-1] ** 0.5 * np.array([1, 5, 2, 9, 1, 3, 7]) * 1e6
    both = fit_size_law({"params": SIZES, "tokens": tokens}, 1.8 * SIZES**-0.7 * tokens**0.3)
    assert both.exponents == pytest.approx({"params": -0.7, "tokens": 0.3}, rel=1e-9)
    assert both.predict(params=1e9, tokens=1e11) == pytest.approx(1.8 * 1e9**-0.7 * 1e11**0.3, rel=1e-9)
    found = json.loads(json.dumps(both.document(), allow_nan=False))
    law = Law(*(found[name] for name in ("value", "centre", "exponents")))
    sizes = {"params": 1e9, "tokens": 1e11}
    assert law.at(sizes) == pytest.approx(both.predict(**sizes)), "a study takes it as it is"


@pytest.mark.parametrize(("rows", "known"), [(5, False), (5, True), (2, True)])
def test_intervals_hold_the_truth_as_often_as_they_say(rows, known):
    rng = np.random.default_rng(0)
    covered, predicted, trials, sizes = 0, 0, 600, SIZES[:rows]
    noise = np.array([0.1, 0.3, 0.2, 0.25, 0.15])[:rows] if known else np.full(rows, 0.2)
    new = float((noise**-2.0).mean() ** -0.5)
    for _ in range(trials):
        best = sizes**-0.4 * np.exp(rng.normal(0, noise))
        width = np.stack([best * np.exp(-1.96 * noise), best * np.exp(1.96 * noise)], axis=1)
        fit = fit_size_law({"params": sizes}, best, intervals=width if known else None)
        low, high = fit.interval("params")
        covered += low <= -0.4 <= high
        low, high = fit.predict_interval(params=1e9)
        predicted += low <= 1e9**-0.4 * np.exp(rng.normal(0, new)) <= high
    assert 0.92 <= covered / trials <= 0.98
    assert 0.92 <= predicted / trials <= 0.98


def test_optima_that_scatter_wider_than_they_say_are_believed_less():
    best = SIZES**-0.4 * np.exp([0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5])
    sure = np.stack([best / 1.01, best * 1.01], axis=1)
    low, high = fit_size_law({"params": SIZES}, best, intervals=sure).interval("params")
    assert (low, high) == pytest.approx(fit_size_law({"params": SIZES}, best).interval("params"))


def test_a_wide_interval_counts_little():
    best = SIZES**-0.4
    best[3] *= 3
    width = np.stack([best / 1.05, best * 1.05], axis=1)
    width[3] = best[3] / 10, best[3] * 10
    plain = fit_size_law({"params": SIZES}, best)
    weighted = fit_size_law({"params": SIZES}, best, intervals=width)
    assert abs(weighted.predict(params=1e8) / 1e8**-0.4 - 1) < 0.01 < abs(plain.predict(params=1e8) / 1e8**-0.4 - 1)


def test_a_number_that_is_not_positive_is_left_out_and_listed():
    best = SIZES**-0.4
    best[0] = np.nan
    fit = fit_size_law({"params": SIZES}, best)
    assert fit.exponents["params"] == pytest.approx(-0.4)
    assert fit.dropped == [{"row": 1, "reason": "a number is not positive and finite"}]
    assert fit.rows == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("sizes", "best", "rest", "message"),
    [
        ({"params": []}, [], {}, "0 different sizes"),
        ({"params": [1e6, 1e7]}, [0.1, 0.05], {}, "2 different sizes"),
        ({"params": [1e6]}, [0.1], {"intervals": [(0.05, 0.2)]}, "1 different size .* at least 2"),
        ({"params": [1e6, 1e7, 1e8]}, [np.nan, 0.05, 0.02], {}, "1 of 3 rows left out, the first: a number is not"),
        ({"params": SIZES, "tokens": 20 * SIZES}, SIZES**-0.4, {}, "move together"),
        ({"params": [1e6, 1e7, 1e8], "tokens": [1e8, 5e8, 1e8]}, [0.1, 0.05, 0.02], {}, "3 rows cannot determine 3"),
        ({"params": [1e6, 1e7, 1e8]}, [0.1, 0.05], {}, "one entry per row"),
        ({"params": ["a", "b", "c"]}, [0.1, 0.05, 0.02], {}, "must be numbers"),
    ],
)
def test_refusals_are_one_sentence(sizes, best, rest, message):
    with pytest.raises(InputError, match=message) as refusal:
        fit_size_law(sizes, best, **rest)
    assert "\n" not in str(refusal.value)


def test_a_law_predicts_from_its_own_sizes():
    with pytest.raises(InputError, match="from params"):
        fit_size_law({"params": SIZES}, SIZES**-0.4).predict(d_model=64)
