"""Branches of a sweep: which trial they leave, when they may run, what they cost."""

import dataclasses

import pytest

from experiments.sweep.branches import Listed
from experiments.sweep.definition import define
from experiments.sweep.plan import plan_sweep
from experiments.sweep.row import LedgerRow, RunAll
from experiments.sweep.search.policies import play, tokens_used
from experiments.sweep.trials import plan_trials
from model import InputError, presets

SHARED = {"warmup_steps": 2, "learning_rate": 0.01}
TRUNK = Listed("long", {"steps": 20, "decay_steps": 4} | SHARED)
EARLY = Listed("early", {"steps": 10, "decay_steps": 2} | SHARED, "long", 8)
LATE = Listed("late", {"steps": 15, "decay_steps": 3} | SHARED, "long", 12)


def with_point(entry, **point):
    return dataclasses.replace(entry, point=entry.point | point)


def of_seeds(*entries, seeds=(0, 1)):
    return [with_point(entry, seed=seed) for entry in entries for seed in seeds]


@pytest.fixture
def sweep(data, tmp_path):
    """Define a sweep of one trunk and its two branches, or of these entries; each with two seeds."""

    def make(*entries, **arguments):
        given = {"seq_len": 32, "batch_size": 2, "base": {"schedule": "wsd"}, "evaluate_tokens": 128}
        listed = of_seeds(*(entries or (TRUNK, EARLY, LATE)))
        return define(presets.get("tiny"), data=data, folder=tmp_path / "sweep", listed=listed, **(given | arguments))

    return make


def test_branches_leave_the_trunk_of_their_seed_and_wait_for_its_end(sweep):
    trials = plan_trials(sweep())
    trunks = {trial.recipe.hparams.seed.item(): trial.id for trial in trials if trial.parent is None}
    assert sorted(trunks) == [0, 1]
    branches = [trial for trial in trials if trial.parent is not None]
    assert [trial.parent for trial in branches] == [(trunks[s], step) for step in (8, 12) for s in (0, 1)]
    assert len({trial.id for trial in trials}) == 6
    rows = [LedgerRow(i, trial, "planned", {}, None, {}) for i, trial in enumerate(trials)]
    assert set(RunAll().decide(rows).ready) == set(trunks.values())
    ended = play(RunAll(), trials, lambda trial, step: 1.0)
    assert {row.state for row in ended} == {"finished"}
    assert sum(map(tokens_used, ended)) == 2 * (20 + 2 + 3) * 64
    assert plan_sweep(sweep(), probe=False).total.tokens == 2 * (20 + 2 + 3) * 64
    lost = play(RunAll(), trials, lambda trial, step: None if trial.id == trunks[0] else 1.0)
    states = {(row.trial.recipe.hparams.seed.item(), row.trial.parent is None): row.state for row in lost}
    assert states == {(0, True): "diverged", (0, False): "pruned", (1, True): "finished", (1, False): "finished"}


@pytest.mark.parametrize(
    ("entries", "arguments", "message"),
    [
        ((TRUNK, dataclasses.replace(EARLY, trunk="lnog")), {}, "unknown base run 'lnog'; did you mean 'long'"),
        ((TRUNK, dataclasses.replace(EARLY, leave_step=9)), {}, r"leave_step=9 must be .* warmup_steps=2 .* and 8"),
        ((TRUNK, dataclasses.replace(EARLY, leave_step=1)), {}, "leave_step=1 must be between the end of the warm-up"),
        ((with_point(TRUNK, decay_steps=9), LATE), {}, "leave_step=12 must be between .* and 11"),
        ((TRUNK, with_point(EARLY, beta2=0.5)), {}, "beta2=0.5, but 0.95 in its base run"),
        ((TRUNK, with_point(EARLY, num_layers=1)), {}, "has the model and the TrainConfig of its base run"),
        ((), {"base": {"schedule": "cosine"}}, "both with schedule=wsd"),
        ((), {"policy": "halving", "steps": 20}, "branches wait for their base runs, which --policy halving may stop"),
        ((TRUNK, EARLY, dataclasses.replace(LATE, trunk="early")), {}, "its base run 'early' is itself a branch"),
    ],
)
def test_a_trunk_that_cannot_be_left_so_is_refused(sweep, entries, arguments, message):
    with pytest.raises(InputError, match=message):
        sweep(*entries, **arguments)
