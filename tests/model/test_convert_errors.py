"""What cannot be loaded is said in one sentence."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import InputError
from model.convert import load_hf

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "llama",
            {"model_type": "gpt_neox"},
            "unknown model_type .*'gpt_neox'; supported are 'llama', 'mistral'",
        ),
        ("llama", {"model_type": ...}, "has no model_type"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config with quant_method='gptq'"),
        (
            "gemma3",
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "quantization": {"bits": 4}},
            "quantization with quant_method='unnamed' is not supported",
        ),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope'"),
        ("llama", {"architectures": ["LlamaForQuestionAnswering"]}, "architectures=.*QuestionAnswering.*not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types with both kinds"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types=.*chunked_attention"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("llama", {"num_hidden_layers": "two"}, "num_hidden_layers='two' must be a whole number from 1"),
        ("gemma2", {"num_hidden_layers": 10**12, "layer_types": None}, "num_hidden_layers=1000000000000 must be"),
        ("mixtral", {"num_local_experts": 10**9}, "2000000000 experts in its layers"),
        ("llama", {"head_dim": 10**9}, "1000000000 features of a head"),
        ("llama", {"vocab_size": 10**30}, "its sizes are not those of a model"),
        ("llama", {"hidden_size": -16}, "d_model=-16 must be a whole number"),
        ("llama", {"hidden_size": None}, "d_model=None must be a whole number"),
        ("llama", {"rms_norm_eps": "1e-5"}, "norm_epsilon='1e-5' must be"),
        ("llama", {"rope_parameters": 3}, "rope_parameters=3 must be an object or null"),
        (
            "llama-yarn",
            {"rope_scaling": {"type": "yarn", "factor": "4"}},
            "factor='4' of the rotary positions must be a",
        ),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window='no' must be true or false"),
        ("llama", {"eos_token_id": 1.5}, "eos_token_id=1.5 must be a whole number"),
        ("llama", {"attention_bias": "yes"}, "attention_bias='yes' must be true or false"),
        ("llama", {"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight and 8 more"),
        ("llama", {"num_hidden_layers": 1}, "has the tensor model.layers.1.* does not have"),
        ("llama", {"intermediate_size": 28}, r"mlp.gate_proj.weight .*shape \[24, 16\].* requires \[28, 16\]"),
    ],
)
def test_what_is_not_supported_is_said_in_one_sentence(name, change, says, copy):
    folder = copy(name, change)
    if "eos_token_id" in change:
        (folder / "generation_config.json").unlink()  # it would count before
    with pytest.raises(InputError, match=says) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def _only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _only_gguf(folder):
    (folder / "config.json").unlink()
    (folder / "a.gguf").write_bytes(b"GGUF")


def _gguf_weights(folder):
    (folder / "model.safetensors").rename(folder / "a.gguf")


def _cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


SHARD = "model-00001-of-00002.safetensors"


def _index(content):
    """The weights under a shard's name, and an index."""

    def change(folder):
        (folder / "model.safetensors").rename(folder / SHARD)
        (folder / "model.safetensors.index.json").write_text(content)

    return change


def _weight_map(**files):
    return _index(json.dumps({"weight_map": {name.replace("__", "."): file for name, file in files.items()}}))


def _tensor_in_two_shards(folder):
    _weight_map(lm_head__weight=SHARD, model__norm__weight="model-00002-of-00002.safetensors")(folder)
    shutil.copy(folder / SHARD, folder / "model-00002-of-00002.safetensors")


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
        (_weight_map(a="model-00002-of-00002.safetensors"), "names .model-00002-of-00002.safetensors., which is not"),
        (_weight_map(a="a", b="b", c="c"), "names 'a' and 2 more, which is not there; download it too"),
        (_tensor_in_two_shards, "both .*model-00001-of-00002.safetensors and model-00002-of-00002.* hold the tensor"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / SHARD),
            "has model-00001.* no .*index.json, which lists",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
            "neither model.safetensors nor .*, only consolidated.safetensors; isoflop reads models under the file",
        ),
        (_gguf_weights, r"neither model\.safetensors nor .*, but a\.gguf; give the path of that file"),
        (_only_gguf, r"has no config\.json, but a\.gguf; give the path of that file"),
        (_index("[" * 100_000), "index.json is not readable JSON"),
        (_index('{"weight_map": ["model.safetensors"]}'), "has no weight_map from tensor names to file names"),
        (_index('{"weight_map": {"lm_head.weight": 1}}'), "has no weight_map from tensor names to file names"),
        (_index('{"weight_map": {"lm_head.weight": "../copy/model.safetensors"}}'), "is not a file of its folder"),
        (_weight_map(lm_head__weight="x" * 300), "which is not there"),
        (_weight_map(lm_head__weigth=SHARD), "says that .* holds the tensor lm_head.weigth, but it does not"),
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


def test_damaged_headers_are_refused_or_do_not_matter(copy, hf, assert_same):
    """Bytes changed or cut off before the weights: a sentence, or the same model."""
    folder, generator, refused = copy("llama"), random.Random(0), 0
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(150):
        damaged = bytearray(whole)
        if generator.random() < 0.2:
            damaged = damaged[: generator.randrange(len(whole))]
        else:
            for _ in range(generator.randint(1, 3)):
                damaged[generator.randrange(header if generator.random() < 0.8 else 8)] = generator.randrange(256)
        file.write_bytes(damaged)
        try:
            loaded = load_hf(folder)
        except InputError:
            refused += 1
        else:
            assert_same(loaded, hf("llama"))
    assert refused > 100
