"""Branches of a sweep: which trial they leave, when they may run, what they cost."""

import pytest

from experiments.sweep.definition import define
from experiments.sweep.plan import plan_sweep
from experiments.sweep.row import Row, RunAll
from experiments.sweep.search.simulate import play, tokens_used
from experiments.sweep.trials import plan_trials
from model import InputError, presets

SPACE = """
from experiments.sweep.space import chain, grid
shared = {"warmup_steps": [2], "learning_rate": [0.01]}
space = chain(
    grid(_name=["long"], steps=[20], decay_steps=[4], **shared),
    grid(_trunk=["long"], _leave=[8], steps=[10], decay_steps=[2], **shared),
    grid(_trunk=["long"], _leave=[12], steps=[15], decay_steps=[3], **shared),
)
"""


@pytest.fixture
def sweep(data, tmp_path):
    """Define a sweep of one trunk and its two branches; `changes` of the space's text."""

    def make(*changes, **arguments):
        text = SPACE
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        file = tmp_path / "space.py"
        file.write_text(text)
        given = {"seq_len": 32, "batch_size": 2, "base": {"schedule": "wsd"}, "evaluate_tokens": 128, "seeds": 2}
        return define(presets.get("tiny"), data=data, folder=tmp_path / "sweep", space_file=file, **(given | arguments))

    return make


def test_branches_leave_the_trunk_of_their_seed_and_wait_for_its_end(sweep):
    trials = plan_trials(sweep())
    trunks = {trial.setting.hparams.seed.item(): trial.id for trial in trials if trial.parent is None}
    assert sorted(trunks) == [0, 1]
    branches = [trial for trial in trials if trial.parent is not None]
    assert [trial.parent for trial in branches] == [(trunks[s], step) for step in (8, 12) for s in (0, 1)]
    assert len({trial.id for trial in trials}) == 6
    rows = [Row(i, trial, "planned", {}, None, {}) for i, trial in enumerate(trials)]
    assert set(RunAll().decide(rows).ready) == set(trunks.values())
    ended = play(RunAll(), trials, lambda trial, step: 1.0)
    assert {row.state for row in ended} == {"finished"}
    assert sum(map(tokens_used, ended)) == 2 * (20 + 2 + 3) * 64
    assert plan_sweep(sweep(), probe=False)["total"]["tokens"] == 2 * (20 + 2 + 3) * 64
    lost = play(RunAll(), trials, lambda trial, step: None if trial.id == trunks[0] else 1.0)
    states = {(row.trial.setting.hparams.seed.item(), row.trial.parent is None): row.state for row in lost}
    assert states == {(0, True): "diverged", (0, False): "pruned", (1, True): "finished", (1, False): "finished"}


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ([('_trunk=["long"], _leave=[8]', '_trunk=["lnog"], _leave=[8]')], {}, "unknown trunk 'lnog'; did you mean"),
        ([("_leave=[8]", "_leave=[9]")], {}, r"_leave=9 must lie between .* warmup_steps=2 .* and 8"),
        ([("_leave=[8]", "_leave=[1]")], {}, "_leave=1 must lie between the end of the warm-up"),
        ([("decay_steps=[4]", "decay_steps=[9]")], {}, "_leave=12 must lie between .* and 11"),
        ([("steps=[10]", "beta2=[0.5], steps=[10]")], {}, "beta2=0.5, but 0.95 in its trunk"),
        ([("steps=[10]", "num_layers=[1], steps=[10]")], {}, "has the model and the TrainConfig of its trunk"),
        ([], {"base": {"schedule": "cosine"}}, "both with schedule=wsd"),
        ([], {"policy": "halving", "steps": 20}, "branches wait for their trunks, which --policy halving may stop"),
        ([('grid(_trunk=["long"], _leave=[8]', 'grid(_name=["b"], _trunk=["long"], _leave=[8]'),
          ('_trunk=["long"], _leave=[12]', '_trunk=["b"], _leave=[12]')], {}, "its trunk 'b' is itself a branch"),
    ],
)  # fmt: skip
def test_a_trunk_that_cannot_be_left_so_is_refused(sweep, changes, arguments, message):
    with pytest.raises(InputError, match=message):
        sweep(*changes, **arguments)
