"""Embedding of tokens, absolute positions and token types."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.norm import Normalize
from model.parameterization import initializer, scale_of
from model.position import sinusoidal
from model.sharding import constrain
from model.weights import is_weight, take_rows


class Embedding(nn.Module):
    """The sum of the token, position and token type embeddings, scaled and normalised as the config says."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "rows seq"],
        token_types: Int[Array, "batch seq"] | None = None,
        real: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """Return the embeddings in the compute dtype. token_types None: all of type 0.

        real: False for padding, whose ids may be outside the vocabulary: its vectors are zero before the norm. Any
        other id outside the vocabulary gives NaN.
        """
        config = self.config

        def table(name: str, role: str, rows: int) -> Any:
            return self.param(name, initializer(config, role, config.d_model), (rows, config.d_model))

        # `self.param` would reject the shape of a prepared table.
        token_table = None if self.is_initializing() else self.get_variable("params", "tokens")
        if not is_weight(token_table):
            token_table = constrain(table("tokens", "embedding", config.vocab_size), "vocab", None)
        x = take_rows(token_table, tokens)
        if config.scale_embedding:
            x = x * scale_of(config).d_model ** 0.5
        if config.position == "learned":
            x = x + jnp.take(table("positions", "position", config.max_seq_len), positions, axis=0)
        elif config.position == "sinusoidal":
            x = x + sinusoidal(positions, config.d_model)
        if config.num_token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + jnp.take(table("types", "position", config.num_token_types), types, axis=0)
        if real is not None:  # an id outside the table gives NaN, which a weight of 0 in attention would not remove
            x = jnp.where(real[..., None], x, 0)
        x = constrain(x.astype(config.compute_dtype), "batch", "sequence", None)
        return Normalize(config, name="norm")(x) if config.embedding_norm else x
