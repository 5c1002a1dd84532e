"""Tokens (and learned positions) to vectors, and back for a tied head."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.parameterization import initializer
from model.position import sinusoidal


class Embedding(nn.Module):
    """The token table, and the position table where positions are learned."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the tables."""
        config = self.config
        table = initializer("embedding", fan_in=config.d_model, num_layers=config.num_layers)
        self.tokens = self.param("tokens", table, (config.vocab_size, config.d_model))
        if config.position == "learned":
            table = initializer("position", fan_in=config.d_model, num_layers=config.num_layers)
            self.positions = self.param("positions", table, (config.max_seq_len, config.d_model))

    def __call__(
        self, tokens: Int[Array, "batch seq"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq d_model"]:
        """Look tokens up and add absolute positions, in the compute dtype."""
        config = self.config
        x = jnp.take(self.tokens, tokens, axis=0)
        if config.position == "learned":
            x = x + jnp.take(self.positions, positions, axis=0)
        elif config.position == "sinusoidal":
            x = x + sinusoidal(positions, config.d_model)
        return x.astype(config.compute_dtype)
