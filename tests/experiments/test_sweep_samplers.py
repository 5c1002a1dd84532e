"""Samplers by name: each searches, repeats itself by its seed, and is refused where it cannot search."""

import importlib.util
import math

import optuna
import pytest

from experiments.sweep.search.samplers import SAMPLERS, check_axes, make_sampler, suggester, to_category
from experiments.sweep.space import branch, choice, grid, integers, loguniform, product
from model import InputError

optuna.logging.set_verbosity(optuna.logging.ERROR)

INTERVALS = grid(learning_rate=loguniform(1e-4, 1e-1), d_ff=integers(32, 256))
RATES = grid(learning_rate=loguniform(1e-4, 1e-1), norm=choice("rms", None, True), sizes=choice([1, 2], [3]))
SIDES = {"sgd": grid(beta1=choice(0.0, 0.9)), "lion": grid(beta2=loguniform(0.5, 0.99))}
BRANCHING = product(RATES, branch("optimizer", SIDES))
GP = pytest.param("gp", marks=pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch"))


def search(sampler, count, space=INTERVALS, drawn=0):
    """(points, losses) of a search for the rate 0.01 in a space."""
    study = optuna.create_study(sampler=make_sampler(sampler, 7, drawn=drawn))
    points, losses = [], []
    for _ in range(count):
        trial = study.ask()
        points.append(space.draw(suggester(trial)))
        losses.append(abs(math.log10(points[-1]["learning_rate"]) + 2))
        study.tell(trial, losses[-1])
    return points, losses


@pytest.mark.parametrize("sampler", ["random", "quasirandom", "tpe", "cmaes", GP])
def test_a_search_stays_in_the_space_and_its_seed_repeats_it(sampler):
    points, _ = search(sampler, 12)
    assert all(1e-4 <= point["learning_rate"] <= 1e-1 for point in points)
    assert all(32 <= point["d_ff"] <= 256 and isinstance(point["d_ff"], int) for point in points)
    assert search(sampler, 12)[0] == points
    if sampler != "quasirandom":  # whose place is kept by the study
        assert search(sampler, 3, drawn=1)[0] != points[:3]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_a_model_of_the_losses_beats_none(sampler):
    late = lambda sampler: sum(search(sampler, 40)[1][20:]) / 20
    assert late(sampler) < 0.6 * late("random")


def test_of_a_branch_only_the_side_that_is_taken_is_asked_for_and_values_come_back_as_they_were():
    points, _ = search("tpe", 30, BRANCHING)
    assert {point["optimizer"] for point in points} == {"sgd", "lion"}
    for point in points:
        assert ("beta1" in point) == (point["optimizer"] == "sgd")
        assert ("beta2" in point) == (point["optimizer"] == "lion")
        assert point["sizes"] in ([1, 2], [3])
        assert point["norm"] in ("rms", None, True)


def test_distributions_are_optunas():
    study = optuna.create_study(sampler=make_sampler("random", 0))
    space = grid(rate=loguniform(1e-4, 1e-1), layers=integers(1, 8), norm=choice("a", None, [1]))
    trial = study.ask()
    space.draw(suggester(trial))
    assert trial.distributions == {
        "rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "layers": optuna.distributions.IntDistribution(1, 8),
        "norm": optuna.distributions.CategoricalDistribution(["a", None, "[1]"]),
    }
    assert to_category({"b": 1, "a": 2}) == '{"a": 2, "b": 1}'


def test_several_objectives():
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=make_sampler("nsga2", 0, ["minimize"] * 2))
    for _ in range(5):
        trial = study.ask()
        point = INTERVALS.draw(suggester(trial))
        study.tell(trial, (point["learning_rate"], point["d_ff"]))
    assert study.best_trials


def test_what_cannot_search_is_refused(monkeypatch):
    with pytest.raises(InputError, match="did you mean 'random'"):
        make_sampler("randon", 0)
    with pytest.raises(InputError, match="take nsga2"):
        make_sampler("cmaes", 0, ["minimize", "maximize"])
    with pytest.raises(InputError, match="for several objectives"):
        make_sampler("nsga2", 0)
    with pytest.raises(InputError, match="d_ff as loguniform"):
        check_axes("cmaes", {"learning_rate": loguniform(1e-4, 1e-1), "d_ff": choice(1, 2)})
    check_axes("tpe", {"d_ff": choice(1, 2)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs torch; .*isoflop\[search\]"):
        make_sampler("gp", 0)
    assert "gp" in SAMPLERS
