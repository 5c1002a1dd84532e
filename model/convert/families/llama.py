"""Llama and similar decoders: Mistral, Mixtral, Qwen 2, Qwen 3 (dense and with experts) and Phi-3."""

from typing import Any

from model.config import ModelConfig
from model.convert.entries import (
    ATTENTION_BIASES,
    Activation,
    Constant,
    EndTokens,
    Field,
    Raw,
    decoder_heads,
    decoder_shape,
)
from model.convert.family import Family
from model.convert.rope import Rope
from model.convert.rules import DECODER_HEADS, experts, fused_experts, linear, norm, table, within
from model.convert.sliding_window import FULL, SLIDING, SlidingWindow
from model.parts import Experts


def _shape(
    vocab: int,
    d_model: int,
    d_ff: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    length: int,
    *,
    epsilon: float = 1e-6,
    head_dim: int | None = None,
):
    """Return the entries that all of them share, with the defaults of a Transformers class."""
    return (
        *decoder_shape(vocab, d_model, d_ff, layers, heads, length),
        Field("num_kv_heads", "num_key_value_heads", kv_heads),
        Field("head_dim", "head_dim", head_dim),
        Field("norm_epsilon", "rms_norm_eps", epsilon),
        Field("tie_embeddings", "tie_word_embeddings", False),
        Activation("hidden_act", "silu"),
    )


ATTENTION = (
    *linear("attention/query", "self_attn.q_proj"),
    *linear("attention/key", "self_attn.k_proj"),
    *linear("attention/value", "self_attn.v_proj"),
    *linear("attention/output", "self_attn.o_proj"),
    *norm("attention/query_norm", "self_attn.q_norm"),
    *norm("attention/key_norm", "self_attn.k_norm"),
)
FEED_FORWARD = (
    *linear("feed_forward/gate", "mlp.gate_proj"),
    *linear("feed_forward/up", "mlp.up_proj"),
    *linear("feed_forward/down", "mlp.down_proj"),
)
EXPERTS = (
    *fused_experts("mlp.experts"),
    *experts("mlp.experts.{e}", "up_proj", "gate_proj", "down_proj"),
    *linear("feed_forward/router", "mlp.gate"),
)
NORMS = (*norm("attention_norm", "input_layernorm"), *norm("feed_forward_norm", "post_attention_layernorm"))
OUTSIDE_LAYERS = (*table("embedding/tokens", "embed_tokens.weight"), *norm("final_norm", "norm"), *DECODER_HEADS)


def layers(*groups):
    """Return the rules of a whole decoder, from those of one layer."""
    return (*within("layers/{i}/", "layers.{i}.", *groups), *OUTSIDE_LAYERS)


LLAMA = Family(
    "llama",
    (
        decoder_heads("Llama"),
        *_shape(32_000, 4096, 11_008, 32, 32, None, 2048),
        *ATTENTION_BIASES,
        Field("use_bias", "mlp_bias", False),
        Rope(),
        EndTokens(2),
    ),
    layers(NORMS, ATTENTION, FEED_FORWARD),
)

MISTRAL = Family(
    "mistral",
    (
        decoder_heads("Mistral"),
        *_shape(32_000, 4096, 14_336, 32, 32, 8, 131_072),
        SlidingWindow(4096),
        Rope(),
        EndTokens(2),
    ),
    layers(NORMS, ATTENTION, FEED_FORWARD),
)


class _MixtralExperts:
    """Experts in every layer; intermediate_size is the width of an expert."""

    keys = ("num_local_experts", "num_experts_per_tok")

    def read(self, raw: Raw) -> dict[str, Any]:
        count, top_k = raw.get("num_local_experts", 8), raw.get("num_experts_per_tok", 2)
        return {"experts": Experts(count, top_k, raw["intermediate_size"])}

    def write(self, config: ModelConfig) -> Raw:
        experts = config.experts or Experts(1, 1, config.d_ff)
        sizes = {"num_local_experts": experts.count, "num_experts_per_tok": experts.top_k}
        return {**sizes, "intermediate_size": experts.d_ff}


