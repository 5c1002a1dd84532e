"""What a run is told: values out of range are refused, none silently becomes another, all survive JSON."""

import json
import math

import jax
import numpy as np
import pytest

from model import InputError
from train import HParams, TrainConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", -1e-8),
        ("warmup_steps", -1),
        ("data_seed", -2),
        ("total_steps", 2**31),
        ("warmup_fraction", 1.5),
        ("decay_fraction", 1.5),
        ("decay_steps", -1),
        ("final_fraction", -0.1),
        ("clip_norm", -1),
        ("z_loss", -1e-4),
        ("dropout_rate", 1.0),
        ("init_scale", -1.0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        HParams(**{name: value})
    with pytest.raises(InputError, match=name):
        HParams().replace(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup_steps", 2.5), ("seed", 0.5), ("learning_rate", 1e39), ("beta1", 1 - 1e-12), ("dropout_rate", 1 - 1e-12)],
)
def test_no_value_silently_becomes_another(name, value):
    """2 steps for 2.5, an infinite rate for 1e39, a beta of exactly 1."""
    with pytest.raises(InputError, match=name):
        HParams(**{name: value})


@pytest.mark.parametrize(
    ("call", "close"),
    [
        (lambda: HParams(learning_rat=0.1), "learning_rate"),
        (lambda: HParams().replace(weight_deca=0.1), "weight_decay"),
        (lambda: TrainConfig().replace(batchsize=4), "batch_size"),
        (lambda: TrainConfig(schedule="cosin"), "cosine"),
    ],
)
def test_unknown_names_list_the_close_ones(call, close):
    with pytest.raises(KeyError, match=close):
        call()


def bits(hparams):
    return [leaf.tobytes() for leaf in jax.tree.leaves(hparams)]


def test_hparams_round_trip_to_the_bit():
    random = np.random.default_rng(0)
    for _ in range(200):
        rate = np.float32(10 ** random.uniform(-38, 3))
        hparams = HParams(learning_rate=rate, beta1=random.uniform(), seed=int(random.integers(2**31)))
        again = HParams(**json.loads(json.dumps(hparams.to_dict())))
        assert bits(again) == bits(hparams)
        assert again == hparams
        assert hash(again) == hash(hparams)
        assert bits(hparams.replace()) == bits(hparams)
        assert again.learning_rate == rate
    changed = HParams().replace(learning_rate=0.5)
    assert changed != HParams()
    assert changed.replace(learning_rate=HParams().learning_rate) == HParams()
    with pytest.raises(AttributeError):
        changed.learning_rate = 1.0


def test_train_config_round_trips_and_refuses():
    train_config = TrainConfig(batch_size=4, schedule="wsd", dropout=True)
    assert TrainConfig(**json.loads(json.dumps(train_config.to_dict()))) == train_config
    for name, value in (("batch_size", 0), ("seq_len", 1.5), ("batch_size", True)):
        with pytest.raises(InputError, match=name):
            TrainConfig(**{name: value})
