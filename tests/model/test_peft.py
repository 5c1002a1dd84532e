"""Adapters in PEFT's format: what is written is read back as the same function, and PEFT computes what we do."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import InputError, forward
from model.adapters import Adapter, adapted, attach, first_columns, fold, init_adapter, mask_and_scale
from model.convert import fold as without_multipliers
from model.convert import load_hf, load_peft, merge_adapter, save_hf, save_peft

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
MAKE = FIXTURES.parent / "make_peft.py"
ADAPTER = Adapter(rank=3, alpha=4.0)
# Matrices as theirs, fused in different ways, latent attention with a shared expert, two stacks.
NAMES = ("llama", "gpt2", "phi3", "deepseek_v2", "t5", "bert-masked")


def trained(config, params, adapter=ADAPTER):
    """An adapter whose b is not zero, drawn without a program."""
    tree = jax.eval_shape(functools.partial(init_adapter, config, adapter), params, jax.random.key(0))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        scale = leaf.shape[-2] ** -0.5 / 3**0.5 if path[-1].key == "a" else 0.3  # a's as `init_adapter` draws it
        return jnp.asarray(scale * random.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def change(params, adapter, tree):
    """The model with the adapter merged into its matrices."""
    return fold(attach(params, tree, *mask_and_scale(adapter)))


def assert_close(ours, theirs, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_back(name, hf, tmp_path):
    config, params = hf(name)
    tree = trained(config, params)
    save_peft(config, ADAPTER, tree, tmp_path / "adapter", base=FIXTURES / name)
    adapter, again = load_peft(tmp_path / "adapter", config)
    assert_close(change(params, ADAPTER, tree), change(params, adapter, again))
    if not name.startswith(("gpt2", "phi3")):
        assert adapter.replace(targets=ADAPTER.targets) == ADAPTER
        jax.tree.map(np.testing.assert_array_equal, tree, again)
    # Once more: what was read from a fused matrix has one `a` and is written as narrow as it was read.
    save_peft(config, adapter, again, tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again"))
    assert before.keys() == after.keys()
    adapter, third = load_peft(tmp_path / "again", config)
    assert_close(change(params, adapter, third), change(params, adapter, again))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_experts_and_heads_are_written_where_they_are_modules(name, hf, tmp_path):
    config, params = hf(name)
    targets = ("output", "experts") if config.tie_embeddings else ("output", "experts", "head")
    adapter = ADAPTER.replace(targets=targets)
    tree = trained(config, params, adapter)
    save_peft(config, adapter, tree, tmp_path / "adapter")
    read, again = load_peft(tmp_path / "adapter", config)
    assert set(read.targets) == set(targets)
    assert_close(change(params, adapter, tree), change(params, read, again))


def test_the_files_are_as_peft_has_them(hf, tmp_path):
    config, params = hf("gpt2")
    adapter = ADAPTER.replace(targets=("query", "value", "output"), rank_stabilised=True)
    save_peft(config, adapter, trained(config, params, adapter), tmp_path / "adapter", base="gpt2")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["peft_type"], raw["task_type"], raw["base_model_name_or_path"]) == ("LORA", "CAUSAL_LM", "gpt2")
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"], raw["fan_in_fan_out"]) == (3, 4, True, True)
    assert raw["target_modules"] == ["attn.c_proj", "c_attn"]  # c_proj alone would fit the feed-forward's too
    assert raw["rank_pattern"] == {f"transformer.h.{layer}.attn.c_attn": 6 for layer in (0, 1)}
    np.testing.assert_allclose(list(raw["alpha_pattern"].values()), 4 * 2**0.5)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model.model.transformer.h.0."): t.shape for name, t in tensors.items()}
    assert shapes["attn.c_attn.lora_A.weight"] == (6, 16)
    assert shapes["attn.c_attn.lora_B.weight"] == (48, 6)
    assert shapes["attn.c_proj.lora_A.weight"] == (3, 16)


def test_a_mup_models_adapter_is_that_of_its_export(hf, tmp_path):
    """PEFT's files belong to the exported model, whose matrices hold the multipliers."""
    config, params = hf("llama")
    config = config.replace(parameterization="mup", base_d_model=8, base_num_layers=1)
    assert not config.tie_embeddings
    adapter = ADAPTER.replace(targets=(*ADAPTER.targets, "head"))
    tree = trained(config, params, adapter)
    save_peft(config, adapter, tree, tmp_path / "adapter")
    standard, exported = without_multipliers(config, params)
    expected = without_multipliers(config, change(params, adapter, tree))[1]
    assert_close(change(exported, *load_peft(tmp_path / "adapter", standard)), expected)
    assert_close(change(params, *load_peft(tmp_path / "adapter", config)), change(params, adapter, tree))


