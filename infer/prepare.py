"""Training parameters → the layout and precision that decode wants. Leaves are rewritten, nothing else changes."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from model import ModelConfig, Params
from model.errors import UnknownNameError
from model.linear import Transposed

Weights = Literal["float32", "bfloat16"]


def prepare(config: ModelConfig, params: Params, weights: Weights = "float32") -> Params:
    """One tree per layer with every matrix stored (out, in), in the given precision. Do it once per model.

    A layer taken out of a stack is copied before every small product; separate arrays in this layout are read
    once. Vectors (norm scales, biases) stay float32.
    """
    if weights not in get_args(Weights):
        raise UnknownNameError("weight type", weights, get_args(Weights))

    def leaf(path, value):
        if isinstance(value, Transposed):
            return Transposed(value.weight.astype(weights))
        name = path[-1].key
        if name in ("scale", "bias"):
            return value
        value = value.astype(weights)
        return Transposed(jnp.asarray(value.T)) if name == "weight" else value

    rest = {name: tree for name, tree in params.items() if name != "layers"}
    layers = params["layers"]
    if not isinstance(layers, tuple):
        layers = tuple(jax.tree.map(lambda stack, i=i: stack[i], layers) for i in range(config.num_layers))
    prepared = lambda value: isinstance(value, Transposed)
    rewrite = jax.jit(lambda tree: jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=prepared))
    return {**rewrite(rest), "layers": tuple(rewrite(layer) for layer in layers)}
