"""A folder of rounded weights comes back as the tree that was written, without the code that made it."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from infer import prepare
from model import InputError, ModelConfig, init
from model.quantized import RECORD, ROUNDED, TENSORS, load_quantized, save_quantized

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=24, max_seq_len=16)


def prepared(config, weights):
    """A tree as `prepare` makes it, of other numbers; nothing is compiled."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    made = jax.eval_shape(functools.partial(prepare, config, weights=weights), shapes)
    return jax.tree.map(lambda leaf: (np.arange(leaf.size) % 100).reshape(leaf.shape).astype(leaf.dtype), made)


def test_every_architecture_comes_back(variant, tmp_path):
    for weights in ROUNDED:
        params = prepared(variant, weights)
        save_quantized(variant, params, tmp_path / "model", weights)
        config, loaded = load_quantized(tmp_path / "model")
        assert config == variant
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        for found, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def folder(tmp_path):
    save_quantized(CONFIG, prepared(CONFIG, "int4"), tmp_path / "model", "int4")
    return tmp_path / "model"


def change(folder, edit):
    arrays = load_file(folder / TENSORS)
    edit(arrays)
    save_file(arrays, folder / TENSORS)


DOWN = "['layers'][1]['feed_forward']['down']['weight']"
NORM = "['final_norm']['scale']"
DAMAGE = {
    "a matrix is missing": (lambda a: [a.pop(f"{DOWN}.{n}") for n in ("packed", "scale")], "holds .* and a model of"),
    "a layer is missing": (lambda a: [a.pop(n) for n in list(a) if "[0]" in n], "not as this version stores it"),
    "a scale is missing": (lambda a: a.pop(f"{DOWN}.scale"), r"\['down'\]\['weight'\] not as this version stores it"),
    "a vector is longer": (lambda a: a.update({NORM: np.ones(17, np.float32)}), "holds .* and a model of"),
    "another name": (lambda a: a.update({"['layers'][1]['old'].packed": a.pop(f"{DOWN}.packed")}), "not as this"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_folder_that_is_not_its_configs_is_refused(folder, kind):
    edit, message = DAMAGE[kind]
    change(folder, edit)
    with pytest.raises(InputError, match=message):
        load_quantized(folder)


def test_a_damaged_folder_is_refused_and_a_foreign_one_not_replaced(folder, tmp_path):
    record = json.loads((folder / RECORD).read_text())
    for content in ("{", json.dumps({**record, "config": {"d_model": 3}}), json.dumps([record])):
        (folder / RECORD).write_text(content)
        with pytest.raises(InputError, match="cannot be read as a quantized model"):
            load_quantized(folder)
    (folder / TENSORS).write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read as a quantized model"):
        load_quantized(folder)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=r"is not empty and has no quantized\.json"):
        save_quantized(CONFIG, prepared(CONFIG, "int8"), tmp_path, "int8")
