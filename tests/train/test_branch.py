"""Cool-downs of one trunk: the trunk up to their step, bit by bit, then a rate that falls to nothing."""

import shutil

import jax
import numpy as np
import pytest

from model import ModelConfig, accounting
from model.errors import InputError
from train import HParams, Shell, TrainConfig, cooldown, init_state, train
from train.data.mixture import PhasedLoader
from train.objectives import LanguageModeling
from train.recipe import Recipe
from train.run import Run
from train.run.checkpoint import Checkpoints

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=16, rope_base=9_004.0)
TRAIN = TrainConfig(batch_size=4, seq_len=16, schedule="constant", norms=False)
HPARAMS = HParams(learning_rate=0.01, warmup_steps=4)
STEPS, TOKENS = 14, 4 * 16
TRUNK_SHELL = Shell(evaluate_tokens=64, keep_steps=(6, 10), keep_checkpoints=1)
SHELL = Shell(evaluate_tokens=64, checkpoint_every=2)


def run_branch(plan, run, shell=SHELL):
    return train(plan, run=run, shell=shell)


@pytest.fixture(scope="module")
def trunk(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("trunk") / "run"
    train(CONFIG, TRAIN, HPARAMS, data=data, run=run, steps=STEPS, shell=TRUNK_SHELL)
    assert Checkpoints(run).steps() == [6, 10, STEPS]
    return run


@pytest.fixture(scope="module")
def branches(trunk, tmp_path_factory):
    """{step: (cool-down, result, [(step, its targets)])}"""
    made, plain = {}, PhasedLoader.batch
    for step, decay_steps in ((6, 5), (10, 4)):
        seen = []

        def batch(self, number, *arguments, seen=seen, **options):
            values = plain(self, number, *arguments, **options)
            seen.append((number, values["targets"]))
            return values

        plan = cooldown(trunk, step, decay_steps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PhasedLoader, "batch", batch)
            shell = Shell(evaluate_tokens=64, keep_steps=(step, step + 2))
            made[step] = plan, run_branch(plan, tmp_path_factory.mktemp("branch") / str(step), shell), seen
    return made


@pytest.mark.parametrize("step", [6, 10])
def test_up_to_its_step_a_branch_is_the_trunk(branches, trunk, step, record):
    _, result, seen = branches[step]
    like = jax.eval_shape(lambda: init_state(CONFIG, TRAIN, HPARAMS))
    own, other = (Checkpoints(run, read_only=True).restore(step, like) for run in (result.run, trunk))
    jax.tree.map(np.testing.assert_array_equal, own, other)
    first, of_trunk = record(result.run)[0], record(trunk)[step]
    for name in ("step", "tokens", "loss", "grad_norm", "learning_rate", "flops_exact", "epoch"):
        assert first[name] == of_trunk[name], name
    assert [number for number, _ in seen] == list(range(step, result.steps)), "its data go on where the trunk's do"


@pytest.mark.parametrize(("step", "decay_steps", "final"), [(6, 5, 0.0), (10, 4, 0.0)])
def test_the_rate_falls_linearly(branches, step, decay_steps, final, record):
    lines = record(branches[step][1].run)
    assert [line["step"] for line in lines] == list(range(step + 1, step + decay_steps + 1))
    wanted = 0.01 * (1 - np.arange(decay_steps) / decay_steps)
    np.testing.assert_allclose([line["learning_rate"] for line in lines], wanted, rtol=1e-5)


@pytest.mark.parametrize("step", [6, 10])
def test_its_books_have_the_trunk_in_them(branches, step, record):
    plan, result, _ = branches[step]
    assert (result.status, result.steps, result.branch_step) == ("finished", plan.steps, step)
    assert result.tokens == plan.steps * TOKENS
    for value, convention in ((result.flops_6nd, "6N"), (result.flops_exact, "exact")):
        assert value == plan.steps * TOKENS * accounting.flops_per_token(CONFIG, 16, convention)
    assert result.validation_loss == record(result.run)[-1]["validation_loss"]


def test_the_same_branch_of_another_step_is_another_run(branches, trunk):
    with pytest.raises(InputError, match="another configuration"):
        run_branch(cooldown(trunk, 10, 5), branches[6][1].run)


def test_an_interrupted_branch_goes_on_without_its_trunk(branches, trunk, tmp_path, crash, record):
    _, result, _ = branches[6]
    copy = tmp_path / "trunk"
    shutil.copytree(trunk, copy)
    with crash(9):
        run_branch(cooldown(copy, 6, 5), tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    again = run_branch(cooldown(copy, 6, 5), tmp_path / "run")
    assert again.status == "finished"
    assert record(tmp_path / "run") == record(result.run)


def test_a_final_fraction_is_where_it_ends(trunk, tmp_path, record):
    result = run_branch(cooldown(trunk, 10, 2, final_fraction=0.5), tmp_path / "run")
    rates = [line["learning_rate"] for line in record(result.run)]
    np.testing.assert_allclose(rates, [0.01, 0.0075], rtol=1e-5)


def test_a_branch_leaves_its_trunk_as_it_was(trunk, tmp_path):
    (trunk / "checkpoints" / ".20.writing").mkdir()  # as though the trunk were being trained
    before = sorted(path.relative_to(trunk) for path in trunk.rglob("*"))
    run_branch(cooldown(trunk, 10, 2), tmp_path / "run")
    assert sorted(path.relative_to(trunk) for path in trunk.rglob("*")) == before
    (trunk / "checkpoints" / ".20.writing").rmdir()


def test_where_a_trunk_cannot_be_left(trunk, tmp_path):
    with pytest.raises(InputError, match="no checkpoint of step 7; the steps there are: 6, 10, 14"):
        run_branch(cooldown(trunk, 7, 3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="step 3: take one between 4, the end of warm-up"):
        cooldown(trunk, 3, 3)
    with pytest.raises(InputError, match="decay_steps=0"):
        cooldown(trunk, 6, 0)
    with pytest.raises(InputError, match="is not a run"):
        cooldown(tmp_path / "nowhere", 6, 3)
    for schedule, words in (("cosine", "schedule='cosine'"), ("wsd", r"step 13: .* and 11, where its own decay phase")):
        other = tmp_path / schedule
        train_config = TRAIN.replace(schedule=schedule)
        Run(other, Recipe(CONFIG, train_config, HPARAMS.replace(total_steps=STEPS))).close()
        with pytest.raises(InputError, match=words):
            cooldown(other, 13, 3)
    frozen = Recipe(CONFIG, TRAIN, HPARAMS, steps=STEPS, objective=LanguageModeling(trainable=("final_norm",)))
    Run(tmp_path / "frozen", frozen).close()
    with pytest.raises(InputError, match="trains only part of its parameters, and a run cannot branch off"):
        cooldown(tmp_path / "frozen", 6, 3)
