"""The feed-forward half of a block: plain or gated."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.linear import Linear

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x)) where gated (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        """Each position alone."""
        config = self.config
        activation = ACTIVATIONS[config.activation]
        hidden = Linear(config.d_ff, "hidden", use_bias=config.use_bias, name="up")(x)
        if config.gated:
            gate = Linear(config.d_ff, "hidden", use_bias=config.use_bias, name="gate")(x)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        return Linear(config.d_model, "residual", config.num_layers, config.use_bias, name="down")(hidden)
