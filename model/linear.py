"""The linear layer of all projections, and joint products of several."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.parameterization import constant, initializer
from model.sharding import parts_of
from model.weights import is_weight, matmul, outputs_of, plain


class Linear(nn.Module):
    """`x @ weight + bias`, with a weight in any stored form (`model.weights`).

    role: the row of the table in `model.parameterization`.
    """

    config: ModelConfig
    features: int
    role: str
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Return the product in x's dtype."""
        # `self.param` would reject the shapes of prepared leaves.
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
        """True if the weight is a plain array; False during initialisation."""
        return not self.is_initializing() and not is_weight(self.get_variable("params", "weight"))

    @property
    def holds_others(self) -> bool:
        """True if `infer.prepare` concatenated other layers' matrices to this weight."""
        return not self.is_initializing() and outputs_of(self.get_variable("params", "weight")) > self.features

    def bias(self) -> Float[Array, " d_out"]:
        """Return the bias of a layer with use_bias."""
        return self.get_variable("params", "bias")

    def matrix(self) -> Float[Array, "d_in d_out"]:
        """Return the weight as a plain array."""
        return plain(self.get_variable("params", "weight"))


_FEW_ROWS = 64  # for fewer rows, concatenating the matrices, a copy of them, costs more than it saves


def side_by_side(x: Float[Array, "*batch d_in"], *linears: Linear) -> list[Float[Array, "*batch d_out"]]:
    """Return the output of every layer for x, by one product with the concatenation of their matrices.

    `infer.prepare` concatenates matrices once, under the name of the first. Otherwise they are concatenated here if
    they are plain arrays and x has many rows; not where a mesh splits their columns, which would have to be moved.
    """
    ends = np.cumsum([linear.features for linear in linears])[:-1]
    if linears[0].holds_others:
        return jnp.split(linears[0](x), ends, axis=-1)
    many_rows = x.size // x.shape[-1] >= _FEW_ROWS
    joins = many_rows and parts_of("hidden") == 1 and all(linear.is_plain for linear in linears)
    if not joins or len(linears) == 1:
        return [linear(x) for linear in linears]
    y = matmul(x, jnp.concatenate([linear.matrix() for linear in linears], axis=1))
    if linears[0].use_bias:
        y = y + jnp.concatenate([linear.bias() for linear in linears]).astype(y.dtype)
    return jnp.split(y, ends, axis=-1)
