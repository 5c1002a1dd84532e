"""Gemma 1, 2 and 3 (the language model of its multimodal files)."""

from model.config import ModelConfig
from model.convert.entries import (
    ATTENTION_BIASES,
    Activation,
    Constant,
    EndTokens,
    Field,
    Heads,
    OneOf,
    Raw,
    WriteOnly,
    decoder_heads,
    decoder_shape,
)
from model.convert.families.llama import ATTENTION, FEED_FORWARD, NORMS, layers
from model.convert.family import Family
from model.convert.rope import Rope, RopePerLayerType
from model.convert.rules import norm
from model.convert.sliding_window import FULL, SLIDING, SlidingWindow


def _shape(vocab: int, d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int, length: int):
    """Return the entries that all of them share, with the defaults of a Transformers class."""
    return (
        *decoder_shape(vocab, d_model, d_ff, layers, heads, length),
        Field("num_kv_heads", "num_key_value_heads", kv_heads),
        Field("head_dim", "head_dim", 256),
        Field("norm_epsilon", "rms_norm_eps", 1e-6),
        *ATTENTION_BIASES,
        Field("tie_embeddings", "tie_word_embeddings", True),
        Constant(norm_offset=True, scale_embedding=True),
        OneOf("use_bidirectional_attention", None, False),
        EndTokens(1),
    )


class _AttentionScale:
    """query_pre_attn_scalar, which replaces head_dim in the scale of attention scores."""

    keys = ("query_pre_attn_scalar",)

    def read(self, raw: Raw) -> dict:
        scalar = raw.get("query_pre_attn_scalar", 256)
        return {"attention_scale": None if scalar == raw["head_dim"] else scalar**-0.5}

    def write(self, config: ModelConfig) -> Raw:
        scalar = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
        return {"query_pre_attn_scalar": scalar}


class _FinalSoftcap:
    """Soft cap of logits, which Transformers does not apply to a classifier's."""

    keys = ("final_logit_softcapping",)

    def __init__(self, heads: Heads, default: float | None):
        self.heads, self.default = heads, default

    def read(self, raw: Raw) -> dict:
        if self.heads.read(raw)["head"] != "language-model":
            return {}
        return {"final_softcap": raw.get("final_logit_softcapping", self.default)}

    def write(self, config: ModelConfig) -> Raw:
        return {"final_logit_softcapping": config.final_softcap}


_SANDWICH = (
    *norm("attention_norm", "input_layernorm"),
    *norm("attention_post_norm", "post_attention_layernorm"),
    *norm("feed_forward_norm", "pre_feedforward_layernorm"),
    *norm("feed_forward_post_norm", "post_feedforward_layernorm"),
)

GEMMA = Family(
    "gemma",
    (
        decoder_heads("Gemma"),
        *_shape(256_000, 3072, 24_576, 28, 16, 16, 8192),
        # In the first files "gelu" means its tanh approximation.
        Activation("hidden_act", "gelu_pytorch_tanh", ("hidden_activation",), (("gelu", "gelu_pytorch_tanh"),)),
        Rope(),
    ),
    layers(NORMS, ATTENTION, FEED_FORWARD),
)


def _alternating(raw: Raw, layers: int) -> list[str]:
    return [FULL if index % 2 else SLIDING for index in range(layers)]


GEMMA2 = Family(
    "gemma2",
    (
        decoder_heads("Gemma2"),
        *_shape(256_000, 2304, 9216, 26, 8, 4, 8192),
        Constant(norm_placement="sandwich"),
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        _AttentionScale(),
        Field("attention_softcap", "attn_logit_softcapping", 50.0),
        _FinalSoftcap(decoder_heads("Gemma2"), 30.0),
        SlidingWindow(4096, _alternating, listed=True),
        Rope(),
    ),
    layers(_SANDWICH, ATTENTION, FEED_FORWARD),
    ignored_keys=("hidden_act", "sliding_window_size", "max_window_layers"),  # Transformers reads other keys for these
)


def _every_sixth_global(raw: Raw, layers: int) -> list[str]:
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    return [SLIDING if (index + 1) % period else FULL for index in range(layers)]


_GEMMA3_HEADS = Heads(
    {
        "Gemma3ForCausalLM": {"head": "language-model"},
        "Gemma3TextForSequenceClassification": {"head": "classifier"},
        "Gemma3TextModel": {"head": "none"},
        # With a vision tower: read, but not written.
        "Gemma3ForConditionalGeneration": {"head": "language-model"},
        "Gemma3ForSequenceClassification": {"head": "classifier"},
        "Gemma3Model": {"head": "none"},
    }
)
GEMMA3 = Family(
    "gemma3_text",
    (
        _GEMMA3_HEADS,
        *_shape(262_208, 2304, 9216, 26, 8, 4, 131_072),
        Constant(norm_placement="sandwich", qk_norm=True),
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        _AttentionScale(),
        WriteOnly(attn_logit_softcapping=None),  # Transformers has the key and does not apply it
        _FinalSoftcap(_GEMMA3_HEADS, None),
        SlidingWindow(4096, _every_sixth_global, listed=True),
        RopePerLayerType(),
    ),
    layers(_SANDWICH, ATTENTION, FEED_FORWARD),
    prefixes=("model.", "model.language_model.", "language_model.model.", "language_model."),
    ignored=(r"^vision_tower\.", r"^multi_modal_projector\."),
    ignored_keys=("hidden_act", "sliding_window_pattern", "_sliding_window_pattern", "max_window_layers"),
)
