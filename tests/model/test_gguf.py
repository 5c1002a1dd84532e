"""GGUF files give the model of the Hugging Face folder that they were made from.

The files are written here as llama.cpp's converter writes them, with the gguf library's own table of tensor names.
"""

import json
import shutil
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from model import Experts, InputError, ModelConfig, RopeScaling
from model.convert import convert, load_gguf, load_hf, save_hf
from model.gguf_header import read_gguf_header
from model.store import open_parameters
from model.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"


def write_gguf(folder, file, architecture, extra=None, quantise=None, tokens=None, **options):
    """The model of a Hugging Face folder as a GGUF file; `extra`: metadata beside what all architectures have.

    tokens: of a sentencepiece tokenizer. options: of the writer.
    """
    raw = json.loads((folder / "config.json").read_text())
    config, _ = load_hf(folder)
    tensors = {name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_layers)
    writer = gguf.GGUFWriter(file, architecture, **options)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
        writer.add_rope_freq_base(config.rope_base)
        writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_eos_token_id(raw["eos_token_id"])
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.top_k)
    for key, value in (extra or {}).items():
        add_value(writer, f"{architecture}.{key}", value)
    if tokens is not None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
    for name, value in as_llama_cpp_has_them(tensors, config, architecture).items():
        stem, suffix = name.rsplit(".", 1)
        ours = names.get_name(stem) if name != "rope_freqs.weight" else stem
        assert ours is not None, name
        kind = quantise if quantise is not None and value.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value, kind) if quantise is not None else value
        writer.add_tensor(f"{ours}.{suffix}", np.ascontiguousarray(data), raw_dtype=kind)
    finish(writer)
    return file


def add_value(writer, key, value):
    """A value as its type is written; later ones replace what the writer has."""
    for shard in writer.kv_data:
        shard.pop(key, None)
    adds = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32, list: writer.add_array}
    adds.get(type(value), writer.add_uint32)(key, value)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_llama_cpp_has_them(tensors, config, architecture):
    """What its converter changes: rotary rows, Conv1D, norms of Gemma, experts in one tensor."""
    changed = {}
    for name, value in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if architecture == "gpt2" and ".c_" in name:
            value = value.T
        if architecture.startswith("gemma") and "norm" in name:
            value = value + 1
        changed[name] = value
    for letter, which in {"w1": "gate", "w2": "down", "w3": "up"}.items():
        for block in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
            old, new = f"{letter}.weight", f"{which}_proj.weight"
            keys = [name for name in changed if name.startswith(f"{block}.experts.") and name.endswith((old, new))]
            keys.sort(key=lambda key: int(key.split(".experts.")[1].split(".")[0]))
            mlp = block.replace("block_sparse_moe", "mlp")
            changed[f"{mlp}.experts.{which}_proj.weight"] = np.stack([changed.pop(key) for key in keys])
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        changed["rope_freqs.weight"] = rope_factors(config)
    return changed


def rope_factors(config):
    """What a Llama 3 frequency is divided by: nothing where it turns often, all of `factor` where it does not."""
    scaling, factors = config.rope_scaling, []
    for index in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_base ** (2 * index / config.head_dim)
        turns = scaling.original_max_seq_len / wavelength
        if turns > scaling.high_frequency_factor:
            factors.append(1.0)
        elif turns < scaling.low_frequency_factor:
            factors.append(scaling.factor)
        else:
            span = scaling.high_frequency_factor - scaling.low_frequency_factor
            smooth = (turns - scaling.low_frequency_factor) / span
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


