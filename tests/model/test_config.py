"""Configs: derived fields follow their source, contradictions and unknown names are errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from model import InputError, ModelConfig, feedforward, presets
from model.feedforward import FeedForward

BASE = {"vocab_size": 64, "d_model": 16, "num_layers": 2, "num_heads": 4}


def make(**changes):
    return ModelConfig(**{**BASE, **changes})


def test_derived_fields_follow_their_source():
    config = make(gated=False)
    assert (config.num_kv_heads, config.head_dim, config.d_ff) == (4, 4, 64)
    wide = config.replace(d_model=32, num_heads=2)
    assert (wide.num_kv_heads, wide.head_dim, wide.d_ff) == (2, 16, 128)
    # 8/3 of 32 is 85.3; up to a multiple of 8.
    assert wide.replace(gated=True).d_ff == 88
    assert wide.replace(gated=True).replace(d_model=24).d_ff == 64


def test_given_fields_stay():
    config = make(num_kv_heads=2, head_dim=8, d_ff=40)
    wide = config.replace(d_model=32, num_heads=8)
    assert (wide.num_kv_heads, wide.head_dim, wide.d_ff) == (2, 8, 40)
    pinned = make().replace(d_ff=40).replace(d_model=32)
    assert pinned.d_ff == 40
    assert pinned.head_dim == 8, "what was derived is still derived after another field was given"
    assert pinned.replace(d_ff=None).d_ff == 88, "None means derive again"


def test_replace_leaves_the_original_alone():
    config = make()
    config.replace(d_model=32)
    assert config == make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 32


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *[
            ({name: value}, name)
            for name in ("vocab_size", "d_model", "num_layers", "num_heads", "max_seq_len")
            for value in (0, -1, 1.5, True, "4", None)
        ],
        *[({name: value}, name) for name in ("num_kv_heads", "head_dim", "d_ff") for value in (0, -1, 1.5, True)],
        ({"num_heads": 5}, "num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"num_kv_heads": 8}, "num_kv_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"d_model": 12}, "head_dim"),  # derived: 12 / 4 = 3
        ({"position": "sinusoidal", "d_model": 15, "head_dim": 4}, "d_model"),
        ({"position": "sideways"}, "position"),
        ({"norm": "batchnorm"}, "norm"),
        ({"activation": "swish"}, "activation"),
        ({"compute_dtype": "float64"}, "compute_dtype"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon"),
        ({"rope_base": -1.0}, "rope_base"),
        ({"eos_token_ids": (64,)}, "eos_token_ids"),
        ({"eos_token_ids": (-1,)}, "eos_token_ids"),
    ],
)
def test_a_contradiction_names_its_field(changes, field):
    with pytest.raises(ValueError, match=field) as caught:
        make(**changes)
    assert isinstance(caught.value, InputError)
    with pytest.raises(ValueError, match=field):
        make().replace(**changes)


def test_the_remedy_is_in_the_message():
    with pytest.raises(ValueError, match=r"num_heads=6 does not divide d_model=512.*try 4 or 8"):
        make(d_model=512, num_heads=6)


@pytest.mark.parametrize(
    ("call", "close"),
    [
        (lambda: make().replace(num_layer=3), "num_layers"),
        (lambda: ModelConfig.from_dict({**BASE, "d_modell": 16}), "d_model"),
        (lambda: presets.get("gpt2-smal"), "gpt2-small"),
        (lambda: presets.get("tinny"), "tiny"),
    ],
)
def test_an_unknown_name_lists_the_close_ones(call, close):
    with pytest.raises(KeyError, match=close) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert not str(caught.value).startswith(("'", '"')), "a sentence, not the repr that KeyError prints"


def test_a_name_close_to_nothing_lists_all():
    with pytest.raises(KeyError) as caught:
        presets.get("zzzzzzzz")
    assert all(name in str(caught.value) for name in presets.names())


@pytest.mark.parametrize("name", presets.names())
def test_presets_round_trip_through_json(name):
    config = presets.get(name)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_equal_configs_are_one_key():
    given = make(num_kv_heads=4, head_dim=4)
    assert given == make()
    assert len({given, make(), make(d_ff=40)}) == 2
    # jit's static arguments must be hashable however the stop ids came.
    assert hash(make(eos_token_ids=[1, 2])) == hash(make(eos_token_ids=(1, 2)))


def test_a_config_that_lacks_a_field_says_which():
    with pytest.raises(InputError, match="d_model"):
        ModelConfig.from_dict({name: value for name, value in BASE.items() if name != "d_model"})


def test_an_activation_without_a_function_is_an_error(monkeypatch):
    config = presets.get("tiny")
    monkeypatch.delitem(feedforward.ACTIVATIONS, config.activation)
    with pytest.raises(InputError, match="has no function in ACTIVATIONS of model/feedforward"):
        FeedForward(config).init(jax.random.key(0), jnp.zeros((1, 1, config.d_model)))
