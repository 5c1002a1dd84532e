"""One Linear for all projections, and the weight types that it takes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.parameterization import initializer


@struct.dataclass
class Transposed:
    """A weight stored as (out, in): the layout in which small-batch decode reads fastest on CPU."""

    weight: Float[Array, "d_out d_in"]


def matmul(x: Float[Array, "*batch d_in"], weight) -> Float[Array, "*batch d_out"]:
    """`x @ weight` for every weight type; the product runs in x's precision."""
    if isinstance(weight, Transposed):
        return jax.lax.dot_general(x, weight.weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    return x @ weight.astype(x.dtype)


class Linear(nn.Module):
    """`x @ weight + bias`; the role names its row in the parameterization table."""

    config: ModelConfig
    features: int
    role: str
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """The product in x's dtype."""
        # `self.param` checks shapes and so refuses prepared leaves: it is called only to initialise.
        if self.is_initializing():
            init = initializer(self.config, self.role, x.shape[-1])
            weight = self.param("weight", init, (x.shape[-1], self.features), jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        else:
            weight = self.get_variable("params", "weight")
            bias = self.get_variable("params", "bias") if self.use_bias else None
        y = matmul(x, weight)
        return y if bias is None else y + bias.astype(y.dtype)

    def matrix(self) -> Float[Array, "d_in d_out"]:
        """The weight as a plain array, for products that take it apart."""
        weight = self.get_variable("params", "weight")
        return weight.weight.T if isinstance(weight, Transposed) else weight
