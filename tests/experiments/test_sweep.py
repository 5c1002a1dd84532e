"""The sweep's statistics on tables with a known answer, and its plan."""

import numpy as np
import pytest

from experiments.sweep.reading.summary import summarize
from experiments.sweep.run import plan_trials, run_sweep
from model import InputError, presets
from train import HParams, Shell, TrainConfig

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]


def trials(loss, seeds=3, rates=RATES):
    return [{"learning_rate": rate, "seed": seed, "loss": loss(rate, seed)} for rate in rates for seed in range(seeds)]


def bowl(rate, seed, best=4e-3, noise=0.01):
    shifts = (-1, 0, 1, 0.5, -0.5)
    return 3 + 0.1 * np.log(rate / best) ** 2 + noise * shifts[seed]


def test_winner_with_its_noise():
    summary = summarize({"learning_rate": RATES}, trials(bowl))
    assert summary["winner"]["setting"] == {"learning_rate": 4e-3}
    assert summary["winner"]["mean"] == pytest.approx(3)
    assert summary["seed_noise"] == pytest.approx(0.01)
    low, high = summary["winner"]["interval_95"]
    assert low < 3 < high
    assert summary["winner"]["indistinguishable"] == []
    assert summary["warnings"] == []
    assert summary["optimum"]["learning_rate"] == pytest.approx(4e-3)


def test_what_lies_inside_the_noise_is_said():
    summary = summarize({"learning_rate": RATES}, trials(lambda rate, seed: bowl(rate, seed, noise=0.2)))
    assert {"learning_rate": 2e-3} in summary["winner"]["indistinguishable"]


def test_optimum_on_the_edge_is_flagged():
    summary = summarize({"learning_rate": RATES}, trials(lambda rate, seed: bowl(rate, seed, best=1e-1)))
    assert any("learning_rate=0.016 is the highest of the grid" in warning for warning in summary["warnings"])
    assert summary["optimum"] is None


def test_a_setting_that_loses_a_run_does_not_win():
    summary = summarize({"learning_rate": RATES}, trials(lambda r, s: None if (r, s) == (4e-3, 1) else bowl(r, s)))
    assert summary["winner"]["setting"] != {"learning_rate": 4e-3}
    assert any("1 of 15 runs diverged" in warning for warning in summary["warnings"])


def test_all_diverged():
    summary = summarize({"learning_rate": RATES}, trials(lambda rate, seed: None))
    assert summary["winner"] is None
    assert summary["warnings"]


def test_single_seed_has_no_noise():
    summary = summarize({"learning_rate": RATES}, trials(bowl, seeds=1))
    assert summary["seed_noise"] is None
    assert any("one seed" in warning for warning in summary["warnings"])


def test_plan_is_the_product_with_seeds():
    plan = plan_trials(HParams(), {"learning_rate": [1e-3, 2e-3], "beta2": [0.9, 0.99]}, [0, 1])
    assert len(plan) == 8
    assert plan[0] == {"learning_rate": 1e-3, "beta2": 0.9, "seed": 0}


@pytest.mark.parametrize(
    ("axes", "seeds", "message"),
    [
        ({"learning_rat": [1.0]}, [0], "did you mean 'learning_rate'"),
        ({"learning_rate": []}, [0], "no values"),
        ({"learning_rate": [1e-3, 1e-3]}, [0], "twice"),
        ({"beta1": [1.5]}, [0], r"beta1=1.5 must be in \[0, 1\)"),
        ({"seed": [1]}, [0], "seed is not an axis"),
        ({"beta1": [0.9]}, [], "at least one seed"),
    ],
)
def test_bad_plans(axes, seeds, message):
    with pytest.raises(InputError, match=message):
        plan_trials(HParams(), axes, seeds)


@pytest.mark.slow
def test_a_sweep_is_one_program_and_resumes(data, tmp_path):
    config = presets.get("tiny").replace(vocab_size=320, max_seq_len=32, rope_base=9_000.0)

    def sweep():
        return run_sweep(
            config,
            TrainConfig(batch_size=4, seq_len=32),
            HParams(),
            {"learning_rate": [1e-3, 1e-2]},
            seeds=[0, 1],
            data=data,
            folder=tmp_path / "sweep",
            steps=10,
            shell=Shell(evaluate_tokens=512),
        )

    first, second = sweep(), sweep()
    assert first["compiles"] == 1
    assert second["compiles"] == 0
    assert first["trials"] == second["trials"]
    assert len(list((tmp_path / "sweep").iterdir())) == 4