GEMMA2 = {"attention.sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA3 = {"attention.sliding_window": 8, "rope.freq_base_swa": 20.0}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8}
YARN |= {"rope.scaling.yarn_beta_fast": 2.0, "rope.scaling.yarn_beta_slow": 0.5}
CASES = {
    "llama": ("llama", None),
    "llama-llama3": ("llama", None),
    "llama-linear": ("llama", LINEAR),
    "llama-yarn": ("llama", YARN),
    "mixtral": ("llama", None),
    "qwen3": ("qwen3", None),
    "gemma": ("gemma", None),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3": ("gemma3", LINEAR | GEMMA3),
    "phi3": ("phi3", {"attention.sliding_window": 8}),
    "gpt2": ("gpt2", None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_model_it_was_made_from(name, tmp_path, assert_same, hf):
    architecture, extra = CASES[name]
    config, params = hf(name)
    file = write_gguf(FIXTURES / name, tmp_path / "model.gguf", architecture, extra)
    # Gemma's scale of scores is not in the file: all but the largest have that of head_dim.
    expected = config.replace(attention_scale=None)
    assert_same(load_gguf(file), (expected, params), rtol=1e-6 if "gemma" in name else 0.0)


def test_qwen2_without_windows(tmp_path, assert_same):
    shutil.copytree(FIXTURES / "qwen2", tmp_path / "folder")
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())
    raw |= {"use_sliding_window": False, "layer_types": None}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(raw))
    file = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", "qwen2")
    assert_same(load_gguf(file), load_hf(tmp_path / "folder"))


def test_qwen3_with_experts(tmp_path, random_params, assert_same):
    config = ModelConfig(
        vocab_size=48,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        d_ff=24,
        qk_norm=True,
        experts=Experts(4, 2, 8),
        eos_token_ids=(3,),
    )
    save_hf(config, jax.tree.map(jax.numpy.asarray, random_params(config)), tmp_path / "folder")
    extra = {"expert_feed_forward_length": 8}
    file = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", "qwen3moe", extra)
    assert_same(load_gguf(file), load_hf(tmp_path / "folder"))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_are_what_gguf_makes_of_them(kind, tmp_path, random_params):
    config = ModelConfig(
        vocab_size=64, d_model=32, num_layers=2, num_heads=2, d_ff=64, max_seq_len=16, eos_token_ids=(2,)
    )
    params = jax.tree.map(jax.numpy.asarray, random_params(config))
    save_hf(config, params, tmp_path / "folder")
    quantisation = gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", "llama", quantise=quantisation)
    _, loaded = load_gguf(file)

    rounded = lambda weight: gguf.dequantize(
        gguf.quants.quantize(np.ascontiguousarray(weight), quantisation), quantisation
    )
    up = np.stack(
        [rounded(np.asarray(layer).T).T for layer in params["layers"]["dense"]["feed_forward"]["up"]["weight"]]
    )
    np.testing.assert_array_equal(loaded["layers"]["dense"]["feed_forward"]["up"]["weight"], up)
    # Blocks lie along a row, so that the other order of rows does not change them.
    query = np.stack([rounded(np.asarray(x).T).T for x in params["layers"]["dense"]["attention"]["query"]["weight"]])
    np.testing.assert_array_equal(loaded["layers"]["dense"]["attention"]["query"]["weight"], query)
    np.testing.assert_array_equal(loaded["embedding"]["tokens"], rounded(np.asarray(params["embedding"]["tokens"])))
    np.testing.assert_array_equal(loaded["final_norm"]["scale"], params["final_norm"]["scale"])
    _, half = load_gguf(file, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half)} == {"bfloat16"}


def test_a_file_becomes_a_hugging_face_folder(tmp_path, assert_same):
    file = write_gguf(FIXTURES / "llama", tmp_path / "model.gguf", "llama")
    convert(file, tmp_path / "folder")
    assert_same(load_hf(tmp_path / "folder"), load_gguf(file))


