"""Hugging Face folders: our logits are Transformers' logits, and what is saved is what was loaded.

The folders in tests/fixtures/hf hold random models of every family with the logits that Transformers gave for them.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from model import Experts, InputError, ModelConfig, forward, init, presets
from model.convert import convert, huggingface, load_hf, save_hf
from model.convert.families import FAMILIES

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
MAKE = FIXTURES.parent / "make_hf.py"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())


def outputs(config, params, given):
    """Logits (without a head: final hidden states) at the real tokens of a fixture."""
    inputs = {"segment_ids": given["mask"], "token_types": given.get("token_types")}
    if "encoder_tokens" in given:
        inputs |= {"encoder_tokens": given["encoder_tokens"], "encoder_segment_ids": given["encoder_mask"]}
    inputs = {name: value.astype(np.int32) for name, value in inputs.items() if value is not None}
    bare = config.head == "none"
    run = jax.jit(functools.partial(forward, config, outputs=("final_hidden",) if bare else ()))
    out = run(params, given["tokens"].astype(np.int32), **inputs)
    return at_tokens(np.asarray(out.final_hidden if bare else out.logits), given)


def at_tokens(logits, given):
    return logits[given["mask"].astype(bool)] if logits.ndim == 3 else logits


def error(config, params, given):
    """The largest difference from the fixture's logits, in their standard deviations."""
    expected = at_tokens(given["logits"], given)
    return np.abs(outputs(config, params, given) - expected).max() / expected.std()


def expected_of(folder):
    return dict(np.load(folder / "expected.npz"))


def assert_same(ours, theirs):
    (config, params), (other_config, other_params) = ours, theirs
    assert config == other_config
    assert jax.tree.structure(params) == jax.tree.structure(other_params)
    jax.tree.map(np.testing.assert_array_equal, params, other_params)


@pytest.fixture
def copy(tmp_path):
    """(fixture's name, changes of its config.json, function of its dict of tensors) → a folder."""

    def make(name, config=None, tensors=lambda all: all, to="copy"):
        folder = tmp_path / to
        shutil.copytree(FIXTURES / name, folder)
        raw = json.loads((folder / "config.json").read_text())
        raw = {key: value for key, value in {**raw, **(config or {})}.items() if key not in drop_of(config)}
        (folder / "config.json").write_text(json.dumps(raw))
        changed = tensors(load_file(folder / "model.safetensors"))
        save_file({key: np.ascontiguousarray(value) for key, value in changed.items()}, folder / "model.safetensors")
        return folder

    return make


DROP = object()


def drop_of(config):
    return {key for key, value in (config or {}).items() if value is DROP}


# ---------------------------------------------------------------------------------------------------- agreement


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    config, params = load_hf(FIXTURES / name)
    assert error(config, params, expected_of(FIXTURES / name)) < 1e-4


