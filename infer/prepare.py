"""Training parameters → the layout and precision that decode wants. Leaves are rewritten, nothing else changes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import ModelConfig, Params
from model.ambient import lenient
from model.dtypes import DTypeLike, dtype_name
from model.layout import places
from model.parameterization import names_of, role_of
from model.quantize import KINDS, make, quantize_experts
from model.sharding import spec_for
from model.weights import Int4, Int8Experts, LowRank, Transposed, is_weight, merged, outputs_of

# Matrices with one input, in the order in which their module takes the product's columns apart: see
# `model.linear.side_by_side`.
_TOGETHER = {
    "attention": ("query", "key", "value"),
    "cross_attention": ("key", "value"),
    "feed_forward": ("up", "gate"),
    "shared": ("up", "gate"),
}
_TAKEN_APART = "key_value_up"  # by latent attention, head by head: it stays a plain matrix


@lenient()
def prepare(config: ModelConfig, params: Params, weights: DTypeLike = "float32", mesh: Mesh | None = None) -> Params:
    """One tree per layer, every matrix stored (out, in), those of one input joined. Do it once.

    A layer taken out of a stack is copied before every small product; separate arrays in this layout are read once.
    Vectors (norm scales, biases) and routers stay float32. Tables that are only looked up are stored in bfloat16 where
    the weights are smaller than float32; the matrix that makes the logits is int8 under int4, which it would suffer
    from most (docs/LOG.md). Experts' matrices stay stacked, (count, in, out), and are int8 under int8-dynamic and int4
    too. What was prepared before is left as it is. A change of low rank (`LowRank`) is merged into a plain matrix, and
    stays beside one in fewer bits, which is then not joined with others.
    weights: one of `model.quantize.KINDS`, or a dtype of that name.
    mesh: split by `model.sharding`'s table; matrices that "tensor" splits are not joined, for their columns would move.
    Raises InputError for a weight type that there is not.
    """
    weights = dtype_name(weights, KINDS, "weight type")
    joins = mesh is None or mesh.shape.get("tensor", 1) == 1
    plain = "float32" if weights == "float32" else "bfloat16"
    outside = "int8" if weights == "int4" else weights  # of the layers: the matrix that makes the logits
    tied = config.tie_embeddings and config.head in ("language-model", "masked-language-model")

    def matrix(names: tuple[str, ...], value: Any) -> Any:
        if is_weight(value):
            return value
        role = role_of(names)
        if role == "vector":
            return value
        if role == "embedding" and tied:
            return make(jnp.asarray(value), outside)
        if role == "router":
            return Transposed(jnp.asarray(value, jnp.float32).T)
        if names[-1] == "weight" and names[-2] != _TAKEN_APART:
            return make(jnp.asarray(value).T, outside if role == "head" else weights)
        if names[-2] == "experts" and plain != weights:
            return quantize_experts(jnp.asarray(value))
        return jnp.asarray(value, plain)

    @functools.partial(jax.jit, static_argnums=1)
    def rewrite(tree: Params, prefix: tuple[str, ...]) -> Params:
        tree = jax.tree.map(_merged, tree, is_leaf=is_weight)
        tree = _joined(tree, prefix[-1:]) if joins else tree
        return jax.tree_util.tree_map_with_path(
            lambda path, value: matrix((*prefix, *names_of(path)), value), tree, is_leaf=is_weight
        )

    def placed(tree: Params, prefix: tuple[str, ...]) -> Params:
        tree = rewrite(tree, prefix)
        return tree if mesh is None else _sharded(mesh, tree, prefix)

    def stack(params: Params, prefix: tuple[str, ...]) -> Params:
        layers = params["layers"]
        if not isinstance(layers, tuple):
            take = lambda name, i: jax.tree.map(lambda leaf: leaf[i], params["layers"][name])
            layers = (take(name, i) for name, i in places(config, bool(prefix)))
        rest = {name: tree for name, tree in params.items() if name not in ("layers", "encoder")}
        made = {name: placed(tree, (*prefix, name)) for name, tree in rest.items()}
        return made | {"layers": tuple(placed(layer, (*prefix, "layers", "0")) for layer in layers)}

    made = stack(params, ())
    return made | {"encoder": stack(params["encoder"], ("encoder",))} if "encoder" in params else made


def _merged(weight: Any) -> Any:
    """The plain matrix of a change of low rank to a plain one; all else as it is."""
    return merged(weight) if isinstance(weight, LowRank) and not is_weight(weight.base) else weight


def _joined(tree: Any, name: tuple[str, ...] = ()) -> Any:
    """The tree with matrices (and biases) of one input side by side under the first one's name."""
    if not isinstance(tree, Mapping):
        return tree
    tree = {key: _joined(value, (key,)) for key, value in tree.items()}
    names = _TOGETHER.get(*name) if name else None
    if names is None or not all(part in tree and not is_weight(tree[part]["weight"]) for part in names):
        return tree
    first = {leaf: jnp.concatenate([tree[part][leaf] for part in names], axis=-1) for leaf in tree[names[0]]}
    return {key: value for key, value in tree.items() if key not in names} | {names[0]: first}


def _sharded(mesh: Mesh, tree: Params, prefix: tuple[str, ...]) -> Params:
    """Every leaf where `model.sharding` puts the parameter that it stands for."""
    whole = NamedSharding(mesh, PartitionSpec())

    def one(path: tuple[Any, ...], value: Any) -> Any:
        names = (*prefix, *names_of(path))
        alone = lambda names, leaf: jax.device_put(leaf, NamedSharding(mesh, spec_for(mesh, names, leaf.shape)))
        if isinstance(value, LowRank):
            factors = {name: alone((*names, name), getattr(value, name)) for name in ("a", "b")}
            mask, scale = (jax.device_put(leaf, whole) for leaf in (value.mask, value.scale))
            return LowRank(one(path, value.base), **factors, mask=mask, scale=scale)
        if not is_weight(value):
            return alone(names, value)
        if isinstance(value, Int8Experts):
            experts, inputs, outputs = (*spec_for(mesh, names, value.weight.shape), None, None, None)[:3]
            split = Int8Experts(PartitionSpec(experts, inputs, outputs), PartitionSpec(experts, outputs))
            return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), value, split)
        # Of int4 whole groups of inputs are dealt out: their scales go with them.
        width = (value.scale if isinstance(value, Int4) else value.weight).shape[1]
        shape = (outputs_of(value), width)
        rows_first = names[-2:] == ("embedding", "tokens")
        axes = (*spec_for(mesh, names, shape if rows_first else shape[::-1]), None, None)[:2]
        axes = axes if rows_first else axes[::-1]
        put = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes[: leaf.ndim])))
        return jax.tree.map(put, value)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_weight)
