"""The many styles of files that mean the same model: older keys and names, fused experts, heads tied and not."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.convert import huggingface, load_hf, save_hf
from model.convert.families import FAMILIES
from model.convert.tensors import TensorFolder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())


def sampled(names, quick):
    """One of every kind of family; the others where minutes do not matter."""
    assert set(quick) <= set(names)
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.long) for name in names]


def holds_head(name):
    return "lm_head.weight" in TensorFolder(FIXTURES / name).shapes


UNTIED = [name for name in NAMES if holds_head(name)]
TIED = [name for name in NAMES if name not in UNTIED and not name.startswith(("bert", "t5")) and "class" not in name]


def table_of(tensors):
    return next(
        value
        for name, value in tensors.items()
        if "embed_tokens" in name or "wte" in name or "tokens_embed" in name or name == "shared.weight"
    )


@pytest.mark.parametrize("name", sampled(TIED, ("gpt2", "gemma3")))
def test_a_tied_model_may_be_given_untied(name, copy, hf):
    tied, _ = hf(name)
    with_head = lambda tensors: {**tensors, "lm_head.weight": table_of(tensors).copy()}
    config, params = load_hf(copy(name, {"tie_word_embeddings": False}, with_head))
    assert config == tied.replace(tie_embeddings=False)
    np.testing.assert_array_equal(params["head"]["weight"], params["embedding"]["tokens"].T)


@pytest.mark.parametrize("name", sampled(UNTIED, ("deepseek_v3", "phi3", "t5-v1.1")))
def test_an_untied_model_may_be_given_tied(name, copy, hf):
    untied, _ = hf(name)
    without_head = lambda tensors: {key: value for key, value in tensors.items() if key != "lm_head.weight"}
    config, params = load_hf(copy(name, {"tie_word_embeddings": True}, without_head))
    assert config == untied.replace(tie_embeddings=True)
    assert "weight" not in params.get("head", {})


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "t5", "bert-masked"])
def test_a_superfluous_copy_of_the_tied_table_is_left_out(name, copy, hf, assert_same):
    head = "cls.predictions.decoder.weight" if name == "bert-masked" else "lm_head.weight"
    table = "bert.embeddings.word_embeddings.weight"
    with_copy = lambda tensors: {**tensors, head: (tensors.get(table) if table in tensors else table_of(tensors))}
    assert_same(load_hf(copy(name, tensors=with_copy)), hf(name))


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_head_that_is_not_the_table_makes_the_model_untied(name, copy):
    config, params = load_hf(copy(name, tensors=lambda all: {**all, "lm_head.weight": 2 * table_of(all)}))
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["weight"], 2 * params["embedding"]["tokens"].T)


def test_a_t5_with_a_head_of_its_own_does_not_scale_logits(copy):
    """So have v1.1 and mT5 it, the only ones with such a head."""
    config, params = load_hf(copy("t5", tensors=lambda all: {**all, "lm_head.weight": 2 * table_of(all)}))
    assert (config.tie_embeddings, config.scale_logits) == (False, False)
    np.testing.assert_array_equal(params["head"]["weight"], 2 * params["embedding"]["tokens"].T)


@pytest.mark.parametrize("bias", ["cls.predictions.decoder.bias", "cls.predictions.bias"])
def test_an_untied_bert_uses_the_decoders_bias(bias, copy, tmp_path, assert_same):
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


NO_ROPE = {"rope_parameters": ...}


OLD_STYLES = {
    "gpt2": {"n_inner": ..., "tie_word_embeddings": ..., "scale_attn_weights": ..., "dtype": ...},
    "llama": {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": None, "head_dim": ..., "attention_bias": ...}
    | {"mlp_bias": ..., "tie_word_embeddings": False},
    "llama-linear": {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-llama3": {
        **NO_ROPE,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8},
    },
    "mistral": {**NO_ROPE, "rope_theta": 50.0},
    "mixtral": {**NO_ROPE, "rope_theta": 50.0, "head_dim": ...},
    "qwen2": {**NO_ROPE, "rope_theta": 50.0, "layer_types": ...},
    "qwen3_moe": {**NO_ROPE, "rope_theta": 50.0, "num_local_experts": ..., "num_experts": 4, "max_window_layers": 3},
    "gemma": {**NO_ROPE, "rope_theta": 50.0, "hidden_act": "gelu", "tie_word_embeddings": ...},
    "gemma2": {**NO_ROPE, "rope_theta": 50.0, "layer_types": ..., "hidden_activation": ...},
    "gemma3": {**NO_ROPE, "rope_theta": 200.0, "rope_local_base_freq": 20.0, "layer_types": ...}
    | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window_pattern": 6},
    "phi3": {**NO_ROPE, "rope_theta": 50.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    "bert-masked": {"tie_word_embeddings": ..., "is_decoder": ..., "position_embedding_type": "absolute"},
    "t5": {"tie_word_embeddings": ..., "scale_decoder_outputs": ..., "num_decoder_layers": ..., "n_positions": 512},
    "t5-v1.1": {"tie_word_embeddings": False, "scale_decoder_outputs": ..., "decoder_start_token_id": ...},
    "deepseek_v2": {**NO_ROPE, "rope_theta": 50.0, "head_dim": ..., "moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek_v3": {
        **NO_ROPE,
        "rope_theta": 100.0,
        "rope_interleave": ...,
        "topk_method": "noaux_tc",
        "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 2, "beta_slow": 0.5, "mscale": 1.0}
        | {"mscale_all_dim": 1.0, "original_max_position_embeddings": 8},
    },
}


def config_of(folder):
    """What `load_hf` makes of its config.json; the tensors are the fixture's."""
    (family, config), tensors = huggingface._read_config(folder), TensorFolder(folder)
    names = {family.base_name(name): name for name in tensors.shapes}
    return huggingface._tie_as_the_tensors_are(family.adapt(config, names), family, tensors, names)


