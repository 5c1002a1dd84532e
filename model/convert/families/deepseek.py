"""DeepSeek-V2 and V3: latent attention, grouped and shared experts."""

from typing import Any

from model.config import ModelConfig
from model.convert.entries import (
    ATTENTION_BIASES,
    Activation,
    Constant,
    EndTokens,
    Field,
    OneOf,
    Raw,
    WriteOnly,
    decoder_heads,
    decoder_shape,
)
from model.convert.families.llama import EXPERTS, FEED_FORWARD, NORMS, layers
from model.convert.family import Family
from model.convert.rope import Rope
from model.convert.rules import linear, norm, table
from model.errors import InputError
from model.parts import Experts, Latent


def _shape(vocab: int, d_model: int, d_ff: int, layers: int, heads: int, length: int):
    """Return the entries that both share, with the defaults of a Transformers class."""
    return (
        *decoder_shape(vocab, d_model, d_ff, layers, heads, length),
        Field("tie_embeddings", "tie_word_embeddings", False),
        Field("norm_epsilon", "rms_norm_eps", 1e-6),
        *ATTENTION_BIASES,
        OneOf("moe_layer_freq", 1),
        Activation("hidden_act", "silu"),
        Rope(),
        _LatentSizes(),
    )


class _LatentSizes:
    """Ranks and head sizes of latent attention; head_dim and qk_head_dim follow from them."""

    keys = (
        *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_key_value_heads"),
        *("head_dim", "qk_head_dim"),
    )

    def read(self, raw: Raw) -> dict[str, Any]:
        return {
            "latent": Latent(
                kv_rank=raw.get("kv_lora_rank", 512),
                nope_dim=raw.get("qk_nope_head_dim", 128),
                rope_dim=raw.get("qk_rope_head_dim", 64),
                v_dim=raw.get("v_head_dim", 128),
                q_rank=raw.get("q_lora_rank", 1536),
            )
        }

    def write(self, config: ModelConfig) -> Raw:
        latent = config.latent or Latent(1, 1, 2, 1)
        return {
            "kv_lora_rank": latent.kv_rank,
            "qk_nope_head_dim": latent.nope_dim,
            "qk_rope_head_dim": latent.rope_dim,
            "v_head_dim": latent.v_dim,
            "q_lora_rank": latent.q_rank,
            "num_key_value_heads": config.num_heads,
        }


def _sizes(experts: Experts) -> Raw:
    return {
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.d_ff,
        "n_shared_experts": experts.shared_d_ff // experts.d_ff,
        "routed_scaling_factor": experts.scale,
        "first_k_dense_replace": experts.first_layer,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
        "norm_topk_prob": experts.normalise,
    }


class _ExpertsV2:
    """Experts of V2: gates are a scaled softmax over all experts; topk_method may limit the choice to some groups."""

    keys = (*_sizes(Experts(1, 1, 1)), "topk_method")

    def read(self, raw: Raw) -> dict[str, Any]:
        width, method = raw.get("moe_intermediate_size", 1407), raw.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise InputError(f"topk_method={method!r} is not supported; isoflop reads greedy and group_limited_greedy")
        grouped = method == "group_limited_greedy"
        return {
            "experts": Experts(
                count=raw.get("n_routed_experts", 64),
                top_k=raw["num_experts_per_tok"],
                d_ff=width,
                shared_d_ff=(raw.get("n_shared_experts", 2) or 0) * width,
                normalise=False,  # Transformers does not read norm_topk_prob here
                scale=raw.get("routed_scaling_factor", 1.0),
                groups=raw["n_group"] if grouped else 1,
                top_groups=raw["topk_group"] if grouped else 1,
                first_layer=raw.get("first_k_dense_replace", 0),
            )
        }

    def write(self, config: ModelConfig) -> Raw:
        experts = config.experts or Experts(1, 1, config.d_ff)
        return {**_sizes(experts), "topk_method": "group_limited_greedy" if experts.groups > 1 else "greedy"}


class _ExpertsV3:
    """Experts of V3: sigmoid gates, selected with a bias from the groups with the best pairs of experts."""

    keys = tuple(_sizes(Experts(1, 1, 1)))

    def read(self, raw: Raw) -> dict[str, Any]:
        width = raw.get("moe_intermediate_size", 2048)
        return {
            "experts": Experts(
                count=raw.get("n_routed_experts", 256),
                top_k=raw.get("num_experts_per_tok", 8),
                d_ff=width,
                shared_d_ff=(raw.get("n_shared_experts", 1) or 0) * width,
                router="sigmoid",
                selection_bias=True,
                normalise=raw.get("norm_topk_prob", True),
                scale=raw.get("routed_scaling_factor", 2.5),
                groups=raw.get("n_group", 8) or 1,
                top_groups=raw.get("topk_group", 4) or 1,
                group_score="top2",
                first_layer=raw.get("first_k_dense_replace", 3),
            )
        }

    def write(self, config: ModelConfig) -> Raw:
        return _sizes(config.experts or Experts(1, 1, config.d_ff))


_ROWS = layers(
    NORMS,
    linear("attention/query", "self_attn.q_proj"),
    linear("attention/query_down", "self_attn.q_a_proj"),
    norm("attention/query_norm", "self_attn.q_a_layernorm"),
    linear("attention/query_up", "self_attn.q_b_proj"),
    linear("attention/key_value_down", "self_attn.kv_a_proj_with_mqa"),
    norm("attention/key_value_norm", "self_attn.kv_a_layernorm"),
    linear("attention/key_value_up", "self_attn.kv_b_proj"),
    linear("attention/output", "self_attn.o_proj"),
    FEED_FORWARD,
    EXPERTS,
    table("feed_forward/router/selection_bias", "mlp.gate.e_score_correction_bias"),
    linear("feed_forward/shared/gate", "mlp.shared_experts.gate_proj"),
    linear("feed_forward/shared/up", "mlp.shared_experts.up_proj"),
    linear("feed_forward/shared/down", "mlp.shared_experts.down_proj"),
)

DEEPSEEK_V2 = Family(
    "deepseek_v2",
    (
        decoder_heads("DeepseekV2"),
        *_shape(102_400, 4096, 11_008, 32, 32, 2048),
        Constant(rope_interleaved=True),
        Field("use_bias", "mlp_bias", False),
        OneOf("scoring_func", "softmax"),
        _ExpertsV2(),
        EndTokens(2),
    ),
    _ROWS,
)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    (
        decoder_heads("DeepseekV3"),
        *_shape(129_280, 7168, 18_432, 61, 128, 4096),
        Field("rope_interleaved", "rope_interleave", True),
        OneOf("mlp_bias", False),
        OneOf("scoring_func", "sigmoid"),
        OneOf("topk_method", "noaux_tc"),
        _ExpertsV3(),
        WriteOnly(num_nextn_predict_layers=0, num_mtp_layers=0),
        EndTokens(1),
    ),
    _ROWS,
    ignore_extra_layers=True,
)