def test_a_lanes_columns_are_written_alone(hf, tmp_path):
    config, params = hf("llama")
    tree, alone = trained(config, params), ADAPTER.replace(rank=2, alpha=5.0)
    save_peft(config, alone, first_columns(tree, 2), tmp_path / "adapter")
    expected = fold(attach(params, tree, *mask_and_scale(ADAPTER, 2, 5.0)))
    assert_close(change(params, *load_peft(tmp_path / "adapter", config)), expected)
    with pytest.raises(InputError, match=r"not those of rank 2 .*give first_columns"):
        save_peft(config, alone, tree, tmp_path / "adapter")


def test_patterns_and_layers_without_an_adapter(hf, tmp_path):
    """Ranks and scales of their own are exact in the common ones."""
    config, params = hf("llama")
    folder = tmp_path / "adapter"
    save_peft(config, ADAPTER, trained(config, params), folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if (".1." in name and "q_proj" in name) or "up" in name}
    a, b = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{letter}.weight" for letter in "AB")
    tensors |= {a: tensors[a][:1], b: np.ascontiguousarray(tensors[b][:, :1])}
    save_file(tensors, file)
    raw = json.loads((folder / "adapter_config.json").read_text())
    raw |= {"alpha_pattern": {"layers.1.self_attn.q_proj": 7}, "rank_pattern": {"q_proj": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    adapter, tree = load_peft(folder, config)
    assert (adapter.rank, adapter.targets) == (3, ("query", "up"))
    query = change(params, adapter, tree)["layers"]["dense"]["attention"]["query"]["weight"]
    before = params["layers"]["dense"]["attention"]["query"]["weight"]
    np.testing.assert_array_equal(query[0], before[0])
    np.testing.assert_allclose(query[1], before[1] + 7 * (tensors[b] @ tensors[a]).T, atol=1e-5)


def test_a_merged_folder_is_the_model_with_its_adapter(hf, tmp_path):
    config, params = hf("gpt2")
    tree = trained(config, params)
    save_peft(config, ADAPTER, tree, tmp_path / "adapter")
    merge_adapter(FIXTURES / "gpt2", tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "gpt2"
    assert_close(load_hf(tmp_path / "merged")[1], change(params, ADAPTER, tree))


def _renamed(folder, old, new):
    file = folder / "adapter_model.safetensors"
    save_file({re.sub(old, new, name): value for name, value in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; isoflop reads LORA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base too"),
        ({"lora_alpha": "8"}, "lora_alpha='8' must be a number above 0"),
        ({"alpha_pattern": {"(": 3}}, "which is not a regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\] must be an object"),
        ({"r": 5}, r"has rank 3 in adapter_model\.safetensors and 5 by adapter_config"),
    ],
)
def test_a_record_that_says_something_else_is_an_error(values, sentence, hf, tmp_path):
    config, params = hf("llama")
    save_peft(config, ADAPTER, trained(config, params), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(InputError, match=sentence):
        load_peft(tmp_path / "adapter", config)


def test_an_adapter_of_something_else_is_an_error(hf, tmp_path):
    config, params = hf("llama")
    folder = tmp_path / "adapter"
    tree = trained(config, params)
    save_peft(config, ADAPTER, tree, folder)
    with pytest.raises(InputError, match=r"by lora_A \[3, 24\] and lora_B \[16, 3\], but the model's is 32 × 24"):
        load_peft(folder, config.replace(d_model=32))
    with pytest.raises(InputError, match=r"adapts model\.layers\.1.*not a matrix with an adapter"):
        load_peft(folder, config.replace(num_layers=1))
    save_peft(hf("gpt2")[0], ADAPTER, trained(*hf("gpt2")), tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"adapts transformer\.h\.0\.attn\.c_attn, which is not a matrix"):
        load_peft(tmp_path / "gpt2", config)
    with pytest.raises(InputError, match="not among its targets"):
        save_peft(config, ADAPTER.replace(targets=("query",)), tree, folder)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: t[:0] if "lora_A" in name else t[:, :0].copy() for name, t in whole.items()}, file)
    with pytest.raises(InputError, match=r"by lora_A \[0, 24\]"):
        load_peft(folder, config)
    save_file({name: t.astype(ml_dtypes.float8_e4m3fn) for name, t in whole.items()}, file)
    with pytest.raises(InputError, match="is stored as F8_E4M3; isoflop reads F64"):
        load_peft(folder, config)
    save_file(whole, file)
    _renamed(folder, r"model\.layers\.0\.mlp\.up_proj", "lm_head")
    with pytest.raises(InputError, match="changes lm_head by lora_A"):
        load_peft(folder, config)
    _renamed(folder, r"lm_head\.lora_A\.weight", "lm_head.lora_embedding_A")
    with pytest.raises(InputError, match="pairs of lora_A and lora_B"):
        load_peft(folder, config)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is a pickle"):
        load_peft(folder, config)
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        load_peft(FIXTURES / "llama", config)
    save_hf(config, params, tmp_path / "model")
    with pytest.raises(InputError, match=r"is not empty and has no adapter_config\.json"):
        save_peft(config, ADAPTER, tree, tmp_path / "model")


def peft():
    """Return a function that runs make_peft.py; skips without an interpreter that has torch, transformers and peft."""
    python = os.environ.get("ISOFLOP_TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers, peft"], capture_output=True).returncode:
        pytest.skip(f"{python} has no torch, transformers and peft; set ISOFLOP_TRANSFORMERS_PYTHON")

    def run(*arguments):
        done = subprocess.run([python, str(MAKE), *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


def error(config, params, base, folder):
    """The largest difference from PEFT's logits at real tokens, in their standard deviations."""
    given = np.load(base / "expected.npz")
    tokens, real = given["tokens"].astype(np.int32), given["mask"].astype(np.int32)
    ours = np.asarray(jax.jit(functools.partial(forward, config))(params, tokens, segment_ids=real).logits)
    theirs = np.load(folder / "actual.npz")["logits"]
    assert np.abs(theirs - given["logits"])[real > 0].max() > 0.1  # the adapter changes something
    return np.abs(ours - theirs)[real > 0].max() / theirs.std()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
        (
            "llama-llama3",
            {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
            | {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"q_proj": 3}},
        ),
        ("gpt2", {"r": 3, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        ("phi3", {"r": 3, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    ],
)
def test_peft_computes_what_we_do(name, values, hf, tmp_path):
    """Set ISOFLOP_TRANSFORMERS_PYTHON to an interpreter that has torch, transformers and peft."""
    run, base = peft(), FIXTURES / name
    config, params = hf(name)
    run("--make", base, tmp_path / "theirs", json.dumps(values))
    adapter, tree = load_peft(tmp_path / "theirs", config)
    with_adapter = attach(params, tree, *mask_and_scale(adapter))
    assert error(config, with_adapter, base, tmp_path / "theirs") < 1e-5
    for stabilised in (False, True):
        adapter = ADAPTER.replace(rank_stabilised=stabilised)
        folder = tmp_path / f"ours-{stabilised}"
        tree = trained(config, params, adapter)
        model_type = json.loads((base / "config.json").read_text())["model_type"]
        save_peft(config, adapter, tree, folder, base=base, model_type=model_type)
        assert len(adapted(config, adapter)) == len(jax.tree.leaves(tree)) // 2
        run("--check", base, folder)
        assert error(config, attach(params, tree, *mask_and_scale(adapter)), base, folder) < 1e-5
