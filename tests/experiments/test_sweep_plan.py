"""A sweep's definition: what it plans, how it is kept and added to, what it costs; and what it refuses."""

import dataclasses
import json

import jax
import pytest

from experiments.sweep.cohort import group, lanes_for, state_bytes, temporary_bytes
from experiments.sweep.definition import define
from experiments.sweep.plan import plan_sweep
from experiments.sweep.record import Sweep
from experiments.sweep.trials import plan_trials, trials_at
from model import InputError, accounting, presets

SPACE = """
from experiments.sweep.space import branch, grid, product, replicate
sides = branch("schedule", {"cosine": grid(final_fraction=[0.0, 0.1]), "wsd": grid(decay_fraction=[0.2])})
space = replicate(product(grid(d_model=[16, 32]), sides), 2)
"""


@pytest.fixture
def sweep(data, tmp_path):
    """Define a sweep of tiny models; keyword arguments replace."""

    def make(**changes):
        given = {"data": data, "folder": tmp_path / "sweep", "steps": 20, "seq_len": 32, "batch_size": 4}
        return define(presets.get("tiny"), **(given | changes))

    return make


def test_trials_are_points_times_seeds(sweep):
    made = sweep(axes=["learning_rate=1e-3,1e-2", "num_layers=1,2"], seeds=3, base={"beta2": 0.9})
    trials = plan_trials(made)
    assert [trial.point for trial in trials[:4]] == [
        {"learning_rate": 1e-3, "num_layers": 1, "seed": 0},
        {"learning_rate": 1e-3, "num_layers": 1, "seed": 1},
        {"learning_rate": 1e-3, "num_layers": 1, "seed": 2},
        {"learning_rate": 1e-3, "num_layers": 2, "seed": 0},
    ]
    assert len({trial.id for trial in trials}) == len(trials) == 12
    recipe = trials[-1].recipe
    assert (recipe.model.vocab_size, recipe.model.num_layers, recipe.hparams.seed) == (320, 2, 2)
    assert recipe.hparams.to_dict()["beta2"] == 0.9
    assert (recipe.steps, recipe.hparams.total_steps) == (20, 20)
    assert [len(cohort.trials) for cohort in group(trials)] == [6, 6]
    assert [cohort.label for cohort in group(trials)] == ["num_layers=1", "num_layers=2"]
    assert trials_at(made, trials[3].point)[0] == trials[3], "a point with a seed is one trial"


def test_a_sweep_without_axes_is_its_seeds(sweep):
    assert [trial.point for trial in plan_trials(sweep(seeds=[3, 5]))] == [{"seed": 3}, {"seed": 5}]


def test_it_is_kept_and_read_back(sweep, tmp_path):
    file = tmp_path / "widths.py"
    file.write_text(SPACE)
    made = sweep(space_file=file, axes=["beta2=0.9,0.95"])
    assert len(plan_trials(made)) == 2 * 3 * 2 * 2, "the file's replicate gives the seeds"
    assert not made.folder.exists(), "defining writes nothing"
    made.write()
    file.unlink()
    assert Sweep.read(made.folder) == made
    assert plan_trials(Sweep.read(made.folder)) == plan_trials(made)
    file.write_text(SPACE)
    with pytest.raises(InputError, match=r"seeds are given twice: by replicate in .*\.py"):
        sweep(space_file=file, seeds=2)


def test_what_is_added_joins_what_was_there(sweep):
    first = sweep(axes=["learning_rate=1e-3,1e-2"], seeds=2)
    first.write()
    assert sweep(axes=["learning_rate=1e-3,1e-2"], seeds=2) == first, "the same command again adds nothing"
    ids = [trial.id for trial in plan_trials(first)]
    more_seeds = sweep(axes=["learning_rate=1e-3,1e-2"], seeds=3)
    assert more_seeds.earlier == (), "it has all of the first one's trials"
    assert set(ids) < {trial.id for trial in plan_trials(more_seeds)}
    more_seeds.write()
    other_axes = sweep(axes=["learning_rate=1e-2,1e-1"], lanes=2)
    planned = [trial.id for trial in plan_trials(other_axes)]
    assert len(planned) == 2 * 3 + 1, "1e-2 with seed 0 was there"
    assert set(ids) < set(planned)
    other_axes.write()
    searched = sweep(axes=["learning_rate=loguniform:1e-3:1e-1"], sampler="tpe", trials=5)
    assert [trial.id for trial in plan_trials(searched)] == planned, "what a sampler draws is not known before"


