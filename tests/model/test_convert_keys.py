"""Keys of config.json: those of published models are known, those of another architecture are refused by name."""

import json

import pytest
from safetensors.numpy import load_file

from model.convert import load_hf
from model.convert.families import FAMILIES
from model.errors import InputError
from model.parts import RopeScaling

# What published files hold beside the sizes of their models; the sizes are small here.
TRANSFORMERS = {
    "_name_or_path": "/raid/x",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.02}
LLAMA = {**TRANSFORMERS, **SIZES, **TOKENS, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
GROUPED = {**LLAMA, "num_key_value_heads": 2, "attention_dropout": 0.0, "rope_theta": 1e6, "tie_word_embeddings": False}
QWEN = {**GROUPED, "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "use_mrope": False}
GEMMA = {
    **GROUPED,
    "head_dim": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": ...,
}
GEMMA2 = {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 4}
GEMMA2 |= {"sliding_window": 8, "cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh"}
DEEPSEEK = {
    **GROUPED,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "auto_map": {},
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "qk_rope_head_dim": 2,
    "moe_intermediate_size": 8,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "pretraining_tp": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_method": "greedy",
    "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32}
    | {"beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
}
GPT2 = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 2,
    "embd_pdrop": 0.1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "n_ctx": 16,
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 16,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "vocab_size": 300,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
BERT = {
    **SIZES,
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "gradient_checkpointing": False,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "use_cache": True,
}
T5 = {
    "d_ff": 24,
    "d_kv": 4,
    "d_model": 16,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "n_positions": 16,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "vocab_size": 300,
    "relative_attention_num_buckets": 8,
    "task_specific_params": {"summarization": {"num_beams": 4}},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PUBLISHED = {
    "llama-1": ("llama", {**LLAMA, "max_sequence_length": 128, "architectures": ["LlamaForCausalLM"]}, {}),
    "llama-2": ("llama", {**LLAMA, "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False}, {}),
    "llama-3.1": (
        "llama",
        {**GROUPED, "attention_bias": False, "mlp_bias": False, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}
        | {"eos_token_id": [2, 3], "pretraining_tp": 1},
        {"rope_scaling": RopeScaling("llama3", 8.0, original_max_seq_len=64), "eos_token_ids": (2, 3)},
    ),
    "smollm2": (
        "llama",
        {**GROUPED, "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
        | {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": None},
        {},
    ),
    "deepseek-coder": ("llama", {**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}}, {}),
    "yarn-llama-2": (
        "llama",
        {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}}
        | {"rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True, "original_max_position_embeddings": 64}},
        {"rope_scaling": RopeScaling("yarn", 16.0, original_max_seq_len=64)},
    ),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 8}, {"sliding_window": 8}),
    "mistral-nemo": ("mistral", {**GROUPED, "head_dim": 8, "sliding_window": None}, {"sliding_window": None}),
    "mixtral": (
        "mixtral",
        {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 4, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.02, "sliding_window": None},
        {},
    ),
    "qwen2.5": ("qwen2", QWEN, {"sliding_window": None, "attention_bias": True}),
    "qwen3": (
        "qwen3",
        {**QWEN, "head_dim": 8, "attention_bias": False, "rope_scaling": None, "sliding_window": None},
        {"qk_norm": True},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {**QWEN, "head_dim": 8, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
        | {"moe_intermediate_size": 8, "norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2}
        | {"output_router_logits": False, "router_aux_loss_coef": 0.001},
        {},
    ),
    "phi-3": (
        "phi3",
        {**GROUPED, "auto_map": {"AutoConfig": "c.C"}, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "sliding_window": 2047}
        | {"original_max_position_embeddings": 128, "attention_bias": False, "rope_scaling": None},
        {"sliding_window": 2047},
    ),
    "phi-4": (
        "phi3",
        {**GROUPED, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1}
        | {"lm_head_bias": False, "mlp_bias": False, "partial_rotary_factor": 0.5, "sliding_window": None},
        {"rope_fraction": 0.5},
    ),
    "gemma": ("gemma", {**GEMMA, "hidden_activation": None}, {"activation": "gelu_tanh", "scale_embedding": True}),
    "gemma-2": ("gemma2", {**GEMMA2, "sliding_window_size": 8}, {"attention_softcap": 50.0, "final_softcap": 30.0}),
    "gemma-3": (
        "gemma3_text",
        {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_local_base_freq": 10000}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 6},
        {"local_rope_base": 10000, "rope_scaling": RopeScaling("linear", 8.0)},
    ),
    "deepseek-v2": ("deepseek_v2", DEEPSEEK, {}),
    "deepseek-v3": (
        "deepseek_v3",
        {**DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1, "num_nextn_predict_layers": 1},
        {},
    ),
    "gpt2": ("gpt2", GPT2, {"d_model": 16, "max_seq_len": 16}),
    "distilgpt2": (
        "gpt2",
        {
            **GPT2,
            "n_special": 0,
            "predict_special_tokens": True,
            "_num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        },
        {"num_layers": 2},
    ),
    "openai-gpt": (
        "openai-gpt",
        {**GPT2, "afn": "gelu", "n_special": 0, "predict_special_tokens": True, "activation_function": ...},
        {"num_layers": 2},
    ),
    "bert-base": ("bert", {**BERT, "architectures": ["BertForMaskedLM"]}, {"head": "masked-language-model"}),
    "bert-multilingual": (
        "bert",
        {**BERT, "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12}
        | {"pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform"},
        {"num_layers": 2},
    ),
    "tinybert": (
        "bert",
        {**BERT, "cell": {}, "emb_size": 16, "structure": [], "pre_trained": "", "training": ""},
        {"num_layers": 2},
    ),
    "cross-encoder": (
        "bert",
        {**BERT, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
        | {"sentence_transformers": {"version": "4.0"}, "classifier_dropout": None},
        {"head": "classifier", "num_labels": 1},
    ),
    "t5-small": ("t5", T5, {"gated": False, "scale_logits": True, "tie_embeddings": True}),
    "flan-t5": (
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2}
        | {"relative_attention_max_distance": 128, "classifier_dropout": 0.0, "dense_act_fn": "gelu_new"}
        | {"is_gated_act": True},
        {"gated": True, "activation": "gelu_tanh", "scale_logits": False, "tie_embeddings": False},
    ),
    "mt5-4": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {"scale_logits": False}),
}


def present(raw):
    return {key: value for key, value in raw.items() if value is not ...}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name):
    model_type, raw, expected = PUBLISHED[name]
    raw = {"model_type": model_type, **present(raw)}
    config = FAMILIES[model_type].read(raw)
    assert {key: getattr(config, key) for key in expected} == expected
    assert FAMILIES[model_type].read(raw | {"a_key_of_tomorrow": None}) == config, "null is a key that is not there"
    with pytest.raises(InputError, match="does not know a_key_of_tomorrow for"):
        FAMILIES[model_type].read(raw | {"a_key_of_tomorrow": 1})


GRANITE = {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
NO_ROPE = {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4}


@pytest.mark.parametrize(
    ("model_type", "raw", "keys"),
    [
        ("llama", {**GROUPED, **NO_ROPE, "use_sliding_window": False}, (*NO_ROPE, "use_sliding_window")),  # smollm3
        ("llama", {**GROUPED, **GRANITE, "logits_scaling": 16.0}, (*GRANITE, "logits_scaling")),
        (
            "llama",
            {**GROUPED, "scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256},
            ("scale_depth", "scale_emb"),
        ),
        (
            "llama",
            {**GROUPED, "logit_scale": 0.0625, "layer_norm_eps": 1e-5},
            ("logit_scale", "layer_norm_eps"),
        ),  # cohere
        ("llama", {**GROUPED, "use_bias": False, "compression_ratio": 1.0}, ("use_bias", "compression_ratio")),  # ernie
        ("llama", {**GROUPED, "clip_qkv": 8.0}, ("clip_qkv",)),  # olmo
        ("llama", {**GROUPED, "bias": False}, ("bias",)),  # internlm2
        ("llama", {**GROUPED, "layer_norm_eps": 1e-5, "use_qkv_bias": False}, ("layer_norm_eps", "use_qkv_bias")),
        ("llama", {**GROUPED, "rope_interleaved": True}, ("rope_interleaved",)),
        ("llama", {**GROUPED, "sliding_window": 8}, ("sliding_window",)),  # mistral
        ("llama", {**QWEN, "sliding_window": None}, ("max_window_layers", "use_sliding_window")),  # qwen3
        ("mistral", {**GROUPED, "attention_bias": False, "mlp_bias": False}, ("attention_bias", "mlp_bias")),  # llama
        ("mixtral", {**GROUPED, "num_experts": 4, "norm_topk_prob": True}, ("num_experts", "norm_topk_prob")),
        ("qwen2", {**QWEN, "shared_expert_intermediate_size": 8}, ("shared_expert_intermediate_size",)),
        ("qwen3_moe", {**QWEN, "first_k_dense_replace": 1}, ("first_k_dense_replace",)),
        ("gemma", present({**GEMMA2}), ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")),
        ("gemma2", present({**GEMMA2, "rope_local_base_freq": 1e4}), ("rope_local_base_freq",)),  # gemma3
        (
            "gpt2",
            {"hidden_size": 16, "num_hidden_layers": 2, "rotary_pct": 0.25, "rotary_emb_base": 10000},
            ("rotary_pct",),
        ),
        ("gpt2", {**GPT2, "multi_query": True}, ("multi_query",)),
        ("gpt2", {**GPT2, "attention_types": [[["global", "local"], 1]], "window_size": 256}, ("window_size",)),
        ("bert", {**BERT, "embedding_size": 8, "num_hidden_groups": 1}, ("embedding_size", "num_hidden_groups")),
        ("bert", {**BERT, "relative_attention": True, "pos_att_type": ["p2c"]}, ("relative_attention", "pos_att_type")),
        ("t5", {**T5, "num_experts": 8, "expert_capacity": 64}, ("num_experts", "expert_capacity")),
        ("t5", {"hidden_size": 16, **T5}, ("hidden_size",)),
        ("deepseek_v3", {**present(DEEPSEEK), "index_n_heads": 4, "index_topk": 2048}, ("index_n_heads", "index_topk")),
    ],
)
def test_keys_of_another_architecture_are_refused_by_name(model_type, raw, keys):
    with pytest.raises(InputError, match=f"does not know .* for model_type '{model_type}'") as caught:
        FAMILIES[model_type].read({"model_type": model_type, **raw})
    assert all(key in str(caught.value) for key in keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "change", "says"),
    [
        ("llama", {"rope_scaling": {"factor": 8.0}}, "factor=8.0 .* is not supported for rope type 'default'"),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, r"mrope_section=\[1, 1, 2\]"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast=32 .* 'linear'"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 2.0}}, "attn_factor=2.0 .* 'yarn'"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 1e6}},
            "rope_parameters has rope_theta; isoflop reads full_",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope type 'linear' is not supported",
        ),
        ("llama", {"quantization": {"bits": 4, "group_size": 64}}, "quantization with quant_method='unnamed' is not"),
        ("llama", {"compression_config": {"quant_method": "fp8"}}, "compression_config with quant_method='fp8'"),
        ("t5", {"tie_word_embeddings": True, "transformers_version": "5.3.0"}, "lacks scale_decoder_outputs.* mT5"),
        ("t5", {"dense_act_fn": "mish"}, "dense_act_fn='mish' is not supported"),
    ],
)
def test_values_that_would_be_passed_over_are_refused(model_type, change, says):
    raw = {"llama": GROUPED, "gemma3_text": present(GEMMA2), "t5": T5}[model_type]
    with pytest.raises(InputError, match=says) as caught:
        FAMILIES[model_type].read({"model_type": model_type, **raw, **change})
    assert "\n" not in str(caught.value)


def test_the_activation_that_transformers_derives_and_writes_counts():
    read = FAMILIES["t5"].read
    assert read({**T5, "feed_forward_proj": "relu", "dense_act_fn": "silu", "is_gated_act": True}).gated
    assert read({**T5, "feed_forward_proj": "relu", "dense_act_fn": "silu"}).activation == "silu"


def test_a_renamed_folder_is_refused_whatever_its_classes_are_called(copy):
    """A user who follows no advice but edits both names still gets no other model."""
    folder = copy("qwen3", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(
        InputError, match=r"config\.json: isoflop does not know .*max_window_layers.* for model_type 'llama'"
    ):
        load_hf(folder)
    plain = dict.fromkeys(("layer_types", "max_window_layers", "use_sliding_window", "sliding_window"), ...)
    folder = copy("qwen3", {**plain, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}, to="without")
    assert any("q_norm" in name for name in load_file(folder / "model.safetensors"))
    with pytest.raises(InputError, match=r"_norm\.weight, which model_type 'llama' does not have"):
        load_hf(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