def _cut(fraction):
    return lambda file: file.write_bytes(file.read_bytes()[: int(fraction * file.stat().st_size)])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file: file.unlink(), "is not a file"),
        (lambda file: file.write_bytes(b""), "is not a GGUF file"),
        (lambda file: file.write_bytes(b"PK\x03\x04 a zip, say"), "is not a GGUF file"),
        (_cut(0.003), "ends within its metadata"),
        (_cut(0.05), "ends within its metadata"),
        (_cut(0.2), "is cut off or broken"),
        (_cut(0.97), "is cut off or broken"),
    ],
)
def test_broken_files_are_said_in_one_sentence(spoil, says, tmp_path):
    file = write_gguf(FIXTURES / "llama", tmp_path / "model.gguf", "llama")
    spoil(file)
    with pytest.raises(InputError, match=says) as caught:
        load_gguf(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "extra", "says"),
    [
        ("mamba", {}, "unknown architecture in .*'mamba'; supported are 'llama', 'qwen2'"),
        ("llama", {"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
        ("llama", {"expert_count": 4, "expert_used_count": 2}, "lacks the tensor blk.0.ffn_gate_inp.weight"),
        ("llama", {"attention.key_length": 8}, "values of another size than keys"),
        ("qwen3", {}, "lacks the tensor blk.0.attn_q_norm.weight"),
    ],
)
def test_what_is_not_supported_is_said_in_one_sentence(architecture, extra, says, tmp_path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    values = {"block_count": 1, "context_length": 8, "embedding_length": 16, "feed_forward_length": 24}
    values |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    values |= {"attention.value_length": 4} if "attention.key_length" in extra else {}
    for key, value in (values | extra).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.ones((64, 16), np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(16, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((16, 16), np.float32))
    finish(writer)
    with pytest.raises(InputError, match=says) as caught:
        load_gguf(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


NOTHING = {
    "rope.scaling.finetuned": True,
    "vocab_size": 7,
    "expert_feed_forward_length": 7,
    "pooling_type": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "attention.clamp_kqv": 0.0,
    "logit_scale": 1.0,
    "attention.max_alibi_bias": 0.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "expert_weights_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": -1.0,
    "rope.scaling.factor": 0.0,
    "rope.dimension_sections": [0, 0, 0, 0],
    "attention.layer_norm_epsilon": 1e-6,
    "expert_gating_func": 1,
    "attention.sliding_window": 0,
    "attention.scale": 0.0,
    "tensor_data_layout": "Meta AI original pth",
    "rope.freq_base_swa": 50.0,
    "embedding_length_out": 16,
    "attention.key_length_swa": 4,
    "expert_count": 0,
    "attn_logit_softcapping": 0.0,
    "expert_weights_norm": True,
    "swiglu_clamp_exp": [0.0, 0.0],
}


def test_metadata_that_change_nothing(tmp_path, assert_same, hf):
    file = write_gguf(FIXTURES / "llama", tmp_path / "model.gguf", "llama", NOTHING)
    assert_same(load_gguf(file), hf("llama"))
    # Linear is what llama.cpp takes for a kind that the file does not name; none ignores the factor.
    for extra in ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, {"rope.scaling.factor": 1.0}):
        assert_same(load_gguf(write_gguf(FIXTURES / "llama", tmp_path / "none.gguf", "llama", extra)), hf("llama"))
    one = {"attention.sliding_window": 8, "attention.sliding_window_pattern": 1}  # every layer of one sees all
    assert_same(load_gguf(write_gguf(FIXTURES / "llama", tmp_path / "one.gguf", "llama", one)), hf("llama"))
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 1.0}
    assert_same(load_gguf(write_gguf(FIXTURES / "llama", tmp_path / "yarn.gguf", "llama", yarn)), hf("llama"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"rope.scale_linear": 8.0}, {"rope_scaling": RopeScaling("linear", 8.0)}),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 8.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 8.0}, {"rope_scaling": RopeScaling("linear", 8.0)}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"rope_scaling": RopeScaling("yarn", 4.0, original_max_seq_len=32)},
        ),
        ({"attention.scale": 0.25}, {"attention_scale": 0.25}),
        ({"attn_logit_softcapping": 30.0}, {"attention_softcap": 30.0}),
        ({"final_logit_softcapping": 15.0}, {"final_softcap": 15.0}),
        ({"embedding_scale": 4.0}, {"scale_embedding": True}),  # the root of d_model
        ({"attention.sliding_window": 8}, {"sliding_window": 8, "layer_pattern": ("local",)}),
        (
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2},
            {"sliding_window": 8, "layer_pattern": ("local", "global")},
        ),
        (
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]},
            {"sliding_window": 8, "layer_pattern": ("global", "local")},
        ),
    ],
)
def test_metadata_that_change_the_model(extra, expected, tmp_path, hf):
    config, _ = load_gguf(write_gguf(FIXTURES / "llama", tmp_path / "model.gguf", "llama", extra))
    assert config == hf("llama")[0].replace(**expected)


