"""T5: v1.0 (plain ReLU, tied), v1.1 and FLAN (gated GELU, untied)."""

from collections.abc import Collection
from typing import Any

from model.config import ModelConfig
from model.convert.entries import Constant, EndTokens, Field, Heads, Raw, WriteOnly, activation, activation_name
from model.convert.family import Family
from model.convert.rules import TensorRule, linear, norm, of_head, table, within
from model.errors import InputError


class _FeedForward:
    """feed_forward_proj: "relu", "gated-gelu" (with the tanh approximation) and so on.

    dense_act_fn and is_gated_act, which Transformers derives from it and also writes, take precedence.
    """

    keys = ("feed_forward_proj", "dense_act_fn", "is_gated_act")

    def read(self, raw: Raw) -> dict[str, Any]:
        given = str(raw.get("feed_forward_proj", "relu"))
        name = "gated-gelu_new" if given == "gated-gelu" else given
        gated = raw.get("is_gated_act", name.startswith("gated-"))
        key = "dense_act_fn" if "dense_act_fn" in raw else "feed_forward_proj"
        return {"gated": gated, "activation": activation(raw.get("dense_act_fn", name.removeprefix("gated-")), key)}

    def write(self, config: ModelConfig) -> Raw:
        name = activation_name(config.activation)
        if config.gated:
            name = "gated-gelu" if config.activation == "gelu_tanh" else f"gated-{name}"
        return {"feed_forward_proj": name}


class _Layers:
    """num_layers of the encoder, and num_decoder_layers of the decoder, by default the same."""

    keys = ("num_layers", "num_decoder_layers")

    def read(self, raw: Raw) -> dict[str, Any]:
        encoder, decoder = raw.get("num_layers", 6), raw.get("num_decoder_layers")
        return {"num_encoder_layers": encoder, "num_layers": encoder if decoder is None else decoder}

    def write(self, config: ModelConfig) -> Raw:
        return {"num_layers": config.num_encoder_layers, "num_decoder_layers": config.num_layers}


class _Output:
    """Tied head and scaled output: Transformers 4 scales if the head is tied, Transformers 5 by a key.

    A file of Transformers 5 without that key is not a T5's. It may be an mT5's, which has no other difference and is
    not scaled.
    """

    keys = ("is_encoder_decoder", "tie_word_embeddings", "scale_decoder_outputs")

    def read(self, raw: Raw) -> dict[str, Any]:
        if raw.get("is_encoder_decoder", True) is not True:
            raise InputError("is_encoder_decoder=false is not supported for T5; isoflop reads the whole model")
        tied = raw.get("tie_word_embeddings") is not False
        version = str(raw.get("transformers_version") or "0").split(".")[0]
        newer = version.isdigit() and int(version) >= 5
        if newer and raw.get("tie_word_embeddings") and "scale_decoder_outputs" not in raw:
            raise InputError(
                "it lacks scale_decoder_outputs, which Transformers 5 writes for T5 but not for other models such as "
                "mT5; set it to true for T5 v1.0, to false for mT5 and T5 v1.1"
            )
        return {"tie_embeddings": tied, "scale_logits": raw.get("scale_decoder_outputs", tied)}

    def write(self, config: ModelConfig) -> Raw:
        return {"tie_word_embeddings": config.tie_embeddings, "scale_decoder_outputs": config.scale_logits}


def _tied_without_head(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Tie the head if the file has none, as Transformers 5 does independent of config.json."""
    return config if "lm_head.weight" in names else config.replace(tie_embeddings=True)


def _attention(leaf: str, tensor: str, norm_leaf: str, layer: str):
    rules: list[TensorRule] = []
    for matrix, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        rules += linear(f"{leaf}/{matrix}", f"{layer}.{tensor}.{letter}")
    return (*rules, *norm(norm_leaf, f"{layer}.layer_norm"))


def _is_gated(config: ModelConfig) -> bool:
    return config.gated


def _is_plain(config: ModelConfig) -> bool:
    return not config.gated


def _feed_forward(layer: str):
    def matrix(leaf: str, tensor: str):
        return linear(f"feed_forward/{leaf}", f"{layer}.DenseReluDense.{tensor}")

    return (
        *(rule.replace(when=_is_plain) for rule in matrix("up", "wi")),
        *(rule.replace(when=_is_gated) for rule in (*matrix("gate", "wi_0"), *matrix("up", "wi_1"))),
        *matrix("down", "wo"),
        *norm("feed_forward_norm", f"{layer}.layer_norm"),
    )


_RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_SELF = _attention("attention", "SelfAttention", "attention_norm", "layer.0")
_CROSS = _attention("cross_attention", "EncDecAttention", "cross_attention_norm", "layer.1")

T5 = Family(
    "t5",
    (
        Heads(
            {
                "T5ForConditionalGeneration": {"head": "language-model"},
                "T5WithLMHeadModel": {"head": "language-model"},  # its name in the first files
            }
        ),
        Field("vocab_size", "vocab_size", 32_128),
        Field("d_model", "d_model", 512),
        Field("head_dim", "d_kv", 64),
        Field("d_ff", "d_ff", 2048),
        Field("num_heads", "num_heads", 8),
        Field("max_seq_len", "n_positions", 512),
        Field("norm_epsilon", "layer_norm_epsilon", 1e-6),
        Field("relative_buckets", "relative_attention_num_buckets", 32),
        Field("relative_max_distance", "relative_attention_max_distance", 128),
        Field("decoder_start_token_id", "decoder_start_token_id", 0, "pad_token_id"),
        Constant(stack="encoder-decoder", position="relative", norm="rmsnorm", attention_scale=1.0),
        _Layers(),
        _FeedForward(),
        _Output(),
        WriteOnly(is_encoder_decoder=True, pad_token_id=0),
        EndTokens(1),
    ),
    (
        *table("embedding/tokens", "shared.weight"),
        *within("encoder/layers/{i}/", "encoder.block.{i}.", _SELF, _feed_forward("layer.1")),
        *norm("encoder/final_norm", "encoder.final_layer_norm"),
        *table("encoder/relative_bias/table", f"encoder.{_RELATIVE}"),
        *within("layers/{i}/", "decoder.block.{i}.", _SELF, _CROSS, _feed_forward("layer.2")),
        *norm("final_norm", "decoder.final_layer_norm"),
        *table("relative_bias/table", f"decoder.{_RELATIVE}"),
        *of_head("language-model", table("head/weight", "lm_head.weight", transposed=True)),
    ),
    prefixes=(),
    # Copies of the shared table, and a table that the first release has by mistake.
    ignored=(r"^(encoder|decoder)\.embed_tokens\.weight$", r"EncDecAttention\.relative_attention_bias"),
    adapt=_tied_without_head,
)
