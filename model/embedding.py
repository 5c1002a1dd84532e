"""Tokens to vectors: the token table, and those of positions and token types where the config has them."""

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
    """The sum of the tables, scaled and normalised as the config says."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "rows seq"],
        token_types: Int[Array, "batch seq"] | None = None,
        real: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """Look tokens up and add absolute positions, in the compute dtype. token_types None: all of type 0.

        real: False for padding, which may lie outside the tables: its vectors are zero before the norm. Any other
        token outside them is NaN.
        """
        config = self.config
        table = lambda name, role, rows: self.param(
            name, initializer(config, role, config.d_model), (rows, config.d_model)
        )
        # `self.param` checks shapes and so refuses a prepared table: it is called only to initialise.
        words = self.is_initializing() or self.get_variable("params", "tokens")
        if not is_weight(words):
            words = constrain(table("tokens", "embedding", config.vocab_size), "vocab", None)
        x = take_rows(words, tokens)
        if config.scale_embedding:
            x = x * scale_of(config).d_model ** 0.5
        if config.position == "learned":
            x = x + jnp.take(table("positions", "position", config.max_seq_len), positions, axis=0)
        elif config.position == "sinusoidal":
            x = x + sinusoidal(positions, config.d_model)
        if config.num_token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + jnp.take(table("types", "position", config.num_token_types), types, axis=0)
        if real is not None:  # what a table does not have is NaN, and would stay so where attention weighs it with 0
            x = jnp.where(real[..., None], x, 0)
        x = constrain(x.astype(config.compute_dtype), "batch", "sequence", None)
        return Normalize(config, name="norm")(x) if config.embedding_norm else x
