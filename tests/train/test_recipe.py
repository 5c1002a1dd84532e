"""A recipe is all that decides a run's numbers: its hash names the run, however the run is executed."""

import dataclasses

import numpy as np
import pytest

from infer import prepare
from model import Execution, Experts, InputError, presets
from model.convert import save_hf
from model.quantized import save_quantized
from train import Branch, HParams, Recipe, Shell, TrainConfig, Weights, load_run, population, train, weights
from train.objectives import MaskedLanguageModeling
from train.overlay import overlay
from train.recipe import difference
from train.run import Run, executions, read_record, recipe_of
from train.run.metrics import read_metrics

CONFIG = presets.get("tiny").replace(vocab_size=320, max_seq_len=32, num_layers=1, rope_base=9_300.0)
SHAPE = TrainConfig(batch_size=4, seq_len=32, norms=False, schedule="constant")
QUIET = Shell(evaluate_tokens=128)
STEPS = 4
PLAIN = Recipe(presets.get("tiny"), data="0" * 64)


@pytest.fixture(scope="module")
def recipe(data):
    return Recipe(CONFIG, SHAPE, HParams(learning_rate=0.01), data=data, steps=STEPS)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run without an interruption."""
    run = tmp_path_factory.mktemp("recipe") / "run"
    train(recipe, run=run, shell=QUIET)
    return run


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def test_ids_stay_as_they_were_given():
    """A field that is added to a config must be named in `train.recipe.LATER`, or all runs become others."""
    assert PLAIN.run_id == "f43b0dc6e1f30863"
    experts = PLAIN.replace(model=PLAIN.model.replace(experts=Experts(4, 2, 8)), train=TrainConfig(schedule="wsd"))
    assert experts.run_id == "3497c1bdd00b592a"
    assert PLAIN.replace(objective=MaskedLanguageModeling(mask_id=3)).run_id == "70723f766821b022"
    assert PLAIN.replace(objective="spans").objective.identity == {"name": "spans", "first_sentinel": 63}


@pytest.mark.parametrize(
    "other",
    [
        {"model": PLAIN.model.replace(num_layers=1)},
        {"train": TrainConfig(seq_len=64)},
        {"train": TrainConfig(packing="best-fit")},
        {"hparams": HParams(seed=1)},
        {"data": "1" * 64},
        {"data": {"web": "0" * 64, "good": "1" * 64}},
        {"start": Branch("abc", 3)},
        {"start": Weights("2" * 64)},
        {"accumulate": 2},
        {"hparams": HParams(total_steps=9)},  # of a cosine
    ],
)
def test_what_decides_a_number_decides_the_id(other):
    made = PLAIN.replace(**other)
    assert made.run_id != PLAIN.run_id
    assert difference(PLAIN, made)
    again = Recipe.from_dict(made.to_dict())
    assert again == made
    assert again.run_id == made.run_id
    assert not difference(again, made)


@pytest.mark.parametrize(
    "other",
    [{"steps": 9}, {"folders": "elsewhere"}, {"train": TrainConfig(norms=False)}, {"former": {"remat": "dots"}}],
)
def test_what_decides_no_number_makes_no_difference(other):
    made = PLAIN.replace(**other)
    assert not difference(PLAIN, made)
    assert made.run_id == PLAIN.run_id or made.former


def test_the_horizon_counts_where_the_schedule_reads_it():
    steady = PLAIN.replace(train=TrainConfig(schedule="constant"))
    assert steady.replace(steps=5).with_horizon().run_id == steady.replace(steps=9).with_horizon().run_id
    assert difference(PLAIN.replace(steps=5).with_horizon(), PLAIN.replace(steps=9).with_horizon()) == (
        "total_steps=5 there, 9 here"
    )


def test_a_recipe_and_its_parts_are_one_run(recipe, whole, data, tmp_path):
    train(CONFIG, SHAPE, recipe.hparams, data=data, run=tmp_path / "parts", steps=STEPS, shell=QUIET)
    assert losses(tmp_path / "parts") == losses(whole)
    records = [read_record(run) for run in (whole, tmp_path / "parts")]
    assert records[0]["run_id"] == records[1]["run_id"] == recipe.run_id
    assert not difference(recipe_of(records[0]), recipe)


def test_recipes_are_lanes(recipe, whole, tmp_path):
    both = [recipe, recipe.replace(hparams=recipe.hparams.replace(learning_rate=0.02))]
    results = population(both, runs=[tmp_path / "a", tmp_path / "b"], shell=QUIET)
    assert losses(tmp_path / "a") == losses(whole)
    assert results[0].validation_loss != results[1].validation_loss
    other = recipe.replace(model=CONFIG.replace(d_ff=40))
    with pytest.raises(InputError, match="differ in hyperparameters, steps and starts, not in d_ff="):
        population([recipe, other], runs=[tmp_path / "c", tmp_path / "d"], shell=QUIET)
    with pytest.raises(InputError, match="hparams is part of the recipe"):
        train(recipe, hparams=HParams(), run=tmp_path / "c", shell=QUIET)


def test_a_run_goes_on_under_another_execution(recipe, whole, tmp_path, capsys):
    run = tmp_path / "run"
    train(recipe.replace(steps=2), run=run, shell=QUIET)
    capsys.readouterr()
    how = Execution(remat="dots", accumulate=2, loss_chunks=2)
    train(recipe, run=run, shell=QUIET, execution=how)
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-5)
    said = [line for line in capsys.readouterr().err.splitlines() if "from step 2 on" in line]
    assert len(said) == 1
    assert "remat=dots instead of none, accumulate=2 instead of 1, loss_chunks=2 instead of 1" in said[0]
    record = read_record(run)
    assert record["run_id"] == recipe.run_id
    assert [(step, one.remat, one.accumulate) for step, one in executions(record)] == [(0, "none", 1), (2, "dots", 2)]


def test_the_record_says_from_which_step_an_execution_held(recipe, tmp_path):
    """Where a run goes back before a change, by a rollback or a lost checkpoint, the steps since are done again."""
    plain, dots = Execution(), Execution(remat="dots")

    def begin(execution, *steps):
        run = Run(tmp_path / "run", recipe, execution)
        said = [run.begin(step) for step in steps]
        run.close()
        return said, executions(read_record(run.folder))

    assert begin(plain, 0) == ([None], [(0, plain)])
    assert begin(dots, 8) == (["remat=dots instead of none"], [(0, plain), (8, dots)])
    assert begin(dots, 9) == ([None], [(0, plain), (8, dots)])
    assert begin(dots, 4) == (["remat=dots instead of none"], [(0, plain), (4, dots)])
    assert begin(plain, 3) == ([None], [(0, plain)])
    assert begin(dots, 0) == ([None], [(0, dots)])


def test_a_recipe_with_microbatches_is_trained_in_them(recipe, tmp_path):
    dropped = recipe.replace(train=dataclasses.replace(SHAPE, dropout=True), steps=1, accumulate=2)
    train(dropped, run=tmp_path / "run", shell=QUIET)
    record = read_record(tmp_path / "run")
    assert record["run_id"] == dropped.run_id
    assert executions(record)[0][1].accumulate == 2
    train(recipe_of(record), data=recipe.folders, run=tmp_path / "run", steps=2, shell=QUIET)
    with pytest.raises(InputError, match=r"the recipe has accumulate=2, .* the execution accumulate=4; give one"):
        train(dropped, run=tmp_path / "other", shell=QUIET, execution=Execution(accumulate=4))


def test_former_versions_counted_no_microbatches():
    former = PLAIN.replace(train=TrainConfig(dropout=True), former={"remat": "none"})
    assert former.under(Execution(accumulate=2)).run_id == former.run_id
    assert former.replace(former={}).under(Execution(accumulate=2)).run_id != former.replace(former={}).run_id


def test_microbatches_are_part_of_a_run_where_they_change_more_than_rounding(recipe, tmp_path):
    dropped = recipe.replace(train=dataclasses.replace(SHAPE, dropout=True), steps=1)
    assert dropped.under(Execution(accumulate=2)).run_id != dropped.run_id
    assert recipe.under(Execution(accumulate=2)).run_id == recipe.run_id
    experts = recipe.replace(model=CONFIG.replace(experts=Experts(4, 2, 8)))
    assert experts.under(Execution(accumulate=2)).run_id != experts.run_id
    train(dropped, run=tmp_path / "run", shell=QUIET)
    with pytest.raises(InputError, match="accumulate=1 there, 2 here"):
        train(dropped, run=tmp_path / "run", shell=QUIET, execution=Execution(accumulate=2))


def test_microbatches_are_not_counted_into_a_former_run(recipe):
    """Versions that kept remat in the model's config gave one id whatever the microbatches."""
    dropped = recipe.replace(train=dataclasses.replace(SHAPE, dropout=True))
    identity = dropped.identity
    former = Recipe.from_dict({**identity, "config": {**identity["config"], "remat": "none"}})
    made, how = overlay({"accumulate": 2}, former)
    assert how.accumulate == 2
    assert made.run_id == former.run_id
    now = dropped.under(how)
    assert not difference(former, now)
    assert now.as_in(former).run_id == former.run_id
    assert now.as_in(dropped) == now


