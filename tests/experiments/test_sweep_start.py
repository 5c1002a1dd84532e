"""A sweep whose trials start from a stored model: its lanes are the runs alone, over one copy of what is frozen."""

import json
import shutil
import signal

import jax
import pytest

from experiments.commands.sweep.options import SweepOptions
from experiments.sweep.checks import check_weights
from experiments.sweep.record import Sweep
from experiments.sweep.run import begin, run_sweep, with_places
from experiments.sweep.worker import work
from model import InputError, presets
from train import HParams, Recipe, Shell, TrainConfig, train, weights
from train.lanes.sequential import SequentialProgram
from train.recipe import Weights

TINY = presets.get("tiny").replace(num_layers=1, max_seq_len=32, d_ff=48)
TRAIN = TrainConfig(batch_size=4, seq_len=32)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A short run, whose parameters sweeps start from."""
    folder = tmp_path_factory.mktemp("model") / "base"
    recipe = Recipe(TINY.replace(vocab_size=320), TRAIN, HParams(), data=data, steps=2)
    train(recipe, run=folder, shell=Shell(evaluate_tokens=128))
    return folder


@pytest.fixture
def define(data, model, tmp_path):
    """A sweep of two ranks as `isoflop sweep run` defines it; nothing is written."""

    def define(**changes):
        given = {"set": ("lora_rank=2,4",), "lora": 4, "steps": 4, "lanes": 2, "evaluate_tokens": 128}
        given |= {"preset": str(model), "data": data, "out": tmp_path / "sweep", "batch_size": 4, "seq_len": 32}
        return SweepOptions(**given | changes).define()

    return define


def test_lanes_are_the_runs_alone_over_one_base(define, model, data, record, monkeypatch, tmp_path):
    """Ranks 2 and 4 of one adapter, interrupted and gone on with, and all the while one table of tokens in memory."""
    copies, step = [], SequentialProgram.step

    def watched(self, state, *rest):
        table = (320, TINY.d_model)
        copies.append(sum(array.shape == table for array in jax.live_arrays()))
        if len(copies) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, state, *rest)

    before = sum(array.shape == (320, TINY.d_model) for array in jax.live_arrays())
    monkeypatch.setattr(SequentialProgram, "step", watched)
    sweep = define()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep)
    runs = list((sweep.folder / "runs").iterdir())
    assert [json.loads((run / "run.json").read_text())["status"] for run in runs] == ["interrupted"] * 2
    assert all((run / "checkpoints" / "2").exists() for run in runs)
    rows = run_sweep(define())
    assert [row.state for row in rows] == ["finished", "finished"]
    assert {count - before for count in copies} == {1}
    start = json.loads((sweep.folder / "sweep.json").read_text())
    assert start["base"]["recipe"]["weights"] == weights(model).sha256
    assert start["weights"] == str(model)
    for row in rows:
        recipe = Sweep.read(sweep.folder).placed(row.trial.recipe)
        alone = tmp_path / f"alone-{row.trial.point['lora_rank']}"
        train(recipe, run=alone, data=data, shell=Shell(evaluate_tokens=128))
        assert record(alone) == record(sweep.run_folder(row.trial))


def test_a_moved_base_is_asked_for_and_taken_from_where_it_is(define, model, data, tmp_path):
    moved, gone = tmp_path / "moved", tmp_path / "gone"
    shutil.copytree(model, gone)
    sweep = define(preset=str(gone))
    begin(sweep)
    gone.rename(moved)
    sweep = Sweep.read(sweep.folder)
    with pytest.raises(InputError, match=r"are not at .*gone; `isoflop sweep resume .* --base PATH` continues"):
        check_weights(sweep)
    other = tmp_path / "other"
    train(Recipe.from_dict(json.loads((model / "run.json").read_text())["identity"]), run=other, data=data, steps=1)
    with pytest.raises(InputError, match="holds other weights than the sweep"):
        check_weights(with_places(sweep, weights=other))
    there = with_places(sweep, weights=moved)
    ledger = begin(there)
    assert Sweep.read(sweep.folder).weights == moved
    work(there, ledger)
    assert {row.state for row in ledger.rows()} == {"finished"}
    fresh = define(preset="tiny", set=("learning_rate=1e-3",), lora=None, out=tmp_path / "fresh")
    with pytest.raises(InputError, match="start from fresh parameters; leave --base out"):
        with_places(fresh, weights=moved)


def test_all_parameters_can_be_trained_from_a_model(define, model):
    """The base's own model and vocabulary stay, and every trial begins from its parameters."""
    sweep = define(lora=None, set=("learning_rate=1e-3,1e-2",))
    assert sweep.base.recipe.model == TINY.replace(vocab_size=320)
    assert sweep.base.recipe.start == weights(model)
    assert isinstance(sweep.placed(sweep.base.recipe).start, Weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": ("lora_rank=2,8",)}, "lora_rank=8 exceeds the adapter's rank=4"),
        ({"lora": None}, "lora_rank and lora_alpha are for a low-rank adapter"),
        ({"set": ("num_layers=1,2",)}, "do not fit the model"),
        ({"preset": "tiny"}, "must come from a model; give the sweep a run"),
        ({"policy": "population"}, "copies checkpoints, which hold no frozen parameters"),
    ],
)
def test_what_cannot_start_is_refused_before_anything_is_written(define, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        define(**changes)
    assert not (tmp_path / "sweep").exists()


def test_the_data_are_those_of_the_models_tokenizer(define, corpus, tmp_path):
    from train.data import prepare

    prepare(corpus, tmp_path / "other", vocab_size=300, validation_fraction=0.2)
    with pytest.raises(InputError, match="were prepared with another tokenizer than that of"):
        define(data=tmp_path / "other")
