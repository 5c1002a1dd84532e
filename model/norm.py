"""LayerNorm and RMSNorm, computed in float32."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.config import ModelConfig


class Normalize(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        """Statistics in float32, the result in x's dtype."""
        config = self.config
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        if config.norm == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_epsilon)
        y = y * scale.astype(jnp.float32)
        if config.norm == "layernorm" and config.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        return y.astype(x.dtype)
