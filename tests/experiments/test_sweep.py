"""A plain grid without a ledger: its plan, its program."""

import pytest

from experiments.sweep.run import plan_trials, run_sweep
from model import InputError, presets
from train import HParams, Shell, TrainConfig


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
