"""One Linear for all projections, and the weight types that it takes."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.parameterization import constant, initializer
from model.sharding import parts_of
from model.weights import is_weight, matmul, outputs_of, plain


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
            bias = self.param("bias", constant(0.0), (self.features,)) if self.use_bias else None
        else:
            weight = self.get_variable("params", "weight")
            bias = self.get_variable("params", "bias") if self.use_bias else None
        y = matmul(x, weight)
        return y if bias is None else y + bias.astype(y.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is there, as a plain array."""
        return not self.is_initializing() and not is_weight(self.get_variable("params", "weight"))

    @property
    def holds_others(self) -> bool:
        """Whether the matrices of others were joined to this one's."""
        return not self.is_initializing() and outputs_of(self.get_variable("params", "weight")) > self.features

    def bias(self) -> Float[Array, " d_out"]:
        """The bias; raises where there is none."""
        return self.get_variable("params", "bias")

    def matrix(self) -> Float[Array, "d_in d_out"]:
        """The weight as a plain array, for products that take it apart."""
        return plain(self.get_variable("params", "weight"))


_FEW_ROWS = 64  # of a product for which joining the matrices, a copy of them, would cost more than it saves


def side_by_side(x: Float[Array, "*batch d_in"], *linears: Linear) -> list[Float[Array, "*batch d_out"]]:
    """What every Linear makes of x: one product with all matrices side by side.

    `infer.prepare` joins them once, under the first one's name. Otherwise they are joined here, where they are plain
    and x is long; not where a mesh splits their columns, which would then have to be moved.
    """
    ends = np.cumsum([one.features for one in linears])[:-1]
    if linears[0].holds_others:
        return jnp.split(linears[0](x), ends, axis=-1)
    joins = x.size // x.shape[-1] >= _FEW_ROWS and parts_of("hidden") == 1 and all(one.is_plain for one in linears)
    if not joins or len(linears) == 1:
        return [one(x) for one in linears]
    y = matmul(x, jnp.concatenate([one.matrix() for one in linears], axis=1))
    if linears[0].use_bias:
        y = y + jnp.concatenate([one.bias() for one in linears]).astype(y.dtype)
    return jnp.split(y, ends, axis=-1)
