"""Low-rank adapters (LoRA, Hu et al. 2021): trained updates of low rank to the matrices of a frozen model.

An adapter is a tree of {"a", "b"} at the paths of the matrices that it changes. `attach` puts it on a model with plain
or quantized weights (QLoRA, Dettmers et al. 2023): its leaves are then `model.weights.LowRank`, which every function
that runs the model takes. Rank and alpha are data (`mask_and_scale`), so that one program trains adapters of several
ranks: column k of `a` is drawn with a key of its own, so that an adapter of rank 4 starts as the first 4 columns of one
of rank 8.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from model.ambient import lenient
from model.config import ModelConfig
from model.errors import InputError, UnknownNameError, check_whole
from model.parts import Part
from model.stack import Params
from model.transformer import init
from model.weights import LowRank, is_weight, merged, shape_of

# The linear layers of attention and feed-forward, those of latent attention and of a shared expert among them.
TARGETS = (
    *("query", "key", "value", "output"),
    *("query_down", "query_up", "key_value_down", "key_value_up"),
    *("up", "gate", "down"),
)
# Targets that are not among the default ones: the matrices of all routed experts, and an untied head.
FURTHER = ("experts", "head")
_UNSUPPORTED = {
    "router": "a router is trained whole",
    "embedding": "a table is trained whole",
    "tokens": "a table is trained whole",
}
ALL_TARGETS = (*TARGETS, *FURTHER)
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Adapter(Part):
    """Hyperparameters of an adapter: x @ W becomes x @ W + (x @ a) @ b · alpha / rank.

    rank: the same for all matrices; the largest one where lanes have different ranks. rank_stabilised: alpha / √rank
    instead, so that larger ranks do not learn more slowly (rsLoRA, Kalajdzievski 2023). targets: names of matrices
    among TARGETS and FURTHER; default: all TARGETS, as QLoRA recommends. Targets that the model lacks are ignored.
    "experts": every routed expert has its own factors, for all its matrices. Token tables and routers have none. Raises
    InputError for other names.
    """

    POSITIVE: ClassVar[tuple[str, ...]] = ("rank", "alpha")

    rank: int = 8
    alpha: float = 8.0
    rank_stabilised: bool = False
    targets: Sequence[str] = TARGETS  # a tuple after __post_init__

    def __post_init__(self) -> None:
        targets = self.targets
        if not isinstance(targets, (list, tuple)) or not all(isinstance(name, str) for name in targets):
            raise InputError(f"Adapter.targets={targets!r} must be a list of names such as ['query', 'value']")
        for name in targets:
            if name in _UNSUPPORTED:
                raise InputError(
                    f"Adapter.targets names {name!r}, which gets no adapter: {_UNSUPPORTED[name]}; "
                    f"supported are {', '.join(ALL_TARGETS)}"
                )
            if name not in ALL_TARGETS:
                raise UnknownNameError("adapter target", name, ALL_TARGETS, guess=False)
        object.__setattr__(self, "targets", tuple(name for name in ALL_TARGETS if name in targets))
        super().__post_init__()


def adapted(config: ModelConfig, adapter: Adapter) -> dict[Path, tuple[int, ...]]:
    """Return {path: shape} of every matrix that the adapter changes.

    Shapes are (layers, d_in, d_out), of routed experts (layers, experts, d_in, d_out), of a head (d_in, d_out). Raises
    InputError if the model has none of the targets, or if the rank exceeds a matrix's smaller side.
    """
    tree: Any = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    leaves = traverse_util.flatten_dict(tree)
    found = {path: leaf.shape for path, leaf in leaves.items() if target_of(path) in adapter.targets}
    if not found:
        present = {target_of(path) for path in leaves}
        named = ", ".join(name for name in ALL_TARGETS if name in present)
        raise InputError(f"Adapter.targets={list(adapter.targets)} names none of the model's matrices, {named}")
    for path, shape in found.items():
        if adapter.rank > min(shape[-2:]):
            raise InputError(
                f"Adapter.rank={adapter.rank} exceeds {min(shape[-2:])}, the smaller side of {'/'.join(path)} "
                f"({shape[-2]} × {shape[-1]}); take a smaller rank or leave out the target {path[-2]!r}"
            )
    return found


@lenient()
def init_adapter(config: ModelConfig, adapter: Adapter, params: Any, key: PRNGKeyArray) -> Params:
    """Return a new adapter: {"a": float32 […, d_in, rank], "b": float32 […, rank, d_out]} at every path.

    b is zero, so that the model's outputs are unchanged at first. a is uniform within ±1/√d_in, PEFT's default
    (Kaiming's with a slope of √5); every path and column is drawn with a key of its own. params: those of the model, in
    any stored form and stacked by layer, or their shapes. Raises InputError for parameters of another config, and as
    `adapted` does.
    """
    shapes = adapted(config, adapter)
    tree: dict[Path, Array] = {}
    for path, shape in shapes.items():
        found = shape_of(_leaf(params, path))
        if found != shape:
            raise InputError(
                f"the parameter {'/'.join(path)} has shape {list(found)}; the config asks for {list(shape)}"
            )
        *stack, d_in, d_out = shape
        path_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        column_keys = jax.vmap(jax.random.fold_in, (None, 0))(path_key, jnp.arange(adapter.rank))
        draw_column = functools.partial(_uniform, shape=(*stack, d_in), bound=d_in**-0.5)
        tree[(*path, "a")] = jnp.moveaxis(jax.vmap(draw_column)(column_keys), 0, -1)
        tree[(*path, "b")] = jnp.zeros((*stack, adapter.rank, d_out), jnp.float32)
    return traverse_util.unflatten_dict(tree)


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], bound: float) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def mask_and_scale(
    adapter: Adapter, rank: int | Array | None = None, alpha: float | Array | None = None
) -> tuple[Float[Array, " rank"], Float[Array, ""]]:
    """Return the mask of an adapter's columns, 1 up to `rank` and 0 after it, and the scale alpha / rank.

    rank and alpha may be traced; None: the adapter's own. Rank 2 of an adapter of rank 4 has the mask [1, 1, 0, 0].
    Raises InputError for a rank above the adapter's.
    """
    rank = adapter.rank if rank is None else rank
    alpha = adapter.alpha if alpha is None else alpha
    if isinstance(rank, int):
        check_whole("rank", rank, 1, adapter.rank, hint="an adapter has no more columns")
    mask = (jnp.arange(adapter.rank) < rank).astype(jnp.float32)
    size = jnp.asarray(rank, jnp.float32)
    divisor = jnp.sqrt(size) if adapter.rank_stabilised else size
    return mask, jnp.asarray(alpha, jnp.float32) / divisor


@lenient()
def attach(params: Params, tree: Params, mask: Float[Array, " rank"], scale: Float[Array, ""]) -> Params:
    """Return the parameters with a `LowRank` at every path of an adapter; the base is shared, not copied.

    params: in any stored form, stacked by layer; call `infer.prepare` after this. Raises InputError for an adapter of
    another model.
    """
    leaves: dict[Path, Any] = {}
    for path, (a, b) in _pairs(tree).items():
        base = _leaf(params, path)
        shape = shape_of(base)
        if (*a.shape[:-1], b.shape[-1]) != shape or a.shape[-1] != b.shape[-2] or b.shape[:-2] != shape[:-2]:
            raise InputError(
                f"the adapter does not fit {'/'.join(path)}: a {list(a.shape)} and b {list(b.shape)} change no matrix "
                f"of shape {list(shape)}; give the model that the adapter was trained on"
            )
        if a.shape[-1] != mask.shape[-1]:
            raise InputError(
                f"the adapter has rank {a.shape[-1]} at {'/'.join(path)} and the mask is for rank {mask.shape[-1]}; "
                "make it with mask_and_scale of the same Adapter"
            )
        stack = shape[:-2]
        leaves[path] = LowRank(
            base, a, b, jnp.broadcast_to(mask, (*stack, *mask.shape)), jnp.broadcast_to(scale, stack)
        )
    return _with_leaves(params, leaves)


@lenient()
def fold(params: Params) -> Params:
    """Return the parameters with every `LowRank` merged into one float32 matrix; quantized bases are dequantized.

    All other leaves stay as they are.
    """

    def merge(leaf: Any) -> Any:
        return merged(leaf) if isinstance(leaf, LowRank) else leaf

    return jax.tree.map(merge, params, is_leaf=is_weight)


@lenient()
def masked(tree: Params, mask: Float[Array, " rank"]) -> Params:
    """Return an adapter with zeros in the columns of `a` whose mask is 0."""
    leaves = traverse_util.flatten_dict(tree)
    leaves = {path: leaf * mask if path[-1] == "a" else leaf for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(leaves)


def first_columns(tree: Params, rank: int) -> Params:
    """Return the adapter of a smaller rank: the first `rank` columns of each `a` and rows of each `b`."""
    leaves = traverse_util.flatten_dict(tree)
    leaves = {path: leaf[..., :rank] if path[-1] == "a" else leaf[..., :rank, :] for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(leaves)


def divide(tree: Params) -> tuple[Params, Params]:
    """Return (adapter, other parameters) of a tree that holds both, such as a head trained beside an adapter."""
    leaves = traverse_util.flatten_dict(tree)
    factors = {path: leaf for path, leaf in leaves.items() if path[-1] in ("a", "b")}
    others = {path: leaf for path, leaf in leaves.items() if path not in factors}
    return traverse_util.unflatten_dict(factors), traverse_util.unflatten_dict(others)


def target_of(path: Path) -> str | None:
    """Return the target in ALL_TARGETS that includes the parameter at a path, or None."""
    if path == ("head", "weight") or ("layers" in path and path[-2] == "experts"):
        return path[-2]
    return path[-2] if "layers" in path and path[-1] == "weight" and path[-2] in TARGETS else None


def _pairs(tree: Params) -> dict[Path, tuple[Any, Any]]:
    """Return {path: (a, b)}. Raises InputError if the tree is not an adapter's."""
    leaves = traverse_util.flatten_dict(tree)
    paths = dict.fromkeys(path[:-1] for path in leaves)
    if not paths or {(*path, name) for path in paths for name in ("a", "b")} != leaves.keys():
        raise InputError('the tree is not an adapter, with "a" and "b" at every path; give the tree of init_adapter')
    return {path: (leaves[(*path, "a")], leaves[(*path, "b")]) for path in paths}


def _leaf(params: Any, path: Path) -> Any:
    tree = params
    for number, name in enumerate(path):
        if isinstance(tree, tuple):
            raise InputError("adapters go on parameters that are stacked by layer; attach first, then infer.prepare")
        if not isinstance(tree, Mapping) or name not in tree:
            raise InputError(f"the model has no parameter {'/'.join(path[: number + 1])}, which the adapter changes")
        tree = tree[name]
    return tree


def _with_leaves(tree: Any, leaves: Mapping[Path, Any], path: Path = ()) -> Any:
    """Return the tree with some leaves replaced; all others are shared, not copied."""
    if path in leaves:
        return leaves[path]
    if not isinstance(tree, Mapping):
        return tree
    return {name: _with_leaves(child, leaves, (*path, name)) for name, child in tree.items()}