def test_metadata_of_experts(tmp_path, hf):
    extra = {"expert_weights_scale": 2.5, "expert_weights_norm": False, "expert_gating_func": 2}
    config, _ = load_gguf(write_gguf(FIXTURES / "mixtral", tmp_path / "model.gguf", "llama", extra))
    assert config.experts == hf("mixtral")[0].experts.replace(scale=2.5, normalise=False, router="sigmoid")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *(("llama", key, 0.22) for key in ("residual_scale", "logit_scale", "embedding_scale")),
        *(("llama", f"rope.scaling.{key}", 2.0) for key in ("attn_factor", "yarn_attn_factor", "alpha")),
        *(("llama", f"rope.scaling.yarn_{key}", 1.0) for key in ("ext_factor", "log_multiplier")),
        *(("llama", f"attention.{key}", 8.0) for key in ("clamp_kqv", "max_alibi_bias", "output_scale")),
        *(("llama", f"attention.{key}", 3) for key in ("q_lora_rank", "key_length_swa", "temperature_length")),
        ("llama", "attention.causal", False),
        ("llama", "attention.layer_norm_epsilon", 0.1),
        ("llama", "use_parallel_residual", True),
        ("llama", "pooling_type", 1),
        ("llama", "rope.dimension_sections", [2, 1, 1, 0]),
        ("llama", "rope.freq_base_swa", 1e6),
        ("llama", "embedding_length_out", 8),
        ("llama", "swiglu_clamp_exp", [0.0, 7.0]),
        ("llama", "classifier.output_labels", ["a", "b"]),
        ("llama", "ssm.state_size", 0),  # no key of a transformer, whatever its value
        ("llama", "a_key_of_tomorrow", False),
        ("mixtral", "expert_gating_func", 4),
        ("mixtral", "expert_shared_count", 1),
        ("mixtral", "expert_group_count", 2),
        ("qwen3", "attention.sliding_window", 8),
        ("gemma", "embedding_scale", 1.0),
        ("gemma2", "rope.freq_base_swa", 1e6),
        ("gpt2", "attention.head_count_kv", 1),
        ("gpt2", "rope.dimension_count", 4),
    ],
)
def test_metadata_that_isoflop_has_not_are_refused_by_name(name, key, value, tmp_path):
    architecture, extra = CASES[name]
    file = write_gguf(FIXTURES / name, tmp_path / "model.gguf", architecture, (extra or {}) | {key: value})
    with pytest.raises(InputError, match=key.replace(".", r"\.")) as caught:
        load_gguf(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_models_are_refused(tmp_path):
    file = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    finish(writer)
    with pytest.raises(InputError, match=r"is not a model: its general\.type is 'adapter'"):
        load_gguf(file)


@pytest.mark.parametrize("factors", [[1.0, 4.0], [1.0]])
def test_rotary_factors_beside_a_scaling_or_of_another_size_are_refused(factors, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "rope_factors", lambda config: np.array(factors, np.float32))
    extra = {"rope.scale_linear": 2.0}
    file = write_gguf(FIXTURES / "llama-llama3", tmp_path / "model.gguf", "llama", extra)
    with pytest.raises(InputError, match=r"rope_freqs\.weight"):
        load_gguf(file)


def test_rotary_factors_of_one_leave_the_scaling(tmp_path, monkeypatch):
    half = json.loads((FIXTURES / "llama-llama3" / "config.json").read_text())["head_dim"] // 2
    monkeypatch.setitem(globals(), "rope_factors", lambda config: np.ones(half, np.float32))
    file = write_gguf(FIXTURES / "llama-llama3", tmp_path / "model.gguf", "llama", {"rope.scale_linear": 2.0})
    assert load_gguf(file)[0].rope_scaling == RopeScaling("linear", 2.0)


def test_rotary_factors_that_no_llama3_scaling_gives_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "rope_factors", lambda config: np.array([1.0, 2.0, 2.5], np.float32))
    file = write_gguf(FIXTURES / "llama-llama3", tmp_path / "model.gguf", "llama")
    with pytest.raises(InputError, match=r"rope_freqs\.weight does not come from a llama3 scaling"):
        load_gguf(file)


