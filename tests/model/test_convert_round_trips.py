"""What is saved is what was loaded, in every precision, in shards or not, and nothing is half written."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from model import Experts, InputError, ModelConfig, init, presets
from model.convert import convert, huggingface, load_hf, save_hf

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])  # stored as float32, float16 and bfloat16
def test_every_stored_precision_loads_in_the_one_that_is_asked_for(name, hf):
    _, full = hf(name)
    _, half = load_hf(FIXTURES / name, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(full)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    # All fixtures' numbers are bfloat16 numbers, so that none is rounded.
    jax.tree.map(np.testing.assert_array_equal, full, jax.tree.map(lambda leaf: leaf.astype("float32"), half))


def test_bfloat16_parameters_are_saved_as_such(tmp_path, assert_same):
    loaded = load_hf(FIXTURES / "phi3", dtype="bfloat16")
    save_hf(*loaded, tmp_path / "saved")
    assert {str(value.dtype) for value in load_file(tmp_path / "saved" / "model.safetensors").values()} == {"bfloat16"}
    assert_same(loaded, load_hf(tmp_path / "saved", dtype="bfloat16"))


def test_shards_hold_the_same_model(tmp_path, hf, assert_same):
    loaded = hf("mixtral")
    save_hf(*loaded, tmp_path / "saved", shard_bytes=8000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert_same(loaded, load_hf(tmp_path / "saved"))


@pytest.mark.parametrize("name", [name for name in presets.names() if name != "flash-moe"])
def test_every_preset_has_a_model_type(name):
    config = presets.get(name)
    family, raw = huggingface.choose_family(config, None)
    assert raw["model_type"] == family.model_type


def test_what_transformers_wants_of_a_gemma(hf):
    """The classes of its text part, and a window even where no layer has one."""
    config, _ = hf("gemma3")
    for head, name in {"classifier": "Gemma3TextForSequenceClassification", "none": "Gemma3TextModel"}.items():
        _, raw = huggingface.choose_family(config.replace(head=head, sliding_window=None), "gemma3_text")
        assert raw["architectures"] == [name]
        assert raw["sliding_window"] == 4096
        assert set(raw["layer_types"]) == {"full_attention"}


def test_equal_functions_are_saved_alike(tmp_path):
    config = ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=2,
        num_heads=2,
        d_ff=99,  # no layer is dense
        layer_pattern=("local", "local"),  # without a window
        experts=Experts(4, 2, 8, router="softmax_of_chosen", normalise=False, dispatch="capacity"),
        compute_dtype="bfloat16",
    )
    params = init(config, jax.random.key(0))
    save_hf(config, params, tmp_path / "saved")
    loaded, same = load_hf(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "mixtral"
    assert loaded.experts == Experts(4, 2, 8, router="softmax", normalise=True)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_an_architecture_without_model_type_is_refused(tmp_path, hf):
    config = presets.get("tiny").replace(qk_norm=True, position="none")
    params = init(config, jax.random.key(0))
    with pytest.raises(InputError, match=r"no model_type that isoflop writes can.*position='none'"):
        save_hf(config, params, tmp_path / "saved")
    with pytest.raises(InputError, match="model_type 'gpt2' cannot hold this architecture"):
        save_hf(*hf("llama"), tmp_path / "saved", model_type="gpt2")
    with pytest.raises(InputError, match="unknown model_type 'lama'; supported are 'llama', 'mistral'"):
        save_hf(*hf("llama"), tmp_path / "saved", model_type="lama")
    assert not (tmp_path / "saved").exists()


def test_a_model_type_may_be_chosen(tmp_path, hf, assert_same):
    config, params = hf("llama")
    save_hf(config, params, tmp_path / "saved", model_type="phi3")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "phi3"
    assert_same((config, params), load_hf(tmp_path / "saved"))


def test_parameters_that_are_not_the_configs_are_refused(tmp_path, hf):
    config, params = hf("llama")
    flat = traverse_util.flatten_dict(params)
    without = {path: leaf for path, leaf in flat.items() if path != ("head", "weight")}
    with pytest.raises(InputError, match=r"head/weight has shape None; the config requires \(16, 64\)"):
        save_hf(config, traverse_util.unflatten_dict(without), tmp_path / "saved")
    mixed = {path: leaf.astype("bfloat16" if "head" in path else "float32") for path, leaf in flat.items()}
    with pytest.raises(InputError, match="all float32 or all bfloat16"):
        save_hf(config, traverse_util.unflatten_dict(mixed), tmp_path / "saved")
    with pytest.raises(InputError, match=r"not those of infer\.prepare"):
        save_hf(config, {**params, "layers": (params["layers"],)}, tmp_path / "saved")


def test_only_our_own_models_are_replaced(tmp_path, hf):
    loaded, folder = hf("llama"), tmp_path / "saved"
    folder.mkdir()
    save_hf(*loaded, folder, shard_bytes=8000)  # an empty folder is free
    (folder / "tokenizer.json").write_text("{}")
    save_hf(*loaded, folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    )
    shutil.copytree(FIXTURES / "llama", tmp_path / "foreign")
    with pytest.raises(InputError, match="is not empty and its model was not written by isoflop"):
        save_hf(*loaded, tmp_path / "foreign")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["foreign", "saved"]


def test_nothing_half_written_stays(tmp_path, monkeypatch, hf):
    def fail(folder, *rest):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", fail)
    with pytest.raises(OSError, match="no space left"):
        save_hf(*hf("llama"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_convert_takes_the_tokenizer_along(copy, tmp_path, assert_same):
    folder = copy("qwen3")
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "converted", dtype="bfloat16")
    assert (tmp_path / "converted" / "tokenizer.json").is_file()
    assert_same(load_hf(tmp_path / "converted"), load_hf(folder))
