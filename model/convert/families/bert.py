"""BERT, bare (also as a sentence encoder), with its masked-language-model head, or as a classifier."""

from collections.abc import Collection
from typing import Any

from model.config import ModelConfig
from model.convert.entries import Activation, Constant, EndTokens, Field, Heads, OneOf, Raw, WriteOnly
from model.convert.family import Family
from model.convert.rules import TensorRule, linear, norm, of_head, table, within


class _Pooler:
    """add_pooling_layer, a key of isoflop for a bare model without pooler; Transformers has none for it."""

    keys = ("add_pooling_layer",)

    def read(self, raw: Raw) -> dict[str, Any]:
        return {} if raw.get("add_pooling_layer", True) else {"pooler": False}

    def write(self, config: ModelConfig) -> Raw:
        return {} if config.pooler else {"add_pooling_layer": False}


def _has_tied_head(config: ModelConfig) -> bool:
    return config.head == "masked-language-model" and config.tie_embeddings


def _has_untied_head(config: ModelConfig) -> bool:
    return config.head == "masked-language-model" and not config.tie_embeddings


def _pooler_if_stored(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Drop the pooler if the file has no weights for it, as those of many sentence encoders."""
    return config.replace(pooler=config.pooler and "pooler.dense.weight" in names)


BERT = Family(
    "bert",
    (
        Heads(
            {
                "BertModel": {"head": "none", "pooler": True, "tie_embeddings": True},
                "BertForMaskedLM": {"head": "masked-language-model", "head_bias": True},
                "BertForPreTraining": {"head": "masked-language-model", "head_bias": True},
                "BertForSequenceClassification": {"head": "classifier", "head_bias": True, "pooler": True},
            }
        ),
        _Pooler(),
        Field("vocab_size", "vocab_size", 30_522),
        Field("d_model", "hidden_size", 768),
        Field("num_layers", "num_hidden_layers", 12),
        Field("num_heads", "num_attention_heads", 12),
        Field("d_ff", "intermediate_size", 3072),
        Field("max_seq_len", "max_position_embeddings", 512),
        Field("num_token_types", "type_vocab_size", 2),
        Field("norm_epsilon", "layer_norm_eps", 1e-12),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Constant(stack="encoder", position="learned", norm="layernorm", norm_placement="post"),
        Constant(gated=False, use_bias=True, embedding_norm=True),
        Activation("hidden_act", "gelu"),
        OneOf("position_embedding_type", "absolute"),
        OneOf("is_decoder", False),
        OneOf("add_cross_attention", False),
        WriteOnly(pad_token_id=0),
        EndTokens(None),
    ),
    (
        *table("embedding/tokens", "embeddings.word_embeddings.weight"),
        *table("embedding/positions", "embeddings.position_embeddings.weight"),
        *table("embedding/types", "embeddings.token_type_embeddings.weight"),
        *norm("embedding/norm", "embeddings.LayerNorm"),
        *within(
            "layers/{i}/",
            "encoder.layer.{i}.",
            linear("attention/query", "attention.self.query"),
            linear("attention/key", "attention.self.key"),
            linear("attention/value", "attention.self.value"),
            linear("attention/output", "attention.output.dense"),
            norm("attention_norm", "attention.output.LayerNorm"),
            linear("feed_forward/up", "intermediate.dense"),
            linear("feed_forward/down", "output.dense"),
            norm("feed_forward_norm", "output.LayerNorm"),
        ),
        *linear("pooler", "pooler.dense"),
        *of_head(
            "masked-language-model",
            linear("head/transform", "cls.predictions.transform.dense"),
            norm("head/norm", "cls.predictions.transform.LayerNorm"),
            table("head/weight", "cls.predictions.decoder.weight", transposed=True),
        ),
        # Files have the bias under two names: Transformers reads the first for a tied head, else the second.
        TensorRule(("head/bias",), "cls.predictions.bias", outside=True, when=_has_tied_head),
        TensorRule(
            ("head/bias",),
            "cls.predictions.decoder.bias",
            outside=True,
            fallback="cls.predictions.bias",
            when=_has_untied_head,
        ),
        *of_head("classifier", linear("head", "classifier")),
    ),
    prefixes=("bert.",),
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    # The bias under its other name; the next-sentence head and the pooler of files from pre-training.
    ignored=(r"^cls\.predictions\.(decoder\.)?bias$", r"^cls\.seq_relationship\.", r"^pooler\."),
    adapt=_pooler_if_stored,
    # From the first releases, and from TinyBERT.
    ignored_keys=(
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
        *("pooler_size_per_head", "pooler_type", "cell", "emb_size", "structure", "pre_trained", "training"),
    ),
)