def test_metadata_is_what_the_gguf_package_reads(tmp_path):
    for endianess in gguf.GGUFEndian:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=endianess)
        writer.add_float32("x.float", 0.5)
        writer.add_float64("x.double", -0.25)
        writer.add_int8("x.byte", -3)
        writer.add_uint64("x.long", 2**63)
        writer.add_bool("x.flag", True)
        writer.add_array("x.numbers", [1, 2, 300])
        writer.add_array("x.floats", [1.5, 2.5])
        writer.add_array("x.texts", ["", "é", "日本"])
        writer.add_tensor("t", np.ones((2, 3), np.float32))
        finish(writer)
        metadata = read_gguf_header(tmp_path / "a.gguf").metadata
        assert metadata.pop("general.architecture") == "llama"
        fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
        assert {key: np.asarray(value).tolist() for key, value in metadata.items()} == {
            key: field.contents() for key, field in fields.items() if key.startswith("x.")
        }


def _in_parts(folder, first_without_tensors=False):
    """The llama fixture in parts of at most five tensors, with a tokenizer in its metadata; their files in order."""
    folder.mkdir()
    options = {"split_max_tensors": 5, "small_first_shard": first_without_tensors}
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
    write_gguf(FIXTURES / "llama", folder / "model.gguf", "llama", tokens=tokens, **options)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("first_without_tensors", [False, True])
def test_a_model_in_parts_is_the_whole_one(first_without_tensors, tmp_path, assert_same, hf):
    files = _in_parts(tmp_path / "parts", first_without_tensors)
    assert len(files) > 3
    assert files[1].name == f"model-00002-of-{len(files):05d}.gguf"
    for file in (files[0], files[2], files[-1]):
        assert_same(load_gguf(file), hf("llama"))
        tokenizer = load_tokenizer(file)
        assert (tokenizer.path, tokenizer.encode("a")) == (files[0], [5])
    assert_same(open_parameters(tmp_path / "parts"), hf("llama"))
    assert load_tokenizer(tmp_path / "parts").path == files[0]
    convert(tmp_path / "parts", tmp_path / "hf")
    assert_same(load_hf(tmp_path / "hf"), hf("llama"))


def _renumber(files):
    content, key = files[2].read_bytes(), b"split.no" + (2).to_bytes(4, "little")  # a 16-bit number follows
    files[2].write_bytes(content.replace(key + (2).to_bytes(2, "little"), key + (5).to_bytes(2, "little")))


def _repeat_a_tensor(files):
    """The first tensor of two parts gets one name."""
    for file in files[1:3]:
        name = next(iter(read_gguf_header(file).tensors)).encode()
        as_stored = lambda text: len(text).to_bytes(8, "little") + text
        file.write_bytes(file.read_bytes().replace(as_stored(name), as_stored(b"same")))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda files: files[3].unlink(),
            r"parts of a model; missing in its folder: model-00004-of-.* download",
        ),
        (lambda files: [file.unlink() for file in files[1:3]], "model-00002-of-.*, model-00003-of-.*; download"),
        (lambda files: files[0].rename(files[0].with_name("a.gguf")), "whose names must end as -00001-of-0000"),
        (_renumber, r"says that it is part 6 of \d, but its name says 3 of"),
        (_repeat_a_tensor, "both .*model-00002-of-.* and model-00003-of-.* hold the tensor"),
        (lambda files: files[1].write_bytes(files[1].read_bytes()[:-300]), "model-00002-of-.* is cut off or broken"),
    ],
)
def test_parts_that_make_no_model_are_said_in_one_sentence(spoil, says, tmp_path):
    files = _in_parts(tmp_path / "parts")
    spoil(files)
    with pytest.raises(InputError, match=says) as caught:
        load_gguf(files[0] if files[0].exists() else files[0].with_name("a.gguf"))
    assert "\n" not in str(caught.value)


def test_a_folder_of_several_models_lists_them(tmp_path):
    files = _in_parts(tmp_path / "parts")
    (tmp_path / "parts" / "other.gguf").write_bytes(files[0].read_bytes())
    (tmp_path / "parts" / "mmproj-model.gguf").write_bytes(files[0].read_bytes())
    for read in (load_tokenizer, open_parameters):
        with pytest.raises(
            InputError, match=r"several GGUF models: model-00001-of-.*\.gguf, other\.gguf; give"
        ) as caught:
            read(tmp_path / "parts")
        assert "00002" not in str(caught.value)
        assert "mmproj" not in str(caught.value)
