"""The sweep's statistics on tables with a known answer."""

import re
import types

import numpy as np
import pytest
from scipy import stats

from experiments.commands.sweep import run as command
from experiments.sweep.analysis.comparisons import best_of_many, largest_of_many, selected_interval
from experiments.sweep.analysis.importance import importances
from experiments.sweep.analysis.optimum import log_parabola
from experiments.sweep.analysis.outcome import Summary
from experiments.sweep.analysis.pareto import front, near_front
from experiments.sweep.analysis.ranking import ranking
from experiments.sweep.analysis.scales import edge_of, scale_of
from experiments.sweep.analysis.sentence import sentence
from experiments.sweep.analysis.summary import summarize

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]


def trials(loss, seeds=3, rates=RATES):
    found = [{"learning_rate": rate, "seed": seed, "loss": loss(rate, seed)} for rate in rates for seed in range(seeds)]
    return [row | {"state": "diverged" if row["loss"] is None else "finished"} for row in found]


def bowl(rate, seed, best=4e-3, noise=0.01):
    shifts = (-1, 0, 1, 0.5, -0.5)
    return 3 + 0.1 * np.log(rate / best) ** 2 + noise * shifts[seed]


def test_losses_of_different_functions_are_not_ranked_silently():
    rows = [row | {"beta": beta} for beta in (0.1, 0.3) for row in trials(bowl)]
    warning = "losses at different beta are different functions"
    said = summarize({"beta": [0.1, 0.3], "learning_rate": RATES}, rows).warnings
    assert any(line.startswith(warning) for line in said)
    said = summarize({"beta": [0.1], "learning_rate": RATES}, [row for row in rows if row["beta"] == 0.1]).warnings
    assert not any(line.startswith(warning) for line in said)


def test_what_compares_ranks_where_losses_do_not(capsys):
    """The loss is lowest at one beta, the accuracy highest at another: winner, noise, interval and equals are its."""
    axes = {"beta": [0.1, 0.3], "learning_rate": RATES}
    rows = [
        row | {"beta": beta, "loss": row["loss"] * beta, "accuracy": 1 - row["loss"] / 10 + beta / 10}
        for beta in axes["beta"]
        for row in trials(bowl)
    ]
    by_loss, found = summarize(axes, rows), summarize(axes, rows, objectives=("margin", "accuracy", "loss"))
    assert by_loss.winner.setting == {"beta": 0.1, "learning_rate": 4e-3}
    assert found.winner.setting == {"beta": 0.3, "learning_rate": 4e-3}
    best = [row["accuracy"] for row in rows if row["beta"] == 0.3 and row["learning_rate"] == 4e-3]
    assert found.winner.mean == pytest.approx(np.mean(best))
    assert found.seed_noise == pytest.approx(np.std(best, ddof=1))
    # The same numbers with their sign turned, as losses, have the mirrored interval and the same equals.
    turned = summarize(axes, [row | {"loss": -row["accuracy"]} for row in rows])
    assert found.winner.interval_95 == pytest.approx([-end for end in reversed(turned.winner.interval_95)])
    assert found.winner.indistinguishable == turned.winner.indistinguishable
    assert found.optimum is None
    assert "ranked by accuracy" in found.optimum_refused
    assert not any("different functions" in line for line in found.warnings)
    assert "settings are ranked by accuracy." in sentence(found)
    assert "the highest of 10 settings" in sentence(found)
    assert Summary.from_dict(found.to_dict()) == found
    command.show(command._Outcome(found, "all", "nats", types.SimpleNamespace(folder="swept", states={})))
    said = capsys.readouterr().out
    assert "accuracy" in said.splitlines()[1]
    assert re.search(r"─\s+0\.3\s+0\.004\s+0\.73", said), "the best first"
    assert f"seed noise of one run: {found.seed_noise:.4f} of accuracy" in said