def test_every_family_has_a_fixture():
    types = {json.loads((FIXTURES / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert types == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_loading_what_was_saved_gives_the_same_model(name, tmp_path):
    loaded = load_hf(FIXTURES / name)
    save_hf(*loaded, tmp_path / "saved")
    assert_same(loaded, load_hf(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == json.loads((FIXTURES / name / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])  # stored as float32, float16 and bfloat16
def test_every_stored_precision_loads_in_the_one_that_is_asked_for(name):
    _, full = load_hf(FIXTURES / name)
    _, half = load_hf(FIXTURES / name, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(full)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    # All fixtures' numbers are bfloat16 numbers, so that none is rounded.
    jax.tree.map(np.testing.assert_array_equal, full, jax.tree.map(lambda leaf: leaf.astype("float32"), half))


def test_bfloat16_parameters_are_saved_as_such(tmp_path):
    loaded = load_hf(FIXTURES / "phi3", dtype="bfloat16")
    save_hf(*loaded, tmp_path / "saved")
    assert {str(value.dtype) for value in load_file(tmp_path / "saved" / "model.safetensors").values()} == {"bfloat16"}
    assert_same(loaded, load_hf(tmp_path / "saved", dtype="bfloat16"))


def test_shards_hold_the_same_model(tmp_path):
    loaded = load_hf(FIXTURES / "mixtral")
    save_hf(*loaded, tmp_path / "saved", shard_bytes=8000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert_same(loaded, load_hf(tmp_path / "saved"))


# ------------------------------------------------------------------------------------------- heads, tied and not

TIED = [
    name
    for name in NAMES
    if not name.startswith(("bert", "t5"))
    and "lm_head.weight" not in load_file(FIXTURES / name / "model.safetensors")
    and "classifier" not in name
]
UNTIED = [name for name in NAMES if "lm_head.weight" in load_file(FIXTURES / name / "model.safetensors")]


def table_of(tensors):
    return next(
        value
        for name, value in tensors.items()
        if "embed_tokens" in name or "wte" in name or "tokens_embed" in name or name == "shared.weight"
    )


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_may_be_given_untied(name, copy):
    tied, _ = load_hf(FIXTURES / name)
    with_head = lambda tensors: {**tensors, "lm_head.weight": table_of(tensors).copy()}
    config, params = load_hf(copy(name, {"tie_word_embeddings": False}, with_head))
    assert config == tied.replace(tie_embeddings=False)
    np.testing.assert_array_equal(params["head"]["weight"], params["embedding"]["tokens"].T)


@pytest.mark.parametrize("name", UNTIED)
def test_an_untied_model_may_be_given_tied(name, copy):
    untied, _ = load_hf(FIXTURES / name)
    without_head = lambda tensors: {key: value for key, value in tensors.items() if key != "lm_head.weight"}
    config, params = load_hf(copy(name, {"tie_word_embeddings": True}, without_head))
    assert config == untied.replace(tie_embeddings=True)
    assert "weight" not in params.get("head", {})


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "t5", "bert-masked"])
def test_a_superfluous_copy_of_the_tied_table_is_left_out(name, copy):
    head = "cls.predictions.decoder.weight" if name == "bert-masked" else "lm_head.weight"
    table = "bert.embeddings.word_embeddings.weight"
    with_copy = lambda tensors: {**tensors, head: (tensors.get(table) if table in tensors else table_of(tensors))}
    assert_same(load_hf(copy(name, tensors=with_copy)), load_hf(FIXTURES / name))


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_head_that_is_not_the_table_makes_the_model_untied(name, copy):
    config, params = load_hf(copy(name, tensors=lambda all: {**all, "lm_head.weight": 2 * table_of(all)}))
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["weight"], 2 * params["embedding"]["tokens"].T)


@pytest.mark.parametrize("bias", ["cls.predictions.decoder.bias", "cls.predictions.bias"])
def test_an_untied_bert_uses_the_decoders_bias(bias, copy, tmp_path):
    def untie(tensors):
        head = {"cls.predictions.decoder.weight": 2 * tensors["bert.embeddings.word_embeddings.weight"]}
        return {**tensors, **head, bias: np.arange(64, dtype=np.float32)}

    config, params = load_hf(copy("bert-masked", {"tie_word_embeddings": False}, untie))
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["bias"], np.arange(64))
    np.testing.assert_array_equal(params["head"]["weight"], 2 * params["embedding"]["tokens"].T)
    save_hf(config, params, tmp_path / "saved")
    assert "cls.predictions.decoder.bias" in load_file(tmp_path / "saved" / "model.safetensors")
    assert_same((config, params), load_hf(tmp_path / "saved"))


# -------------------------------------------------------------------------------------- the many styles of files

NO_ROPE = {"rope_parameters": DROP}
OLD_STYLES = {
    "gpt2": {"n_inner": DROP, "tie_word_embeddings": DROP, "scale_attn_weights": DROP, "dtype": DROP},
    "llama": {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": None, "head_dim": DROP, "attention_bias": DROP}
    | {"mlp_bias": DROP, "tie_word_embeddings": False},
    "llama-linear": {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-llama3": {
        **NO_ROPE,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8},
    },
    "mistral": {**NO_ROPE, "rope_theta": 50.0},
    "mixtral": {**NO_ROPE, "rope_theta": 50.0, "head_dim": DROP},
    "qwen2": {**NO_ROPE, "rope_theta": 50.0, "layer_types": DROP},
    "qwen3_moe": {**NO_ROPE, "rope_theta": 50.0, "num_local_experts": DROP, "num_experts": 4, "max_window_layers": 3},
    "gemma": {**NO_ROPE, "rope_theta": 50.0, "hidden_act": "gelu", "tie_word_embeddings": DROP},
    "gemma2": {**NO_ROPE, "rope_theta": 50.0, "layer_types": DROP, "hidden_activation": DROP},
    "gemma3": {**NO_ROPE, "rope_theta": 200.0, "rope_local_base_freq": 20.0, "layer_types": DROP}
    | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window_pattern": 6},
    "phi3": {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    "bert-masked": {"tie_word_embeddings": DROP, "is_decoder": DROP, "position_embedding_type": "absolute"},
    "t5": {"tie_word_embeddings": DROP, "scale_decoder_outputs": DROP, "num_decoder_layers": DROP, "n_positions": 512},
    "t5-v1.1": {"tie_word_embeddings": False, "scale_decoder_outputs": DROP, "decoder_start_token_id": DROP},
    "deepseek_v2": {**NO_ROPE, "rope_theta": 50.0, "head_dim": DROP, "moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek_v3": {
        **NO_ROPE,
        "rope_theta": 100.0,
        "rope_interleave": DROP,
        "topk_method": "noaux_tc",
        "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 2, "beta_slow": 0.5, "mscale": 1.0}
        | {"mscale_all_dim": 1.0, "original_max_position_embeddings": 8},
    },
}


@pytest.mark.parametrize("name", OLD_STYLES)
def test_older_configurations_mean_the_same(name, copy):
    assert_same(load_hf(copy(name, OLD_STYLES[name])), load_hf(FIXTURES / name))


@pytest.mark.parametrize("name", ["gpt2", "llama-llama3", "bert-masked", "bert-classifier", "gemma3"])
def test_names_may_lack_their_prefix(name, copy):
    prefixes = ("transformer.", "model.", "bert.")
    strip = lambda name: next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
    folder = copy(name, tensors=lambda all: {strip(key): value for key, value in all.items()})
    assert_same(load_hf(folder), load_hf(FIXTURES / name))


def test_a_bare_bert_may_have_the_prefix(copy):
    folder = copy("bert", tensors=lambda all: {f"bert.{key}": value for key, value in all.items()})
    assert_same(load_hf(folder), load_hf(FIXTURES / "bert"))


def test_known_buffers_are_left_out(copy):
    mask = np.ones((1, 1, 32, 32), np.float32)
    for name, extra in {
        "gpt2": {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": np.float32(-1e4).reshape(())},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
        "bert-masked": {
            "bert.embeddings.position_ids": np.arange(32)[None],
            "cls.seq_relationship.weight": np.ones((2, 16), np.float32),
            "bert.pooler.dense.weight": np.ones((16, 16), np.float32),
            "cls.predictions.decoder.bias": np.ones(64, np.float32),
        },
        "t5": {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 4), np.float32)},
        "deepseek_v3": {"model.layers.3.eh_proj.weight": np.ones((16, 32), np.float32)},  # multi-token prediction
    }.items():
        with_extra = functools.partial(lambda extra, tensors: tensors | extra, extra)
        assert_same(load_hf(copy(name, tensors=with_extra, to=name)), load_hf(FIXTURES / name))


def test_the_first_berts_names_of_norms(copy):
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    folder = copy("bert", tensors=lambda all: {old(key): value for key, value in all.items()})
    assert_same(load_hf(folder), load_hf(FIXTURES / "bert"))


def test_a_sentence_encoder_without_pooler(copy, tmp_path):
    bare = lambda tensors: {key: value for key, value in tensors.items() if "pooler" not in key}
    config, params = load_hf(copy("bert", tensors=bare))
    assert not config.pooler
    assert "pooler" not in params
    assert error(config, params, expected_of(FIXTURES / "bert")) < 1e-4
    save_hf(config, params, tmp_path / "saved")
    assert_same((config, params), load_hf(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_fused_experts_are_read(name, copy):
    """Transformers 5 has all experts in one tensor and may save them so."""
    gate, up, down = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def fuse(tensors):
        fused = {key: value for key, value in tensors.items() if ".experts." not in key or "shared" in key}
        for block in sorted({key.split(".experts.")[0] for key in tensors if ".experts." in key}):
            count = sum(key.startswith(f"{block}.experts.") and key.endswith(f"{up}.weight") for key in tensors)
            get = lambda e, which, block=block: tensors[f"{block}.experts.{e}.{which}.weight"]
            both = [np.concatenate([get(e, gate), get(e, up)]) for e in range(count)]
            mlp = block.replace("block_sparse_moe", "mlp")
            fused[f"{mlp}.experts.gate_up_proj"] = np.stack(both)
            fused[f"{mlp}.experts.down_proj"] = np.stack([get(e, down) for e in range(count)])
        return {key.replace("block_sparse_moe.gate", "mlp.gate"): value for key, value in fused.items()}

    assert_same(load_hf(copy(name, tensors=fuse)), load_hf(FIXTURES / name))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_gemma(prefix, copy, tmp_path):
    rename = lambda name: name.replace("model.", prefix, 1)
    tower = {"vision_tower.encoder.weight": np.ones(3, np.float32)}
    folder = copy("gemma3", tensors=lambda all: {rename(key): value for key, value in all.items()} | tower)
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [2, 5]}
    outer |= {"architectures": ["Gemma3ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(outer))
    (folder / "generation_config.json").unlink()
    config, params = load_hf(folder)
    expected, expected_params = load_hf(FIXTURES / "gemma3")
    assert_same((config, params), (expected.replace(eos_token_ids=(2, 5)), expected_params))


def test_tokens_that_stop_come_from_the_generation_config(copy, tmp_path):
    folder = copy("llama")
    assert load_hf(folder)[0].eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9, 70000]}')
    loaded = load_hf(folder)
    assert loaded[0].eos_token_ids == (7, 9)  # 70000 is no token of this vocabulary
    save_hf(*loaded, tmp_path / "saved")
    assert load_hf(tmp_path / "saved")[0].eos_token_ids == (7, 9)
    assert load_hf(FIXTURES / "t5")[0].decoder_start_token_id == 0


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", {"model_type": "llamma"}, "unknown model_type .*'llamma'; did you mean .*'llama'"),
        ("llama", {"model_type": DROP}, "has no model_type"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config with quant_method='gptq'"),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope'"),
        ("llama", {"architectures": ["LlamaForQuestionAnswering"]}, "architectures=.*QuestionAnswering.*not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types with both kinds"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types=.*chunked_attention"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not supported"),
        ("llama", {"num_hidden_layers": "two"}, "num_layers='two' must be a whole number"),
        ("llama", {"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight and 8 more"),
        ("llama", {"num_hidden_layers": 1}, "holds the tensor model.layers.1.* does not have"),
        ("llama", {"intermediate_size": 28}, r"mlp.gate_proj.weight .*shape \[24, 16\].* asks for \[28, 16\]"),
    ],
)
def test_what_is_not_supported_is_said_in_one_sentence(name, change, says, copy):
    folder = copy(name, change)
    with pytest.raises(InputError, match=says) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def _only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def _index_of_absent_file(folder):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_of_absent_tensor(folder):
    index = {"weight_map": {"lm_head.weigth": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_integers(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.astype(np.int8) for name, value in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type":'), "config.json is not readable JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, not list"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (_only_pickle, "only as pytorch_model.bin, a pickle.*save_pretrained"),
        (_cut_off, "model.safetensors is cut off or not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"hello"), "cut off or not a safetensors file"),
        (_index_of_absent_file, "names model-00002-of-00002.safetensors, which is not there"),
        (_index_of_absent_tensor, "holds the tensor lm_head.weigth, but it does not"),
        (_write_integers, "is stored as I8; isoflop reads"),
    ],
)
def test_broken_folders_are_said_in_one_sentence(spoil, says, copy):
    folder = copy("llama")
    spoil(folder)
    with pytest.raises(InputError, match=says) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_precision():
    with pytest.raises(InputError, match="unknown dtype 'float16'"):
        load_hf(FIXTURES / "llama", dtype="float16")


# ------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", [name for name in presets.names() if name != "flash-moe"])
def test_every_preset_has_a_model_type(name):
    config = presets.get(name)
    family, raw = huggingface._choose_family(config, None)
    assert raw["model_type"] == family.model_type


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


def test_an_architecture_without_model_type_is_refused(tmp_path):
    config = presets.get("tiny").replace(qk_norm=True, position="none")
    params = init(config, jax.random.key(0))
    with pytest.raises(InputError, match=r"no model_type that isoflop writes can.*position='none'"):
        save_hf(config, params, tmp_path / "saved")
    with pytest.raises(InputError, match="model_type 'gpt2' cannot hold this architecture"):
        save_hf(*load_hf(FIXTURES / "llama"), tmp_path / "saved", model_type="gpt2")
    with pytest.raises(InputError, match="unknown model_type 'lama'"):
        save_hf(*load_hf(FIXTURES / "llama"), tmp_path / "saved", model_type="lama")
    assert not (tmp_path / "saved").exists()


def test_a_model_type_may_be_chosen(tmp_path):
    config, params = load_hf(FIXTURES / "llama")
    save_hf(config, params, tmp_path / "saved", model_type="phi3")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "phi3"
    assert_same((config, params), load_hf(tmp_path / "saved"))


def test_parameters_that_are_not_the_configs_are_refused(tmp_path):
    config, params = load_hf(FIXTURES / "llama")
    flat = traverse_util.flatten_dict(params)
    without = {path: leaf for path, leaf in flat.items() if path != ("head", "weight")}
    with pytest.raises(InputError, match=r"head/weight has shape None; the config asks for \(16, 64\)"):
        save_hf(config, traverse_util.unflatten_dict(without), tmp_path / "saved")
    mixed = {path: leaf.astype("bfloat16" if "head" in path else "float32") for path, leaf in flat.items()}
    with pytest.raises(InputError, match="all float32 or all bfloat16"):
        save_hf(config, traverse_util.unflatten_dict(mixed), tmp_path / "saved")
    with pytest.raises(InputError, match=r"not those of infer\.prepare"):
        save_hf(config, {**params, "layers": (params["layers"],)}, tmp_path / "saved")


def test_only_our_own_models_are_replaced(tmp_path):
    loaded, folder = load_hf(FIXTURES / "llama"), tmp_path / "saved"
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


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def fail(folder, *rest):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", fail)
    with pytest.raises(OSError, match="no space left"):
        save_hf(*load_hf(FIXTURES / "llama"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_convert_takes_the_tokenizer_along(copy, tmp_path):
    folder = copy("qwen3")
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "converted", dtype="bfloat16")
    assert (tmp_path / "converted" / "tokenizer.json").is_file()
    assert_same(load_hf(tmp_path / "converted"), load_hf(folder))


# ------------------------------------------------------------------------------------------ devices and memory

IN_SHARDS = """
import sys
import jax, numpy as np
from model.convert import load_hf
from model.sharding import make_mesh

mesh = make_mesh({"data": 4})
for folder in sys.argv[1:]:
    config, params = load_hf(folder, mesh=mesh)
    same, expected = load_hf(folder)
    assert config == same
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert len(leaf.sharding.device_set) == 4
        spec = tuple(leaf.sharding.spec)
        names = [key.key for key in path]
        assert "layers" not in names or spec[:1] in ((), (None,)), (names, spec)
        split += leaf.size if "data" in spec else 0
    assert split > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(params)), folder
"""


@pytest.mark.slow
def test_a_mesh_gets_every_tensor_in_its_shards():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    folders = [str(FIXTURES / name) for name in ("phi3", "mixtral", "gpt2")]
    call = [sys.executable, "-c", IN_SHARDS, *folders]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr


PEAK = """
import gc, sys
import jax
from model.convert import load_hf

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

load_hf(sys.argv[1])  # compiles what the second call runs
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
config, params = load_hf(sys.argv[1])
largest = max(leaf.size // (leaf.shape[0] if "layers" in str(path) else 1) * 4
              for path, leaf in jax.tree_util.tree_leaves_with_path(params))
print(status("VmHWM") - status("VmRSS"), largest, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a process's memory")
def test_loading_takes_the_model_and_one_tensor(tmp_path):
    config = presets.get("tiny").replace(
        vocab_size=4000, d_model=1024, num_layers=6, num_heads=16, num_kv_heads=16, d_ff=2048, tie_embeddings=False
    )
    leaves = {path: np.full(shape, 0.5, np.float32) for path, shape in huggingface.shapes_of(config).items()}
    save_hf(config, jax.tree.map(jax.numpy.asarray, traverse_util.unflatten_dict(leaves)), tmp_path / "model")
    call = [sys.executable, "-c", PEAK, str(tmp_path / "model")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    above, largest, model = map(int, done.stdout.split())
    assert model > 200e6
    assert above < 1.25 * largest


def test_the_libraries_for_files_are_loaded_when_needed():
    code = "import model, model.convert, sys; print(sorted({'safetensors', 'gguf', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------ against Transformers


@pytest.mark.long
def test_transformers_makes_and_takes_fresh_models(tmp_path):
    """Set ISOFLOP_TRANSFORMERS_PYTHON to an interpreter that has torch and transformers."""
    python = os.environ.get("ISOFLOP_TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{python} has no torch and transformers; set ISOFLOP_TRANSFORMERS_PYTHON")
    seed = str(int.from_bytes(os.urandom(3)))
    made, saved = tmp_path / "made", tmp_path / "saved"
    run = lambda *arguments: subprocess.run([python, str(MAKE), *arguments], capture_output=True, text=True)
    done = run("--out", str(made), "--seed", seed)
    assert done.returncode == 0, done.stderr
    errors = {}
    for folder in sorted(made.iterdir()):
        config, params = load_hf(folder)
        errors[folder.name] = error(config, params, expected_of(folder))
        save_hf(config, params, saved / folder.name)
        shutil.copy(folder / "expected.npz", saved / folder.name)
    assert len(errors) == len(NAMES)
    assert max(errors.values()) < 1e-4, (seed, errors)
    done = run("--check", str(saved))
    assert done.returncode == 0, done.stderr
    for folder in sorted(saved.iterdir()):
        given, actual = expected_of(folder), np.load(folder / "actual.npz")["logits"]
        expected = at_tokens(given["logits"], given)
        assert json.loads((folder / "report.json").read_text()) == {}, folder.name
        assert np.abs(at_tokens(actual, given) - expected).max() < 1e-5 * expected.std(), (seed, folder.name)
