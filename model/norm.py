"""LayerNorm and RMSNorm, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.config import ModelConfig, Norm
from model.elementwise import keep_inputs
from model.parameterization import constant


class Normalize(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis.

    norm, epsilon: None: those of the config.
    """

    config: ModelConfig
    norm: Norm | None = None
    epsilon: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Return x normalised, computed in float32, in x's dtype."""
        config, norm = self.config, self.norm or self.config.norm
        epsilon = self.epsilon or config.norm_epsilon
        start = constant(0.0 if config.norm_offset else 1.0)
        scale = self.param("scale", start, (x.shape[-1],)).astype(jnp.float32)
        bias = None
        if norm == "layernorm" and config.norm_bias:
            bias = self.param("bias", constant(0.0), (x.shape[-1],)).astype(jnp.float32)

        def normalize(x: Array, scale: Array, bias: Array | None) -> Array:
            y = x.astype(jnp.float32)
            if norm == "layernorm":
                y = y - jnp.mean(y, axis=-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
            y = y * (1 + scale if config.norm_offset else scale)
            y = y if bias is None else y + bias
            return y.astype(x.dtype)

        return keep_inputs(normalize)(x, scale, bias)
