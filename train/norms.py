"""Compute norms of a tree of parameters, gradients or updates: by part of the model, and in total."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model import ModelConfig, Params, init
from model.parameterization import names_of
from train.objectives.objective import Objective


def group_of(path: tuple[str, ...]) -> str:
    """Return the part of the model that the parameter at `path` belongs to.

    Example: ("layers", "dense", "attention", "query", "weight") is in "attention".
    """
    if "layers" in path:
        part = path[path.index("layers") + 2]
        return "norm" if part.endswith("norm") else part
    if path[0] == "encoder":
        path = path[1:]
    return "norm" if path[0].endswith("norm") else path[0]


def norms_by_group(tree: Params) -> dict[str, Float[Array, ""]]:
    """Return the Euclidean norm of every group, in float32."""
    squares: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group = group_of(names_of(path))
        squares[group] = squares.get(group, jnp.zeros((), jnp.float32)) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def total_norm(norms: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
    """Return the norm of the whole tree from those of its groups."""
    return jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))


@functools.lru_cache(maxsize=256)
def groups_of(config: ModelConfig, objective: Objective) -> tuple[str, ...]:
    """Return the groups of a model that an objective trains."""
    params = jax.eval_shape(lambda key: objective.trained(config, init(config, key), key), jax.random.key(0))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return tuple(dict.fromkeys(group_of(names_of(path)) for path in paths))