def test_settings_that_are_as_accurate_are_counted():
    """No edge of an axis is warned about where another value of it is as good."""
    axes = {"beta": [0.1, 0.3, 1.0], "learning_rate": RATES}
    rows = [row | {"beta": beta, "accuracy": 0.75} for beta in axes["beta"] for row in trials(bowl, seeds=1)]
    found = summarize(axes, rows, objectives=("accuracy",))
    assert "the highest of 15 settings, which 14 others have too" in sentence(found)
    assert found.warnings == ["one seed per setting: the noise of the winner is not known"]
    below = [row | {"accuracy": 0.75 if row["beta"] == 0.1 else 0.5} for row in rows]
    found = summarize(axes, below, objectives=("accuracy",))
    assert [line for line in found.warnings if "lowest of the grid" in line] == [
        "the best beta=0.1 is the lowest of the grid: the optimum may be beyond it"
    ]


@pytest.mark.parametrize(
    ("axes", "objectives", "expected"),
    [
        ({"learning_rate": [1, 2]}, ("accuracy",), "loss"),
        ({"beta": [0.1]}, ("accuracy",), "loss"),
        ({"beta": [0.1, 0.3]}, ("loss", "margin", "forgetting", "accuracy"), "forgetting"),
        ({"beta": [0.1, 0.3]}, ("margin", "training_tokens_per_second"), "loss"),
        ({"nll_weight": [0.0, 1.0]}, ("margin", "accuracy"), "margin"),
        ({"objective.margins": [False, True]}, ("margin", "accuracy"), "accuracy"),
        ({"objective.kind": ["dpo", "simpo"], "nll_weight": [0.0, 1.0]}, ("margin", "accuracy"), "accuracy"),
    ],
)
def test_rewards_rank_only_where_nothing_scales_them(axes, objectives, expected):
    assert ranking(axes, objectives).objective == expected


def test_critical_values_are_those_of_the_tables():
    """Dunnett 1955, table 1a (one-sided, 5 %); with one comparison Student's t."""
    assert [round(best_of_many(k, 10), 2) for k in (1, 2, 3, 4)] == [1.81, 2.15, 2.34, 2.47]
    assert round(best_of_many(4, 20), 2) == 2.30
    assert largest_of_many(1, 7) == pytest.approx(stats.t.ppf(0.975, 7), abs=1e-4)


def test_the_interval_of_the_chosen_minimum_holds_its_truth():
    """Twenty settings that are all alike: the lowest mean is biased, its plain t interval misses far too often."""
    rng, missed, plain = np.random.default_rng(0), 0, 0
    for _ in range(400):
        means = rng.standard_normal(20) / np.sqrt(3)
        noise = np.sqrt(rng.chisquare(40) / 40)
        low, high = selected_interval(means.min(), noise / np.sqrt(3), 20, 40)
        missed += not low < 0 < high
        plain += not low < 0 < 2 * means.min() - low
    assert missed / 400 < 0.05
    assert plain / 400 > 0.2


def test_the_optimum_lies_in_its_interval():
    rng, held = np.random.default_rng(0), 0
    x = np.log(np.array(RATES) / 5e-3)
    for _ in range(300):
        means = 3 + 0.05 * x**2 + 0.01 * rng.standard_normal(5) / np.sqrt(3)
        noise = 0.01 * np.sqrt(rng.chisquare(10) / 10)
        interval = log_parabola(RATES, means, [3] * 5, noise, 10).interval_95
        held += interval[0] < 5e-3 < interval[1]
    assert 0.91 < held / 300 < 0.99


def test_an_optimum_that_the_noise_hides_has_no_interval():
    found = log_parabola(RATES, [3.02, 3.01, 3.0, 3.01, 3.02], [2] * 5, 0.5, 5)
    assert found.interval_95 is None
    assert "within the noise" in found.interval_reason
    assert "curve upwards" in log_parabola(RATES, [3, 3.1, 3.15, 3.1, 3], [2] * 5, 0.01, 5)