def test_another_sweep_is_refused_with_the_difference(sweep, data, tmp_path):
    sweep(storage="journal:there.log").write()
    for changes, message in (
        ({"base": {"d_model": 32}}, "holds a sweep of another base: d_model=16 there, 32 here"),
        ({"batch_size": 8}, "batch_size=4 there, 8 here"),
        ({"steps": 30}, "steps=20 there, 30 here"),
        ({"objectives": ["loss", "tokens_per_second"]}, "objectives="),
        ({"policy": "halving"}, "policy=all there, halving here"),
        ({"storage": "journal:here.log"}, "storage=journal:/.*/there.log; its trials are there"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(**changes)
    assert sweep().storage.endswith("/there.log")
    with pytest.raises(InputError, match="holds a sweep over no axis, and this one is over beta2"):
        sweep(axes=["beta2=0.9,0.95"])
    elsewhere = tmp_path / "elsewhere"
    made = sweep(folder=elsewhere)
    base = made.base.replace(recipe=made.base.recipe.replace(data="0" * 64))
    dataclasses.replace(made, base=base).write()
    with pytest.raises(InputError, match=r"data_hash=0{64} there, \w+ here"):
        sweep(folder=elsewhere)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and has no"):
        sweep(folder=tmp_path / "full")
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        sweep()
    with pytest.raises(InputError, match="is not a sweep: it has no"):
        Sweep.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": ["learning_rat=1"]}, "did you mean 'learning_rate'"),
        ({"axes": ["num_heads=1,3"]}, "num_heads=3 does not divide d_model=16"),
        ({"axes": ["seed=1,2"]}, "seed is not an axis: give --seeds"),
        ({"axes": ["seq_len=128"]}, "seq_len=128 is longer than the model's context, max_seq_len=64"),
        ({"axes": ["vocab_size=100"]}, r"the vocabulary of data \(320\) exceeds the model's vocab_size=100"),
        (
            {"axes": ["stack=encoder"]},
            "trains decoders on plain text, not stack='encoder'",
        ),
        (
            {"base": {"objective.adapter.rank": 2}},
            "must come from a model; give the sweep a run",
        ),
        ({"axes": ["learning_rate=loguniform:1e-4:1e-2"]}, "or search it with a sampler"),
        ({"seeds": 0}, "at least one seed"),
        ({"steps": None}, "a trial needs a length"),
        ({"sampler": "tp"}, "did you mean 'tpe'"),
        ({"sampler": "tpe", "axes": ["beta2=0.9,0.95"]}, "needs --trials"),
        ({"sampler": "tpe", "trials": 3}, "has nothing to choose"),
        ({"sampler": "tpe", "trials": 3, "axes": ["d_mode=uniform:1:2"]}, "did you mean 'd_model'"),
        ({"trials": 3}, "goes with a sampler"),
        ({"policy": "halve"}, "did you mean 'halving'"),
        ({"policy": "halving", "axes": ["remat=none,dots"]}, "remat changes no loss but by rounding, so that --policy"),
        ({"lanes": 0}, "lanes=0 must be a whole number of at least 1"),
        ({"objectives": []}, "at least one name"),
        ({"space_file": "nowhere.py"}, "the space nowhere.py cannot be read"),
        ({"data": "nowhere"}, "no data folder at nowhere"),
    ],
)
def test_bad_definitions(sweep, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        sweep(**changes)
    assert not (tmp_path / "sweep").exists()


def test_lanes_hold_what_memory_holds(sweep, monkeypatch):
    trial = plan_trials(sweep())[0]
    assert lanes_for(trial, 3) == 1, "in turn, one at a time stays in the cache"
    assert lanes_for(trial, 20, limit=3) == 3, "unless it is asked for"
    state, temporary = state_bytes(trial), temporary_bytes(trial)
    assert lanes_for(trial, 6, limit=9, memory=2 * (temporary + 5 * state)) == 3
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lanes_for(trial, 32, memory=10**12) == 32
    assert lanes_for(trial, 80, memory=10**12) == 40, "two batches of forty, not sixty-four and sixteen"
    assert lanes_for(trial, 20, memory=1) == 1
    assert lanes_for(trial, 5, memory=2 * 5 * (temporary + state)) == 5
    assert lanes_for(trial, 6, memory=2 * 5 * (temporary + state)) == 3
    # AdamW: parameters and two moments, and a few counters
    floats = 3 * accounting.parameters(trial.recipe.model).total
    assert 4 * floats < state_bytes(trial) < 4 * floats + 64


def test_the_plan_adds_up(sweep):
    made = sweep(axes=["learning_rate=logspace:1e-4:1e-2:9", "num_layers=1,2"], seeds=2)
    plan = plan_sweep(made, probe=False).to_dict()
    assert [(row["label"], row["trials"], row["compiles"]) for row in plan["cohorts"]] == [
        ("num_layers=1", 18, 1),
        ("num_layers=2", 18, 1),
    ]
    assert plan["total"]["tokens"] == 36 * 20 * 4 * 32
    configs = [cohort.config for cohort in group(plan_trials(made))]
    for convention, name in (("6N", "flops_6nd"), ("exact", "flops_exact")):
        per_token = sum(accounting.flops_per_token(config, 32, convention) for config in configs)
        assert plan["total"][name] == 18 * 20 * 4 * 32 * per_token
    assert plan["expected"]["share"] == 1
    assert plan["total"]["hours"] is None
    assert not made.folder.exists()


def test_cohorts_of_several_objectives_are_told_apart(sweep, data):
    """By the fields that they share; a setting that is wrong for an objective is said before a folder is made."""
    encoder = ["stack=encoder", "objective=masked"]
    made = sweep(axes=[*encoder, "objective.masked=0.5,0.8", "mask_rate=0.1,0.2"])
    labels = [row.label for row in plan_sweep(made, probe=False).cohorts]
    assert labels == ["objective.masked=0.5", "objective.masked=0.8"]
    trials = [trial for axes in (encoder, ["objective=language-modeling"]) for trial in plan_trials(sweep(axes=axes))]
    assert [cohort.label.split(", ")[-1] for cohort in group(trials)] == [
        "objective=masked",
        "objective=language-modeling",
    ]
    for axes, message in (
        ([*encoder, "objective.mask_id=5"], "the mask: id 5 is a text token of the data's vocabulary"),
        ([*encoder[:1], "objective=classification"], "has no labels"),
        (["stack=encoder-decoder", "objective=spans", "loss_chunks=16"], "loss_chunks=16 does not divide the 8 tokens"),
        (["objective=language-modeling,masked"], "trains encoders|cannot be compared"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(axes=axes)
    assert not made.folder.exists()


def test_hours_follow_from_two_measured_shapes_and_halving_saves_its_share(sweep, monkeypatch):
    """On a machine of known overhead and rate; the shape in the middle is not measured."""
    measured = []

    def step_seconds(config):
        return 0.02 + 128 * accounting.flops_per_token(config, 32) / 1e9

    def measure(config, train_config, lanes, seconds, execution, objective):
        measured.append(config.num_layers)
        return {"step_seconds": lanes * step_seconds(config), "compile_seconds": 3.0}

    monkeypatch.setattr("experiments.sweep.speed.measure_step", measure)
    made = sweep(axes=["learning_rate=logspace:1e-4:1e-2:9", "num_layers=1,2,4"], evaluate_tokens=384)
    plan = plan_sweep(made).to_dict()
    assert measured == [1, 4]
    configs = [cohort.config for cohort in group(plan_trials(made))]
    seconds = sum(9 * (20 + 1) * step_seconds(config) + 3.0 for config in configs)  # 384 tokens validate as 128 train
    assert 3600 * plan["total"]["hours"] == pytest.approx(seconds)
    halving = dataclasses.replace(made, policy="halving", policy_settings={"eta": 3, "min_fraction": 1 / 9})
    halved = plan_sweep(halving)
    # Of 27 points all train 2 of 20 steps, nine go on to 7, three to the end.
    assert halved.expected.share == pytest.approx((27 * 2 + 9 * 5 + 3 * 13) / (27 * 20))
    assert halved.total.hours < plan["total"]["hours"]


def test_the_command_plans_and_refuses(isoflop, data, tmp_path):
    call = ("sweep", "plan", "tiny", "--data", data, "--out", tmp_path / "sweep", "--seq-len", 32, "--no-probe")
    document = tmp_path / "plan.json"
    drawn = ("--set", "learning_rate=loguniform:1e-4:1e-2", "tokens=1e4,2e4", "--sampler", "random", "--trials", 8)
    code, out, error = isoflop(*call, *drawn, "--json", document)
    assert code == 0, error
    assert "about 8 trials in 1 static shape;" in out
    plan = json.loads(document.read_text())
    assert plan["estimated"]
    assert plan["cohorts"][0]["steps"] == [round(1e4 / 256), round(2e4 / 256)]
    code, out, error = isoflop(*call, "--steps", 5, "--set", "learning_rat=1")
    assert (code, out) == (2, "")
    assert error == (
        "isoflop: unknown setting 'learning_rat'; did you mean 'learning_rate' or 'zero_readout' or 'layer_pattern'?\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]
