"""What is converted can be used by itself: its tokenizer goes along."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.commands.models.convert import convert
from model import InputError, apply, presets
from model.convert import load_hf, save_hf
from model.quantized import save_quantized
from model.store import open_model
from model.tokenizer import load_tokenizer


@pytest.fixture
def model(random_params):
    config = presets.get("tiny").replace(vocab_size=320)
    return config, random_params(config)


def test_a_run_becomes_a_folder_with_its_tokenizer(model, data, tmp_path, monkeypatch):
    config, params = model
    monkeypatch.setattr("model.runs.load_run", lambda folder, base: (config, params))
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"schema_version": 1, "data": str(data)}))
    convert(run, tmp_path / "hf")
    found = open_model(tmp_path / "hf")
    text = "The people of the United States"
    assert found.tokenizer.encode(text) == open_model(tmp_path / "hf", data).tokenizer.encode(text)
    np.testing.assert_array_equal(found.params["embedding"]["tokens"], params["embedding"]["tokens"])


ENCODER = {"stack": "encoder", "head": "masked-language-model", "head_bias": True, "position": "learned"}
ENCODER |= {"norm": "layernorm", "norm_epsilon": 1e-12, "norm_placement": "post", "embedding_norm": True}
ENCODER |= {
    "gated": False,
    "activation": "gelu",
    "use_bias": True,
    "num_token_types": 2,
    "num_layers": 1,
    "num_kv_heads": 2,
}
T5 = {"stack": "encoder-decoder", "position": "relative", "attention_scale": 1.0, "scale_logits": True, "num_layers": 1}
T5 |= {"gated": False, "activation": "relu", "norm_epsilon": 1e-6, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("fields", "objective", "names"),
    [
        (ENCODER | {"vocab_size": 321}, {"name": "masked"}, {320: "[MASK]"}),
        (ENCODER | {"vocab_size": 328}, {"name": "masked", "mask_id": 322}, {322: "[MASK]"}),
        (T5 | {"vocab_size": 322}, {"name": "spans", "sentinels": 2}, {321: "<extra_id_0>", 320: "<extra_id_1>"}),
    ],
)
def test_the_tokens_of_an_objective_go_along(fields, objective, names, random_params, data, tmp_path, monkeypatch):
    """The tokenizer knows them, reads texts as before, and the weights keep ids that no token has."""
    config = presets.get("tiny").replace(**fields)
    monkeypatch.setattr("model.runs.load_run", lambda folder, base: (config, random_params(config)))
    run = tmp_path / "run"
    run.mkdir()
    record = {"schema_version": 1, "data": str(data), "identity": {"objective": objective}}
    (run / "run.json").write_text(json.dumps(record))
    for _ in range(2):  # the second one replaces the first
        convert(run, tmp_path / "hf")
    found, before = open_model(tmp_path / "hf"), load_tokenizer(data)
    assert {number: found.tokenizer.special_tokens[number] for number in names} == names
    assert found.tokenizer.vocab_size == max(names) + 1
    assert found.config.vocab_size == fields["vocab_size"]
    number, name = next(iter(names.items()))
    text = f"The people {name} of"
    assert found.tokenizer.encode(text) == before.encode(text)
    assert number in found.tokenizer.encode(text, special=True)
    assert found.tokenizer.eos_ids == before.eos_ids
    named = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert name in (named.get("mask_token"), *named.get("additional_special_tokens", ()))


def test_rounded_weights_are_refused(model, tmp_path):
    save_quantized(*model, tmp_path / "small", "int8")
    with pytest.raises(InputError, match="small holds rounded weights; give the model that it was made of"):
        convert(tmp_path / "small", tmp_path / "hf")


@pytest.mark.parametrize("tied", [True, False])
def test_a_mup_run_becomes_the_same_function(tied, random_params, tmp_path, monkeypatch, capsys):
    config = presets.get("tiny").replace(
        vocab_size=320, tie_embeddings=tied, parameterization="mup", base_d_model=12, base_num_layers=1
    )
    params = random_params(config)
    monkeypatch.setattr("model.runs.load_run", lambda folder, base: (config, params))
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"schema_version": 1}))
    convert(run, tmp_path / "hf")
    said = capsys.readouterr().out
    assert "the muP multipliers are folded into the weights" in said
    assert ("the head, which was the token table, is a matrix of its own" in said) == tied
    tokens = jnp.arange(16).reshape(2, 8)
    np.testing.assert_allclose(apply(*load_hf(tmp_path / "hf"), tokens), apply(config, params, tokens), atol=1e-4)


@pytest.mark.slow
def test_how_a_run_was_computed_does_not_keep_it_from_being_written(isoflop, data, tmp_path):
    """Trained, written and evaluated as a user does; the losses of the run and of the folder are equal."""
    run, folder = tmp_path / "run", tmp_path / "hf"
    ways = ("remat=dots", "loss_chunks=2", "attention_kernel=xla", "zero_readout=true")
    scaled = ("parameterization=mup", "base_d_model=6", "base_num_layers=2")
    call = ("--steps", 4, "--batch-size", 2, "--seq-len", 32, "--evaluate-tokens", 512)
    assert isoflop("train", "study-8", "--data", data, "--out", run, *call, "--set", *ways, *scaled)[0] == 0
    code, out, err = isoflop("model", "convert", run, folder)
    assert (code, err) == (0, "")
    assert "the muP multipliers are folded into the weights" in out
    losses = []
    for place in (run, folder):
        file = tmp_path / f"{place.name}.json"
        assert isoflop("eval", place, "--data", data, "--evaluate-tokens", 512, "--json", file)[0] == 0
        losses.append(json.loads(file.read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_folder_keeps_its_tokenizer(model, data, tmp_path):
    save_hf(*model, tmp_path / "one")
    shutil.copy(data / "tokenizer.model", tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
