"""The overlay of a point on a base: what is given is changed and nothing else, and what cannot be is refused."""

import pytest

from experiments.inputs import read_changes
from experiments.sweep.space.overlay import apply, rebase
from experiments.sweep.trial import Decode, Trial
from model import Execution, Experts, accounting, presets
from model.errors import InputError, UnknownNameError
from train import HParams, Recipe, TrainConfig
from train.overlay import overlay, overlay_program

CONFIG = presets.get("tiny")
BASE = Trial(Recipe(CONFIG, hparams=HParams(warmup_fraction=0.05), steps=100))


def test_every_field_of_all_configs_can_be_varied():
    plain = Trial(Recipe(CONFIG, steps=100))
    for part in (CONFIG, plain.recipe.train, plain.recipe.hparams, plain.execution):
        for name, value in part.to_dict().items():
            assert apply(plain, {name: value}).replace(point={}) == apply(plain, {}), name
    point = {"d_model": 32, "num_heads": 4, "schedule": "wsd", "learning_rate": 1e-2, "decode.batch": 4}
    trial = apply(BASE, point | {"remat": "dots"})
    assert trial.recipe.model == CONFIG.replace(d_model=32, num_heads=4)
    assert trial.recipe.train == TrainConfig(schedule="wsd")
    assert trial.recipe.hparams == BASE.recipe.hparams.replace(learning_rate=1e-2, total_steps=100)
    assert trial.execution == Execution(remat="dots")
    assert trial.decode == Decode(batch=4)


def test_fields_of_one_config_change_together():
    assert apply(BASE, {"num_heads": 3, "d_model": 18}).recipe.model.head_dim == 6


def test_the_horizon_is_that_of_the_whole_run():
    assert apply(BASE, {"steps": 7}).recipe.hparams.total_steps == 7
    assert apply(BASE, {"total_steps": 500}).recipe.hparams.total_steps == 500
    constant = apply(BASE, {"schedule": "constant", "warmup_steps": 3})
    assert constant.recipe.hparams.total_steps == 0, "nothing reads it"
    assert rebase(BASE, {"schedule": "wsd"}).recipe.hparams.total_steps == 0, "the base leaves it to the points"


def test_lengths_in_tokens():
    assert apply(BASE, {"tokens": 1e5}).steps == round(1e5 / 1024)
    assert apply(BASE, {"tokens": 10_000, "batch_size": 4}).steps == round(10_000 / 512)
    assert apply(BASE, {"tokens": 1}).steps == 1
    wide = apply(BASE, {"tokens_per_parameter": 20, "d_model": 64})
    assert wide.steps == round(20 * accounting.parameters(wide.recipe.model).total / 1024)


def test_one_warmup_replaces_the_other():
    assert apply(BASE, {"warmup_steps": 0}).recipe.hparams.warmup_fraction == 0, "no warm-up at all"
    assert apply(apply(BASE, {"warmup_steps": 9}), {"warmup_fraction": 0.5}).recipe.hparams.warmup_steps == 0


def test_names_with_a_dot_reach_into_a_part_or_make_it():
    given = {"experts.count": 4, "experts.top_k": 2, "experts.d_ff": 16}
    made = apply(BASE, given)
    assert made.recipe.model.experts == Experts(4, 2, 16)
    assert apply(made, {"experts.count": 8}).recipe.model.experts == Experts(8, 2, 16)
    assert apply(made, {"experts": None}).recipe.model == CONFIG
    assert apply(BASE, {"experts": {"count": 4, "top_k": 2, "d_ff": 16}}).recipe.model == made.recipe.model


def test_the_same_content_is_the_same_trial_however_it_is_written():
    ids = {
        apply(BASE, point).id
        for point in ({"weight_decay": 1, "rope_base": 5000}, {"weight_decay": 1.0, "rope_base": 5000.0, "_note": 3})
    }
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"num_heads": 3}, r"^num_heads=3, seed=1: num_heads=3 does not divide d_model=16"),
        ({"num_layers": 2.5}, "num_layers=2.5 must be a whole number"),
        ({"num_layers": True}, "num_layers=True must be a whole number"),
        ({"num_layers": "two"}, "num_layers='two' must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0"),
        ({"learning_rate": True}, "learning_rate=True must be a number"),
        ({"learning_rate": None}, "learning_rate=None must be a number"),
        ({"norms": 1}, "norms=1 must be true or false"),
        ({"schedule": 3}, "schedule=3 must be text"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 must be a whole number"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"tokens": -5}, "tokens=-5 must be a number above 0"),
        ({"steps": 5, "tokens": 9}, "steps and tokens say the same thing"),
        ({"experts.count": 4}, "Experts lacks top_k, d_ff"),
        ({"experts": None, "experts.count": 4}, "experts is given as a whole and as experts.count"),
        ({"decode.batch": 1.5}, "decode.batch=1.5 must be a whole number"),
        ({"batch_size": 6, "accumulate": 4}, "accumulate=4 does not divide batch_size=6"),
    ],
)
def test_what_cannot_be_is_refused_with_the_point(point, message):
    with pytest.raises(InputError, match=message) as caught:
        apply(BASE, {**point, "seed": 1})
    assert "seed=1: " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("learning_rat", "learning_rate"),
        ("token_per_parameter", "tokens_per_parameter"),
        ("experts.cont", "experts.count"),
        ("decode.contex", "decode.context"),
        ("derived", "d_model"),
        ("expert.count", "experts"),
    ],
)
def test_an_unknown_field_names_the_close_one(name, close):
    with pytest.raises(UnknownNameError, match=f"unknown setting '{name}'; did you mean") as caught:
        apply(BASE, {name: 1})
    assert close in str(caught.value) or name == "derived"


def test_a_length_is_no_field_of_the_base():
    with pytest.raises(InputError, match="tokens is not a field of the base; give --steps, or --set tokens=5"):
        rebase(BASE, {"tokens": 5})
    with pytest.raises(InputError, match="a trial needs a length: give --steps"):
        apply(Trial(Recipe(CONFIG)), {})


def test_the_command_line_of_one_run_is_the_same_overlay():
    texts = ("num_layers=3", "schedule=wsd", "beta2=0.99", "experts.count=4", "experts.top_k=2", "experts.d_ff=8")
    recipe, execution = overlay(read_changes((*texts, "loss_chunks=2")), Recipe(CONFIG))
    assert (recipe.model.num_layers, recipe.model.experts) == (3, Experts(4, 2, 8))
    assert recipe.train == TrainConfig(schedule="wsd")
    assert recipe.hparams == HParams(beta2=0.99)
    assert execution == Execution(loss_chunks=2)
    with pytest.raises(UnknownNameError, match="'num_layers'"):
        overlay({"num_layer": 3}, Recipe(CONFIG))


def test_where_nothing_is_trained_the_model_and_its_execution_are_fields():
    config, execution = overlay_program({"num_layers": 1, "remat": "full", "accumulate": 3}, CONFIG)
    assert (config.num_layers, execution) == (1, Execution(remat="full", accumulate=3))
    with pytest.raises(UnknownNameError, match="learning_rate"):
        overlay_program({"learning_rate": 1.0}, CONFIG)
