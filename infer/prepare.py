"""Training parameters → the layout and precision that decode wants. Leaves are rewritten, nothing else changes."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from model import ModelConfig, Params
from model.errors import UnknownNameError
from model.layout import places
from model.linear import Transposed
from model.parameterization import names_of, role_of

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
        if role_of(names_of(path)) == "vector":
            return value
        value = value.astype(weights)
        return Transposed(jnp.asarray(value.T)) if path[-1].key == "weight" else value

    prepared = lambda value: isinstance(value, Transposed)
    rewrite = jax.jit(lambda tree: jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=prepared))

    def stack(params: Params, encoder: bool) -> Params:
        rest = {name: tree for name, tree in params.items() if name not in ("layers", "encoder")}
        layers = params["layers"]
        if not isinstance(layers, tuple):
            take = lambda name, i: jax.tree.map(lambda leaf: leaf[i], layers[name])
            layers = tuple(take(name, i) for name, i in places(config, encoder))
        return {**rewrite(rest), "layers": tuple(rewrite(layer) for layer in layers)}

    made = stack(params, encoder=False)
    return made | {"encoder": stack(params["encoder"], encoder=True)} if "encoder" in params else made
