"""The feed-forward network of a block: plain or gated."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.elementwise import keep_inputs
from model.errors import InputError
from model.linear import Linear, side_by_side
from model.sharding import constrain

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def activation_of(config: ModelConfig) -> Callable[[Array], Array]:
    """Return the config's activation function. Raises InputError if ACTIVATIONS has none of that name."""
    if config.activation not in ACTIVATIONS:
        raise InputError(f"activation={config.activation!r} has no function in ACTIVATIONS of model/feedforward.py")
    return ACTIVATIONS[config.activation]


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x)) where gated (Shazeer 2020).

    width: of the hidden layer; None: the config's d_ff.
    """

    config: ModelConfig
    width: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        """Return the output at each position."""
        config, width = self.config, self.width or self.config.d_ff
        activation = activation_of(config)
        up = Linear(config, width, "hidden", config.use_bias, name="up")
        if config.gated:
            gate = Linear(config, width, "hidden", config.use_bias, name="gate")
            hidden, gated = side_by_side(x, up, gate)
            hidden = keep_inputs(lambda hidden, gated: activation(gated) * hidden)(hidden, gated)
        else:
            hidden = keep_inputs(activation)(up(x))
        hidden = constrain(hidden, "batch", "sequence", "hidden")
        return Linear(config, config.d_model, "residual", config.use_bias, name="down")(hidden)
