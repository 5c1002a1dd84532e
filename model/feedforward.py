"""The feed-forward half of a block: plain or gated."""

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
    """The config's activation function. Raises InputError for a name that nobody wrote a function for."""
    if config.activation not in ACTIVATIONS:
        raise InputError(f"activation={config.activation!r} has no function in ACTIVATIONS of model/feedforward.py")
    return ACTIVATIONS[config.activation]


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x)) where gated (Shazeer 2020). width None: the config's d_ff."""

    config: ModelConfig
    width: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        """Each position alone."""
        config, width = self.config, self.width or self.config.d_ff
        activation = activation_of(config)
        into = lambda name: Linear(config, width, "hidden", config.use_bias, name=name)
        if config.gated:
            hidden, gate = side_by_side(x, into("up"), into("gate"))
            hidden = keep_inputs(lambda hidden, gate: activation(gate) * hidden)(hidden, gate)
        else:
            hidden = keep_inputs(activation)(into("up")(x))
        hidden = constrain(hidden, "batch", "sequence", "hidden")
        return Linear(config, config.d_model, "residual", config.use_bias, name="down")(hidden)
