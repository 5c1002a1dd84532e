"""Rewrite training parameters into the layout and precision for decode."""

import functools
from collections.abc import Iterator, Mapping
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

# Matrices with the same input, in the order in which their module splits the columns of the joined product: see
# `model.linear.side_by_side`.
_JOINED = {
    "attention": ("query", "key", "value"),
    "cross_attention": ("key", "value"),
    "feed_forward": ("up", "gate"),
    "shared": ("up", "gate"),
}
_SPLIT_PER_HEAD = "key_value_up"  # of latent attention, which uses it head by head: it stays a plain matrix


@lenient()
def prepare(config: ModelConfig, params: Params, weights: DTypeLike = "float32", mesh: Mesh | None = None) -> Params:
    """Return the parameters for decode: one tree per layer, every matrix stored (out, in), those of one input joined.

    Do it once: a layer sliced out of a stack is copied before every small product, while separate arrays in this layout
    are read once.

    weights: one of `model.quantize.KINDS`, or a dtype of that name. Vectors (norm scales, biases) and routers stay
    float32. Embeddings that are only looked up are stored in bfloat16 unless the weights are float32. The output
    projection is int8 under int4, which would harm it most (docs/LOG.md). Experts' matrices stay stacked, (count, in,
    out), and are int8 under int8-dynamic and int4 too. Leaves that are prepared already stay unchanged. A low-rank
    adapter (`LowRank`) on a plain matrix is merged into it; on a quantised matrix it is kept, and the matrix is not
    joined with others.
    mesh: shards the leaves by the table of `model.sharding`. Matrices are not joined if "tensor" splits them, since
    their columns would move.
    Raises InputError on an unknown weight type.
    """
    weights = dtype_name(weights, KINDS, "weight type")
    joins = mesh is None or mesh.shape.get("tensor", 1) == 1
    plain = "float32" if weights == "float32" else "bfloat16"
    output_weights = "int8" if weights == "int4" else weights  # of the matrix that computes the logits
    tied = config.tie_embeddings and config.head in ("language-model", "masked-language-model")

    def store(names: tuple[str, ...], value: Any) -> Any:
        if is_weight(value):
            return value
        role = role_of(names)
        if role == "vector":
            return value
        if role == "embedding" and tied:
            return make(jnp.asarray(value), output_weights)
        if role == "router":
            return Transposed(jnp.asarray(value, jnp.float32).T)
        if names[-1] == "weight" and names[-2] != _SPLIT_PER_HEAD:
            return make(jnp.asarray(value).T, output_weights if role == "head" else weights)
        if names[-2] == "experts" and plain != weights:
            return quantize_experts(jnp.asarray(value))
        return jnp.asarray(value, plain)

    @functools.partial(jax.jit, static_argnums=1)
    def rewrite(tree: Params, prefix: tuple[str, ...]) -> Params:
        tree = jax.tree.map(_merged, tree, is_leaf=is_weight)
        tree = _join(tree, prefix[-1:]) if joins else tree
        return jax.tree_util.tree_map_with_path(
            lambda path, value: store((*prefix, *names_of(path)), value), tree, is_leaf=is_weight
        )

    def prepare_tree(tree: Params, prefix: tuple[str, ...]) -> Params:
        tree = rewrite(tree, prefix)
        return tree if mesh is None else _sharded(mesh, tree, prefix)

    def unstacked(params: Params, encoder: bool) -> Iterator[Params]:
        for name, index in places(config, encoder):
            yield jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"][name])

    def prepare_stack(params: Params, prefix: tuple[str, ...]) -> Params:
        layers = params["layers"]
        if not isinstance(layers, tuple):
            layers = unstacked(params, encoder=bool(prefix))
        others = {name: tree for name, tree in params.items() if name not in ("layers", "encoder")}
        prepared = {name: prepare_tree(tree, (*prefix, name)) for name, tree in others.items()}
        return prepared | {"layers": tuple(prepare_tree(layer, (*prefix, "layers", "0")) for layer in layers)}

    prepared = prepare_stack(params, ())
    if "encoder" in params:
        prepared = prepared | {"encoder": prepare_stack(params["encoder"], ("encoder",))}
    return prepared


def _merged(weight: Any) -> Any:
    """Merge a low-rank adapter on a plain matrix into it; return any other weight unchanged."""
    return merged(weight) if isinstance(weight, LowRank) and not is_weight(weight.base) else weight


def _join(tree: Any, name: tuple[str, ...] = ()) -> Any:
    """Concatenate matrices (and biases) of one input along their outputs, under the name of the first one."""
    if not isinstance(tree, Mapping):
        return tree
    tree = {key: _join(value, (key,)) for key, value in tree.items()}
    names = _JOINED.get(*name) if name else None
    if names is None or not all(part in tree and not is_weight(tree[part]["weight"]) for part in names):
        return tree
    joined = {leaf: jnp.concatenate([tree[part][leaf] for part in names], axis=-1) for leaf in tree[names[0]]}
    others = {key: value for key, value in tree.items() if key not in names}
    return others | {names[0]: joined}


def _sharded(mesh: Mesh, tree: Params, prefix: tuple[str, ...]) -> Params:
    """Place every leaf as `model.sharding` places the parameter that it stores."""

    def put(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def put_plain(names: tuple[str, ...], leaf: Any) -> Any:
        return put(leaf, spec_for(mesh, names, leaf.shape))

    def place(path: tuple[Any, ...], value: Any) -> Any:
        names = (*prefix, *names_of(path))
        if isinstance(value, LowRank):
            return LowRank(
                place(path, value.base),
                a=put_plain((*names, "a"), value.a),
                b=put_plain((*names, "b"), value.b),
                mask=put(value.mask, PartitionSpec()),
                scale=put(value.scale, PartitionSpec()),
            )
        if not is_weight(value):
            return put_plain(names, value)
        if isinstance(value, Int8Experts):
            experts, inputs, outputs = _padded_spec(spec_for(mesh, names, value.weight.shape), 3)
            specs = Int8Experts(PartitionSpec(experts, inputs, outputs), PartitionSpec(experts, outputs))
            return jax.tree.map(put, value, specs)
        # In int4 whole groups of inputs are distributed, together with their scales.
        num_inputs = (value.scale if isinstance(value, Int4) else value.weight).shape[1]
        if names[-2:] == ("embedding", "tokens"):  # (vocab, d_model), stored as it is
            outputs, inputs = _padded_spec(spec_for(mesh, names, (outputs_of(value), num_inputs)), 2)
        else:  # (in, out), stored as (out, in)
            inputs, outputs = _padded_spec(spec_for(mesh, names, (num_inputs, outputs_of(value))), 2)
        axes = (outputs, inputs)
        return jax.tree.map(lambda leaf: put(leaf, PartitionSpec(*axes[: leaf.ndim])), value)

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_weight)


def _padded_spec(spec: PartitionSpec, length: int) -> tuple[Any, ...]:
    """Return the axes of a spec, which may leave out trailing ones, padded with None."""
    return (*spec, *[None] * length)[:length]
