"""Heads: from the final hidden states to logits, labels, a scalar or a sentence embedding."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.ambient import lenient
from model.config import ModelConfig
from model.errors import InputError
from model.feedforward import activation_of
from model.linear import Linear
from model.norm import Normalize
from model.parameterization import output_multiplier, scale_of
from model.sharding import constrain
from model.weights import is_weight, matmul

Pooling = Literal["mean", "first", "last", "pooler"]


class Transform(nn.Module):
    """The layer of a masked-language-model head before its table: norm(act(dense(x))) (BERT, as released)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        """Return the transformed hidden states."""
        y = Linear(self.config, self.config.d_model, "hidden", True, name="transform")(x)
        return Normalize(self.config, name="norm")(activation_of(self.config)(y))


def init_head(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Initialise {"head": …, "pooler": …}, those of them that the config has."""
    keys = jax.random.split(key, 3)
    x = jnp.zeros((1, config.d_model), jnp.float32)
    features = {"classifier": config.num_labels, "scalar": 1, "none": 0}.get(config.head, config.vocab_size)
    makes_tokens = config.head in ("language-model", "masked-language-model")
    head: dict[str, Any] = {}
    if config.head == "masked-language-model":
        head |= Transform(config).init(keys[0], x)["params"]
    if features and not (makes_tokens and config.tie_embeddings):
        head |= Linear(config, features, "head").init(keys[1], x)["params"]
    if features and config.head_bias:
        head["bias"] = jnp.zeros(features, jnp.float32)
    params: dict[str, Any] = {"head": head} if head else {}
    if config.pooler:
        params["pooler"] = Linear(config, config.d_model, "hidden", True).init(keys[2], x)["params"]
    return params


def logit_multiplier(config: ModelConfig) -> float:
    """Return the factor on a head's input, before its matrix or the token table."""
    return output_multiplier(config, "head") * (scale_of(config).d_model ** -0.5 if config.scale_logits else 1)


@lenient()
def head(
    config: ModelConfig, params: dict[str, Any], final_hidden: Float[Array, "*batch d_model"]
) -> Float[Array, "..."]:
    """Return float32 logits of hidden states after the final norm, by the head's matrix or the tied token table.

    Shapes: language model [*batch, vocab_size]; scalar head [*batch]; classifier [*batch, num_labels], of pooled hidden
    states (`pool`). Raises InputError for a model without a head.
    """
    if config.head == "none":
        raise InputError('this model has no head; use forward(…, outputs=("final_hidden",)) or sentence_embedding')
    own = params.get("head", {})
    x = final_hidden
    if config.head == "masked-language-model":
        x = Transform(config).apply({"params": own}, x)
    multiplier = logit_multiplier(config)
    x = x if multiplier == 1 else x * multiplier
    table = own["weight"] if "weight" in own else params["embedding"]["tokens"]
    logits = matmul(x, table if "weight" in own or is_weight(table) else table.T)
    logits = constrain(logits.astype(jnp.float32), *("batch", "sequence")[: logits.ndim - 1], "vocab")
    if config.head_bias:
        logits = logits + own["bias"].astype(jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits[..., 0] if config.head == "scalar" else logits


@lenient()
def pool(
    config: ModelConfig,
    params: dict[str, Any],
    final_hidden: Float[Array, "batch seq d_model"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    pooling: Pooling = "mean",
) -> Float[Array, "batch d_model"]:
    """Return one vector per row.

    segment_ids: 0 is padding. pooling: the mean over tokens, the first or last token, or BERT's pooler, a dense layer
    with tanh on the first token. Raises InputError for "pooler" where the model has none.
    """
    real = jnp.ones(final_hidden.shape[:2], bool) if segment_ids is None else segment_ids > 0
    if pooling == "mean":
        weights = real.astype(final_hidden.dtype)[..., None]
        return jnp.sum(final_hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
    if pooling == "last":
        last = jnp.max(jnp.where(real, jnp.arange(real.shape[1])[None], 0), axis=1)
        return jnp.take_along_axis(final_hidden, last[:, None, None], axis=1)[:, 0]
    first = final_hidden[:, 0]
    if pooling == "first":
        return first
    if not config.pooler:
        raise InputError("pooling='pooler' needs a model with pooler=true; use 'mean' or 'first'")
    return jnp.tanh(Linear(config, config.d_model, "hidden", True).apply({"params": params["pooler"]}, first))


@lenient()
def classify(
    config: ModelConfig,
    params: dict[str, Any],
    final_hidden: Float[Array, "batch seq d_model"],
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch labels"]:
    """Return the logits of a classifier: of an encoder's first token, by its pooler if any; of a decoder's last one."""
    pooling: Pooling = "last" if config.is_causal else "pooler" if config.pooler else "first"
    return head(config, params, pool(config, params, final_hidden, segment_ids, pooling))
