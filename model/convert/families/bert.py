"""BERT, bare (also as a sentence encoder), with its masked-language-model head, or as a classifier."""

from collections.abc import Callable, Collection
from typing import Any

from model.config import ModelConfig
from model.convert.family import Family
from model.convert.fields import Activation, Always, Field, Heads, Only, Raw, Stops, Written
from model.convert.rows import Row, linear, norm, of_head, table, within


class _Pooler:
    """A bare model that was saved without its pooler says so; Transformers itself has no key for it."""

    keys = ("add_pooling_layer",)

    def read(self, raw: Raw) -> dict[str, Any]:
        return {} if raw.get("add_pooling_layer", True) else {"pooler": False}

    def write(self, config: ModelConfig) -> Raw:
        return {} if config.pooler else {"add_pooling_layer": False}


def _masked(tied: bool) -> Callable[[ModelConfig], bool]:
    return lambda config: config.head == "masked-language-model" and config.tie_embeddings == tied


def _pooler_if_there(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Sentence encoders often come without the pooler's weights."""
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
        Always(stack="encoder", position="learned", norm="layernorm", norm_placement="post"),
        Always(gated=False, use_bias=True, embedding_norm=True),
        Activation("hidden_act", "gelu"),
        Only("position_embedding_type", "absolute"),
        Only("is_decoder", False),
        Only("add_cross_attention", False),
        Written(pad_token_id=0),
        Stops(None),
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
        # One bias has two names: a tied head is used by the first, an untied one by the second.
        Row(("head/bias",), "cls.predictions.bias", outside=True, when=_masked(tied=True)),
        Row(
            ("head/bias",),
            "cls.predictions.decoder.bias",
            outside=True,
            fallback="cls.predictions.bias",
            when=_masked(tied=False),
        ),
        *of_head("classifier", linear("head", "classifier")),
    ),
    prefixes=("bert.",),
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    # The bias under its other name; files of pre-training hold a head and a pooler that others do not use.
    ignored=(r"^cls\.predictions\.(decoder\.)?bias$", r"^cls\.seq_relationship\.", r"^pooler\."),
    adapt=_pooler_if_there,
    # Of the first releases, and of TinyBERT's.
    harmless=(
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
        *("pooler_size_per_head", "pooler_type", "cell", "emb_size", "structure", "pre_trained", "training"),
    ),
)
