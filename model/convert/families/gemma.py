"""Gemma 1, 2 and 3 (its text part)."""

from model.config import ModelConfig
from model.convert.families.llama import ATTENTION, FEED_FORWARD, NORMS, layers
from model.convert.family import Family
from model.convert.fields import (
    ATTENTION_BIASES,
    FULL,
    SLIDING,
    Activation,
    Always,
    Field,
    Heads,
    Only,
    Raw,
    Stops,
    Windows,
    Written,
    decoder_heads,
    decoder_shape,
)
from model.convert.rope import Rope, RopePerReach
from model.convert.rows import norm


def _shape(vocab: int, d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int, length: int):
    """The keys that all of them share, with a class's defaults."""
    return (
        *decoder_shape(vocab, d_model, d_ff, layers, heads, length),
        Field("num_kv_heads", "num_key_value_heads", kv_heads),
        Field("head_dim", "head_dim", 256),
        Field("norm_epsilon", "rms_norm_eps", 1e-6),
        *ATTENTION_BIASES,
        Field("tie_embeddings", "tie_word_embeddings", True),
        Always(norm_offset=True, scale_embedding=True),
        Only("use_bidirectional_attention", None, False),
        Stops(1),
    )


class _Scores:
    """query_pre_attn_scalar, which stands for head_dim in the scores' scale."""

    keys = ("query_pre_attn_scalar",)

    def read(self, raw: Raw) -> dict:
        scalar = raw.get("query_pre_attn_scalar", 256)
        return {"attention_scale": None if scalar == raw["head_dim"] else scalar**-0.5}

    def write(self, config: ModelConfig) -> Raw:
        scalar = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
        return {"query_pre_attn_scalar": scalar}


class _FinalCap:
    """The cap on logits. Transformers caps no classifier's."""

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
        # The first files say "gelu" and mean its tanh form.
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
        Always(norm_placement="sandwich"),
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        _Scores(),
        Field("attention_softcap", "attn_logit_softcapping", 50.0),
        _FinalCap(decoder_heads("Gemma2"), 30.0),
        Windows(4096, _alternating, listed=True),
        Rope(),
    ),
    layers(_SANDWICH, ATTENTION, FEED_FORWARD),
    harmless=("hidden_act", "sliding_window_size", "max_window_layers"),  # Transformers reads others of their kind
)


def _every_sixth_global(raw: Raw, layers: int) -> list[str]:
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    return [SLIDING if (index + 1) % period else FULL for index in range(layers)]


_GEMMA3_HEADS = Heads(
    {
        "Gemma3ForCausalLM": {"head": "language-model"},
        "Gemma3TextForSequenceClassification": {"head": "classifier"},
        "Gemma3TextModel": {"head": "none"},
        # those with a vision tower, which are read and not written
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
        Always(norm_placement="sandwich", qk_norm=True),
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        _Scores(),
        Written(attn_logit_softcapping=None),  # Transformers has the key and caps no scores
        _FinalCap(_GEMMA3_HEADS, None),
        Windows(4096, _every_sixth_global, listed=True),
        RopePerReach(),
    ),
    layers(_SANDWICH, ATTENTION, FEED_FORWARD),
    prefixes=("model.", "model.language_model.", "language_model.model.", "language_model."),
    ignored=(r"^vision_tower\.", r"^multi_modal_projector\."),
    harmless=("hidden_act", "sliding_window_pattern", "_sliding_window_pattern", "max_window_layers"),
)
