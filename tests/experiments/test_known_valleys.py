"""A small version of `experiments.scaling.known_valleys`: the truths it measures against, and its verdicts."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from experiments.scaling import fit_isoflop, known_valleys
from experiments.scaling.known_valleys import CLOUDS, SHAPES, simulate, study, summarise


@pytest.mark.parametrize("shape", SHAPES[:6], ids=lambda shape: shape.name)
def test_the_truth_is_the_minimum_of_each_budget(shape):
    """Of the law that `simulate` draws from, found by SciPy along each budget: N* ∝ C^a, and runs on both sides."""
    clean = simulate(replace(shape, noise=0.0), 0)
    flops = 6 * clean["params"] * clean["tokens"]
    columns = np.stack([clean["params"] ** -shape.alpha, clean["tokens"] ** -shape.beta], axis=1)
    A, B = np.linalg.lstsq(columns, clean["loss"] - known_valleys.FLOOR, rcond=None)[0]
    budgets = np.exp(np.unique(np.log(flops).round(6)))
    minima = [
        minimize_scalar(
            lambda x, C=budget: A * np.exp(-shape.alpha * x) + B * (C / 6 / np.exp(x)) ** -shape.beta,
            bounds=(10, 30),
            method="bounded",
            options={"xatol": 1e-10},
        ).x
        for budget in budgets
    ]
    assert np.polyfit(np.log(budgets), minima, 1)[0] == pytest.approx(shape.a, abs=1e-5)
    for budget, minimum in zip(budgets, minima, strict=True):
        sizes = np.log(clean["params"][np.abs(np.log(flops / budget)) < 1e-3])
        assert sizes.min() + 0.5 < minimum < sizes.max() - 0.5
    assert fit_isoflop(**clean, bootstraps=1).a == pytest.approx(shape.a, abs=0.01)


def test_a_study_measures_every_shape_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(known_valleys, "SHAPES", SHAPES[:2])
    monkeypatch.setattr(known_valleys, "CLOUDS", CLOUDS[:2])
    ledger = tmp_path / "trials.jsonl"
    document = study(3, 20, ledger=ledger)
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == 3 * 3
    monkeypatch.setattr(known_valleys, "_job", lambda job: pytest.fail(f"{job} was done before"))
    assert study(3, 20, ledger=ledger) == document
    assert [row["with_budgets"] for row in document["clouds"]] == [0] * 6
    for row in document["shapes"]:
        assert set(row["methods"]) == {"spline", "skewed", "parabola"}
        assert all(found["error"] < 0.05 for found in row["methods"].values())
    assert "0 of 3 clouds of 100 runs (flops) yield budgets" in known_valleys.show(document)


def test_the_verdict_compares_the_default_with_the_best_on_the_same_experiments():
    def trials(errors):
        return [
            {"error": e, "outside": False, "intervals": {"80": [e - 1, e + 1], "95": [e - 2, e + 2]}} for e in errors
        ]

    noise = np.array([-1.0, 1.0, -1.0, 1.0])
    refusal = {"refused": "no"}
    found = {"spline": [*trials(2 * noise), refusal], "skewed": trials([*noise, 99]), "parabola": trials([*noise, 9])}
    row = summarise(SHAPES[0], found)
    assert row["experiments"] == 4
    assert row["methods"]["spline"]["refused"] == 1
    assert row["methods"]["skewed"]["error"] == pytest.approx(1)
    assert row["methods"]["spline"]["coverage_80"] == 0
    assert row["methods"]["spline"]["coverage_95"] == 1
    assert row["loss_of_default_over_spread"] == pytest.approx(1 / np.std(2 * noise, ddof=1))
    assert not row["met"]