def test_pruned_and_pending_trials_enter_no_mean():
    rows = trials(bowl)
    rows[0] |= {"state": "pruned", "loss": 1.0}
    rows[3] |= {"state": "running", "loss": None}
    summary = summarize({"learning_rate": RATES}, rows).to_dict()
    assert summary["settings"][0]["mean"] == pytest.approx(np.mean([row["loss"] for row in rows[1:3]]))
    assert summary["winner"]["setting"] == {"learning_rate": 4e-3}
    assert summary["winner"]["candidates"] == 4, "part of it was pruned: what is left is a choice"
    assert summary["counts"]["pruned"] == summary["counts"]["running"] == 1


def test_edges_are_of_numbers_alone():
    assert edge_of([1, 2, 3], 3) == "highest"
    assert edge_of([1, 2], 2) is None
    assert edge_of(["a", "b", "c"], "c") is None
    assert edge_of([0.0, 0.1, 0.2], 0.0) is None, "nothing lies below zero"
    assert edge_of(list(np.linspace(1, 2, 40)), float(np.linspace(1, 2, 40)[1])) == "lowest"
    assert [scale_of(v) for v in (RATES, [1, 2, 3], [0, 0.01, 0.1], ["a"])] == ["log", "linear", "rank", "rank"]


def test_only_what_matters_is_important():
    rng = np.random.default_rng(0)
    rows = [
        {"x1": float(x), "x2": float(y), "x3": str(z), "state": "finished", "loss": 3 + x**2}
        for x, y, z in zip(rng.uniform(-1, 1, 40), rng.uniform(-1, 1, 40), rng.choice(["a", "b"], 40), strict=True)
    ]
    found = importances(["x1", "x2", "x3"], rows, draws=5)
    assert found.ped_anova["x1"].share > 0.7
    pytest.importorskip("sklearn")
    assert found.fanova["x1"].share > 0.9
    assert "at least 10" in importances(["x1", "x2"], rows[:9]).ped_anova


def test_front():
    values = np.array([[1.0, 4.0], [2.0, 2.0], [4.0, 1.0], [2.05, 2.05], [4.0, 4.0]])
    assert front(values).tolist() == [True, True, True, False, False]
    assert near_front(values, np.full(values.shape, 0.1)).tolist() == [False, False, False, True, False]


def test_winner_with_its_noise():
    summary = summarize({"learning_rate": RATES}, trials(bowl)).to_dict()
    assert summary["winner"]["setting"] == {"learning_rate": 4e-3}
    assert summary["winner"]["mean"] == pytest.approx(3)
    assert summary["seed_noise"] == pytest.approx(0.01)
    low, high = summary["winner"]["interval_95"]
    assert low < 3 < high
    assert summary["winner"]["indistinguishable"] == []
    assert summary["warnings"] == []
    assert summary["optimum"]["learning_rate"] == pytest.approx(4e-3)


def test_what_lies_inside_the_noise_is_said():
    summary = summarize({"learning_rate": RATES}, trials(lambda rate, seed: bowl(rate, seed, noise=0.2))).to_dict()
    assert {"learning_rate": 2e-3} in summary["winner"]["indistinguishable"]
    assert any("within the seed noise" in warning for warning in summary["warnings"])


def test_optimum_on_the_edge_is_flagged():
    summary = summarize({"learning_rate": RATES}, trials(lambda rate, seed: bowl(rate, seed, best=1e-1))).to_dict()
    assert any("learning_rate=0.016 is the highest of the grid" in warning for warning in summary["warnings"])
    assert summary["optimum"] is None


def test_a_setting_that_loses_a_run_does_not_win():
    summary = summarize(
        {"learning_rate": RATES}, trials(lambda r, s: None if (r, s) == (4e-3, 1) else bowl(r, s))
    ).to_dict()
    assert summary["winner"]["setting"] != {"learning_rate": 4e-3}
    assert any("1 of 15 runs diverged" in warning for warning in summary["warnings"])


def test_all_diverged():
    summary = summarize({"learning_rate": RATES}, trials(lambda rate, seed: None)).to_dict()
    assert summary["winner"] is None
    assert summary["warnings"]


def test_single_seed_has_no_noise():
    summary = summarize({"learning_rate": RATES}, trials(bowl, seeds=1)).to_dict()
    assert summary["seed_noise"] is None
    assert any("one seed" in warning for warning in summary["warnings"])