MIXTRAL = Family(
    "mixtral",
    (
        decoder_heads("Mixtral"),
        *_shape(32_000, 4096, 14_336, 32, 32, 8, 131_072, epsilon=1e-5),
        _MixtralExperts(),
        SlidingWindow(None),
        Rope(1_000_000.0),
        EndTokens(2),
    ),
    layers(
        NORMS,
        ATTENTION,
        fused_experts("mlp.experts"),
        fused_experts("block_sparse_moe.experts"),
        experts("block_sparse_moe.experts.{e}", up="w3", gate="w1", down="w2"),
        linear("feed_forward/router", "block_sparse_moe.gate"),
    ),
    renamed=((r"\.mlp\.gate\.", ".block_sparse_moe.gate."),),
)


def _beyond_max_window_layers(raw: Raw, layers: int) -> list[str]:
    first = raw.get("max_window_layers", 28)
    return [SLIDING if index >= first else FULL for index in range(layers)]


QWEN2 = Family(
    "qwen2",
    (
        decoder_heads("Qwen2"),
        *_shape(151_936, 4096, 22_016, 32, 32, 32, 32_768),
        Constant(attention_bias=True, attention_output_bias=False),
        SlidingWindow(4096, _beyond_max_window_layers, listed=True, switched=True),
        Rope(),
        EndTokens(None),
    ),
    layers(NORMS, ATTENTION, FEED_FORWARD),
    ignored_keys=("dual_chunk_attention_config",),  # Transformers does not read it
)

QWEN3 = Family(
    "qwen3",
    (
        decoder_heads("Qwen3"),
        *_shape(151_936, 4096, 22_016, 32, 32, 32, 32_768, head_dim=128),
        *ATTENTION_BIASES,
        Constant(qk_norm=True),
        SlidingWindow(4096, _beyond_max_window_layers, listed=True, switched=True),
        Rope(),
        EndTokens(None),
    ),
    layers(NORMS, ATTENTION, FEED_FORWARD),
)


class _QwenExperts:
    """Experts in every decoder_sparse_step-th layer, except for those in mlp_only_layers."""

    keys = (
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("decoder_sparse_step", "mlp_only_layers"),
    )

    def read(self, raw: Raw) -> dict[str, Any]:
        step = raw.get("decoder_sparse_step", 1)
        return {
            "experts": Experts(
                count=raw["num_local_experts"] if "num_local_experts" in raw else raw.get("num_experts", 128),
                top_k=raw.get("num_experts_per_tok", 8),
                d_ff=raw.get("moe_intermediate_size", 768),
                normalise=raw.get("norm_topk_prob", False),
                first_layer=step - 1,
                every=step,
                dense_layers=tuple(raw.get("mlp_only_layers") or ()),
            )
        }

    def write(self, config: ModelConfig) -> Raw:
        experts = config.experts or Experts(1, 1, config.d_ff)
        step, dense = experts.every, list(experts.dense_layers)
        if experts.first_layer != step - 1:  # the step cannot express it: list every dense layer
            step, dense = 1, [index for index in range(config.num_layers) if not experts.in_layer(index)]
        return {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.d_ff,
            "norm_topk_prob": experts.normalise,
            "decoder_sparse_step": step,
            "mlp_only_layers": dense,
        }


QWEN3_MOE = Family(
    "qwen3_moe",
    (
        decoder_heads("Qwen3Moe"),
        *_shape(151_936, 2048, 6144, 24, 32, 4, 32_768),
        *ATTENTION_BIASES,
        Constant(qk_norm=True),
        _QwenExperts(),
        SlidingWindow(4096, switched=True),
        Rope(),
        EndTokens(None),
    ),
    layers(NORMS, ATTENTION, FEED_FORWARD, EXPERTS),
)

PHI3 = Family(
    "phi3",
    (
        decoder_heads("Phi3"),
        *_shape(32_064, 3072, 8192, 32, 32, None, 4096, epsilon=1e-5),
        SlidingWindow(None),
        Rope(kinds=(), fraction=True),
        EndTokens(32_000),
    ),
    layers(
        NORMS,
        linear(("attention/query", "attention/key", "attention/value"), "self_attn.qkv_proj"),
        linear("attention/output", "self_attn.o_proj"),
        linear(("feed_forward/gate", "feed_forward/up"), "mlp.gate_up_proj"),
        linear("feed_forward/down", "mlp.down_proj"),
    ),
    # Keys of longrope, and keys that the tensors imply.
    ignored_keys=(
        *("original_max_position_embeddings", "full_attn_mod", "interpolate_factor"),
        *("attention_bias", "mlp_bias", "lm_head_bias"),
    ),
)
