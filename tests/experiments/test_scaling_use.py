"""The use of laws: optima that enumeration confirms, targets, extrapolation, and models that will also serve."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.scaling import fit_isoflop, fit_parametric
from experiments.scaling.fit import parametric_warnings, table_warnings
from experiments.scaling.rows.table import clean
from experiments.scaling.serving import ServingCost, serving_optimum
from experiments.scaling.use import Extrapolation, compute_for_loss, in_words, is_far, optimal, planned_loss
from model.errors import InputError


def runs(noise=0.0):
    rng = np.random.default_rng(0)
    budgets = np.geomspace(1e18, 1e20, 4)
    best = 0.6 * (budgets / 6) ** 0.45
    N = (best[:, None] * np.geomspace(1 / 4, 4, 7)).ravel()
    D = np.repeat(budgets, 7) / 6 / N
    loss = (1.7 + 400 * N**-0.34 + 410 * D**-0.28) * np.exp(rng.normal(0, noise, len(N)))
    return {"params": N, "tokens": D, "loss": loss}


@pytest.fixture(scope="module")
def clean_fit():
    return fit_parametric(**runs(), bootstraps=10)


@pytest.fixture(scope="module")
def noisy_fit():
    return fit_parametric(**runs(0.003), bootstraps=100)


def test_other_units_than_counts_and_nats_are_guessed_at():
    right = runs()
    assert table_warnings(clean(**right)) == []
    assert (
        "millions or billions" in table_warnings(clean(right["params"] / 1e6, right["tokens"] / 1e9, right["loss"]))[0]
    )
    apart = clean(right["params"] / 1e6, right["tokens"], right["loss"], 6 * right["params"] * right["tokens"])
    assert "C is 1e+06 times 6·N·D" in table_warnings(apart)[0]
    assert "perplexity" in table_warnings(clean(**right | {"loss": np.exp(right["loss"])}))[0]


def test_a_larger_run_that_is_left_out_is_warned_of():
    table = runs(0.001)
    far = {"params": 4e9, "tokens": 4e11, "loss": 1.2}
    rows = {name: np.append(table[name], far[name]) for name in far}
    law = fit_parametric(**rows, bootstraps=10, screen=True)
    assert [run.params for run in law.outliers] == [4e9]
    assert "fitted up to 1e+20 FLOPs: 1 larger, up to 9.6e+21" in parametric_warnings(law, law.outliers)[0]


SIZES = np.geomspace(1e6, 1e12, 60_001)


@pytest.mark.parametrize("served", [0.0, 1e11, 1e13, 1e15])
@pytest.mark.parametrize("exponent", [1.0, 0.6])
def test_serving_optimum_is_the_enumerated_one(clean_fit, served, exponent):
    cost = ServingCost(2.0, exponent)
    target = 2.3
    left = target - 1.7 - 400 * SIZES**-0.34
    tokens = np.where(left > 0, (410 / np.where(left > 0, left, 1)) ** (1 / 0.28), np.inf)
    total = 6 * SIZES * tokens + served * cost(SIZES)
    found = serving_optimum(clean_fit, served_tokens=served, target=target, cost=cost)
    assert found.params == pytest.approx(SIZES[total.argmin()], rel=1e-3)
    assert found.total_cost == pytest.approx(total.min(), rel=1e-6)
    assert clean_fit.predict(found.params, found.tokens) == pytest.approx(target)
    assert found.saving >= -1e-9


def test_the_more_is_served_the_smaller_and_longer_trained_the_model(noisy_fit):
    answers = [serving_optimum(noisy_fit, served_tokens=m, training_flops=1e20) for m in (0, 1e10, 1e12, 1e14)]
    sizes, tokens = [answer.params for answer in answers], [answer.tokens for answer in answers]
    assert sizes[0] == pytest.approx(noisy_fit.optimal(1e20).params, rel=1e-6)
    assert sizes == sorted(sizes, reverse=True)
    assert tokens == sorted(tokens)
    assert sizes[-1] < 0.7 * sizes[0]
    low, high = answers[2].interval["params"]
    assert low < sizes[2] < high


def test_a_measured_cost_is_a_power_law_through_its_points(tmp_path, clean_fit):
    cost = ServingCost.through([1e8, 1e9, 1e10], [1e-3, 4e-3, 1.6e-2], 1e14)
    assert cost.exponent == pytest.approx(math.log10(4))
    assert cost(1e9) == pytest.approx(4e-3)
    assert ServingCost.through([1e9], [4e-3], 1e14)(2e9) == pytest.approx(8e-3)
    found = serving_optimum(clean_fit, served_tokens=1e12, target=2.3, cost=cost)
    assert found.cost.unit == "seconds"
    assert found.training_cost == pytest.approx(found.flops / 1e14)

    from model import accounting, presets

    documents = []
    for name, seconds in (("tiny", 0.01), ("gpt2-small", 0.08)):
        cells = [
            {"batch": 1, "time_per_output_token_seconds": 1},
            {"batch": 4, "time_per_output_token_seconds": seconds},
        ]
        documents.append(tmp_path / f"{name}.json")
        documents[-1].write_text(json.dumps({"config": presets.get(name).to_dict(), "cells": cells}))
    measured = ServingCost.measured(documents, 1e12)
    assert measured(accounting.parameters(presets.get("gpt2-small")).total) == pytest.approx(0.02)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="bench decode"):
        ServingCost.measured([tmp_path / "other.json"], 1e12)
    with pytest.raises(InputError, match="positive"):
        ServingCost.through([1e9], [0.0], 1e14)
    with pytest.raises(InputError, match="falls with the size"):
        ServingCost.through([1e8, 1e9], [2e-3, 1e-3], 1e14)


def test_compute_for_a_loss_inverts_the_optimum(clean_fit, noisy_fit):
    for budget in (1e19, 1e22):
        answer = compute_for_loss(clean_fit, float(clean_fit.optimal(budget).loss))
        assert answer.flops == pytest.approx(budget, rel=1e-6)
        assert answer.params == pytest.approx(clean_fit.optimal(budget).params)
    answer = compute_for_loss(noisy_fit, 2.2)
    assert answer.interval[0] < answer.flops < answer.interval[1]
    near = compute_for_loss(noisy_fit, noisy_fit.E + 1e-3)
    assert near.interval[1] is None
    assert near.unreachable_share > 0.1
    with pytest.raises(InputError, match="floor"):
        compute_for_loss(clean_fit, 1.6)


def test_answers_state_how_far_they_extrapolate(noisy_fit):
    iso = fit_isoflop(**runs(0.003), bootstraps=100)
    answers = optimal({"parametric": noisy_fit, "isoflop": iso}, 3e21)
    for answer in answers.values():
        assert answer.extrapolation.flops_over_largest == pytest.approx(30, rel=0.1)
        assert "times the largest" in answer.extrapolation.warnings[0]
        assert answer.intervals["params"][0] < answer.params < answer.intervals["params"][1]
    assert answers["parametric"].intervals["loss"][0] < answers["parametric"].loss
    assert answers["isoflop"].loss is None
    inside = planned_loss(noisy_fit, 3e8, 5e9)
    assert replace(inside.extrapolation, flops_over_largest=0) == Extrapolation(0, 1.0, 1.0, [])
    assert inside.interval[0] < inside.loss < inside.interval[1]
    outside = planned_loss(noisy_fit, 1e6, 5e9).extrapolation
    assert outside.params_times < 1
    assert "N=1e+06 is outside" in outside.warnings[0]
    with pytest.raises(InputError, match="not both"):
        serving_optimum(noisy_fit, served_tokens=1e9)
    with pytest.raises(InputError, match="above 0"):
        optimal({"parametric": noisy_fit}, -1.0)


def test_optimum_of_a_budget_is_the_enumerated_one(clean_fit):
    """Every (N, D) of a grid that a budget pays for, for a law whose constants are known."""
    for budget in (1e18, 1e20, 1e23):
        loss = 1.7 + 400 * SIZES**-0.34 + 410 * (budget / 6 / SIZES) ** -0.28
        best = optimal({"parametric": clean_fit}, budget)["parametric"]
        step = SIZES[1] / SIZES[0]
        assert 1 / step < best.params / SIZES[loss.argmin()] < step
        assert 6 * best.params * best.tokens == pytest.approx(budget)
        assert best.loss == pytest.approx(loss.min(), rel=1e-8)


@pytest.mark.parametrize("cost", [ServingCost(), ServingCost(1e-11, 0.8, "seconds", 1e-14)], ids=["flops", "seconds"])
def test_lifetime_optimum_of_a_grid_in_both_directions(clean_fit, cost):
    """No pair of a grid over N and D reaches the loss for less, and N falls as more is served, from the optimum of
    training alone on."""
    target = float(clean_fit.optimal(1e20).loss)
    N, D = np.meshgrid(np.geomspace(3e7, 3e10, 1500), np.geomspace(1e9, 1e13, 1500), indexing="ij")
    reached = target >= 1.7 + 400 * N**-0.34 + 410 * D**-0.28
    chosen = []
    for served in (0.0, 1e10, 1e12, 1e13):
        total = np.where(reached, 6 * N * D * cost.training_unit + served * cost(N), np.inf)
        found = serving_optimum(clean_fit, served_tokens=served, target=target, cost=cost)
        best = np.unravel_index(total.argmin(), total.shape)
        assert total.min() * 0.98 < found.total_cost <= total.min()
        assert found.params == pytest.approx(N[best], rel=0.1)
        assert found.tokens == pytest.approx(D[best], rel=0.1)
        chosen.append(found.params)
    assert chosen[0] == pytest.approx(clean_fit.optimal(1e20).params, rel=1e-4)
    assert chosen == sorted(chosen, reverse=True)


def test_a_distance_in_words_flags_what_is_far(noisy_fit):
    near, beyond, far = (optimal({"p": noisy_fit}, c)["p"].extrapolation for c in (5e19, 5e20, 1e23))
    assert [is_far(distance) for distance in (near, beyond, far)] == [False, False, True]
    assert in_words(near) == "within the compute of the fit (0.5 of its largest)"
    assert in_words(beyond).startswith("5 times the largest compute of the fit")
    assert in_words(far).startswith("FAR: 1,000 times the largest compute")
    assert "is outside the runs'" in in_words(far)