def test_what_a_former_version_did_not_note_of_an_execution_is_as_it_is_now(recipe, tmp_path):
    run = Run(tmp_path / "run", recipe)
    former = {**recipe.identity, "config": {**recipe.identity["config"], "remat": "none", "scan_layers": True}}
    del run.record["executions"]
    run.update(identity=former)
    run.close()
    run = Run(tmp_path / "run", recipe, Execution(remat="dots", scan_layers=True, accumulate=2, mesh={"data": 1}))
    assert run.begin(4) == "remat=dots instead of none"
    run.close()
    noted = executions(read_record(tmp_path / "run"))
    assert [(first, one.remat, one.accumulate) for first, one in noted] == [(0, "none", 2), (4, "dots", 2)]


def test_a_recipe_says_what_is_missing(recipe, data, tmp_path):
    hashes = recipe.replace(data=recipe.data, folders=None)
    with pytest.raises(InputError, match=r"the folder of the data .* is not known; give data=FOLDER"):
        train(hashes, run=tmp_path / "run", shell=QUIET)
    with pytest.raises(InputError, match="holds other data than the recipe names"):
        train(recipe.replace(data="0" * 64), run=tmp_path / "run", data=data, shell=QUIET)
    with pytest.raises(InputError, match="give a Recipe, or a ModelConfig"):
        train(CONFIG, run=tmp_path / "run")
    for recipes in (PLAIN, [CONFIG], "recipe"):
        with pytest.raises(InputError, match="give a list of Recipes"):
            population(recipes, runs=[tmp_path / "run"])
    with pytest.raises(InputError, match="at least one lane"):
        population([], runs=[])
    with pytest.raises(InputError, match="data=3 must be a folder"):
        Recipe(CONFIG, data=3)
    with pytest.raises(InputError, match="unknown objective 'dpo'"):
        Recipe(CONFIG, objective="dpo")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_the_weights_of_another_model(recipe, whole, tmp_path):
    """With a fresh optimizer, at step 0, whatever holds the weights; and goes on after an interruption."""
    start = weights(whole)
    assert start == weights(whole)
    continued = recipe.replace(start=start, steps=2)
    result = train(continued, run=tmp_path / "run", shell=QUIET)
    assert result.steps == 2
    assert losses(tmp_path / "run")[0] < losses(whole)[0] - 0.05
    save_hf(*load_run(whole), tmp_path / "hf")
    assert weights(tmp_path / "hf") == start
    from_folder = recipe.replace(start=weights(tmp_path / "hf"), steps=1)
    train(from_folder, run=tmp_path / "other", shell=QUIET)
    assert losses(tmp_path / "other") == losses(tmp_path / "run")[:1]
    train(from_folder.replace(steps=2), run=tmp_path / "other", shell=QUIET)
    assert losses(tmp_path / "other") == losses(tmp_path / "run")
    assert load_run(tmp_path / "run")[1].keys() == load_run(whole)[1].keys()
    with pytest.raises(InputError, match=r"do not fit the model: embedding/tokens is .*320, 16.* there and .*321, 16"):
        train(continued.replace(model=CONFIG.replace(vocab_size=321)), run=tmp_path / "no", shell=QUIET)
    with pytest.raises(InputError, match="holds other weights than the recipe names"):
        train(continued.replace(start=Weights("0" * 64, whole)), run=tmp_path / "nor", shell=QUIET)
    with pytest.raises(InputError, match="give its Weights the path"):
        train(continued.replace(start=Weights(start.sha256)), run=tmp_path / "nor", shell=QUIET)
    with pytest.raises(InputError, match="give its Branch the folder"):
        train(continued.replace(start=Branch("abc", 2)), run=tmp_path / "nor", shell=QUIET)
    save_quantized(CONFIG, prepare(*load_run(whole), "int8"), tmp_path / "int8", "int8")
    with pytest.raises(InputError, match="holds rounded weights, which cannot be trained"):
        weights(tmp_path / "int8")
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "nor").exists()