@pytest.mark.parametrize("name", OLD_STYLES)
def test_older_configurations_mean_the_same(name, copy):
    assert config_of(copy(name, OLD_STYLES[name])) == config_of(FIXTURES / name)


@pytest.mark.parametrize(
    ("name", "change"), [("gemma3", {"attn_logit_softcapping": 2.0}), ("deepseek_v2", {"norm_topk_prob": True})]
)
def test_keys_that_transformers_does_not_look_at(name, change, copy):
    assert config_of(copy(name, change)) == config_of(FIXTURES / name)


def test_logits_of_classifiers_are_not_capped():
    raw = json.loads((FIXTURES / "gemma2" / "config.json").read_text())
    assert FAMILIES["gemma2"].read(raw).final_softcap == 3.0
    assert FAMILIES["gemma2"].read(raw | {"architectures": ["Gemma2ForSequenceClassification"]}).final_softcap is None


@pytest.mark.parametrize("name", ["gpt2", "llama-llama3", "bert-masked", "bert-classifier", "gemma3"])
def test_names_may_lack_their_prefix(name, copy, hf, assert_same):
    prefixes = ("transformer.", "model.", "bert.")
    strip = lambda name: next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
    folder = copy(name, tensors=lambda all: {strip(key): value for key, value in all.items()})
    assert_same(load_hf(folder), hf(name))


def test_a_bare_bert_may_have_the_prefix(copy, hf, assert_same):
    folder = copy("bert", tensors=lambda all: {f"bert.{key}": value for key, value in all.items()})
    assert_same(load_hf(folder), hf("bert"))


def test_known_buffers_are_left_out(copy, hf, assert_same):
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
        assert_same(load_hf(copy(name, tensors=with_extra, to=name)), hf(name))


def test_the_first_berts_names_of_norms(copy, hf, assert_same):
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    folder = copy("bert", tensors=lambda all: {old(key): value for key, value in all.items()})
    assert_same(load_hf(folder), hf("bert"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_fused_experts_are_read(name, copy, hf, assert_same):
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

    assert_same(load_hf(copy(name, tensors=fuse)), hf(name))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_gemma(prefix, copy, tmp_path, hf, assert_same):
    rename = lambda name: name.replace("model.", prefix, 1)
    tower = {"vision_tower.encoder.weight": np.ones(3, np.float32)}
    folder = copy("gemma3", tensors=lambda all: {rename(key): value for key, value in all.items()} | tower)
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [2, 5]}
    outer |= {"architectures": ["Gemma3ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(outer))
    (folder / "generation_config.json").unlink()
    config, params = load_hf(folder)
    expected, expected_params = hf("gemma3")
    assert_same((config, params), (expected.replace(eos_token_ids=(2, 5)), expected_params))


def test_an_index_beside_the_whole_file_is_ignored(copy, tmp_path, hf, assert_same, caplog):
    """Transformers reads model.safetensors where there is one, whatever an older index beside it names."""
    config, params = hf("llama")
    folder = tmp_path / "both"
    save_hf(config, jax.tree.map(lambda leaf: 2 * leaf, params), folder, shard_bytes=2000)
    shards = sorted(file.name for file in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    (folder / "model.safetensors").write_bytes((FIXTURES / "llama" / "model.safetensors").read_bytes())
    for index in (None, "{", json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}})):
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(index)
        caplog.clear()
        assert_same(load_hf(folder), hf("llama"))
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.endswith("model.safetensors.index.json in the same folder is ignored")
    save_file({"model.norm.weight": np.ones(16, np.float32)}, folder / "consolidated.safetensors")
    assert_same(load_hf(folder), hf("llama"))
    # An index that names the whole file, as some programs write, is nothing to speak of.
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    caplog.clear()
    assert_same(load_hf(folder), hf("llama"))
    assert not caplog.records


def test_tokens_that_stop_come_from_the_generation_config(copy, tmp_path, hf):
    folder = copy("llama")
    assert load_hf(folder)[0].eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9, 70000]}')
    loaded = load_hf(folder)
    assert loaded[0].eos_token_ids == (7, 9)  # 70000 is no token of this vocabulary
    save_hf(*loaded, tmp_path / "saved")
    assert load_hf(tmp_path / "saved")[0].eos_token_ids == (7, 9)
    assert hf("t5")[0].decoder_start_token_id == 0
