"""A stack of layers: the same Block, scanned or unrolled, with its parameters stacked over the layers of a kind."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.block import Block
from model.config import ModelConfig
from model.context import Context, whole_rows
from model.dropout import Dropout
from model.execution import Execution
from model.layout import Group, LayerKind, groups, layer_kinds, places_of
from model.norm import Normalize
from model.parameterization import initializer
from model.taps import Taps, WholeEdits, edit_embedded, edits_of

Params = dict[str, Any]
"""{"embedding": …, "layers": {kind: every leaf stacked over the layers of that kind}, "final_norm": …, "head": …, …}.

The encoder of an encoder-decoder is a second stack under "encoder". `model.layout` defines the kind of each layer.
`infer.prepare` turns "layers" into a tuple with one tree per layer; every function here takes both.
"""
Report = dict[str, Array]
"""Statistics of an expert layer, see `model.moe.ExpertFeedForward`; empty for a dense layer."""

# What the backward pass keeps of a layer instead of recomputing it, by the execution's `remat`.
_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def init_stack(config: ModelConfig, key: Array, encoder: bool) -> Params:
    """Initialise one stack: {"layers", "final_norm", "relative_bias"}, the last two where the config has them."""
    kinds = layer_kinds(config, encoder)
    x = jnp.zeros((1, 1, config.d_model), jnp.float32)
    one = jnp.zeros((1, 1), jnp.int32)
    stack: Params = {}
    if config.position == "relative":
        make = initializer(config, "position", config.d_model)
        stack["relative_bias"] = {"table": make(key, (config.relative_buckets, config.num_heads))}
    source, source_mask = (x, jnp.ones((1, 1, 1), bool)) if kinds[0].cross else (None, None)
    plain = Execution(attention_kernel="xla")  # fused kernels do not take a single token
    contexts = whole_rows(config, stack, kinds, one, None, source, source_mask, plain)

    def init_block(kind: LayerKind, key: Array) -> Params:
        return Block(config, kind).init(key, x, contexts[kind.name])["params"]

    layers = {}
    for number, kind in enumerate(dict.fromkeys(kinds)):
        keys = jax.random.split(jax.random.fold_in(key, number), kinds.count(kind))
        layers[kind.name] = jax.vmap(functools.partial(init_block, kind))(keys)
    stack["layers"] = layers
    if config.final_norm:
        stack["final_norm"] = Normalize(config).init(key, x)["params"]
    return stack


def run_layers(
    config: ModelConfig,
    stack: Params,
    kinds: tuple[LayerKind, ...],
    x: Float[Array, "batch seq d_model"],
    contexts: dict[str, Context],
    dropout: Dropout | None,
    wanted: Sequence[str],
    edits: WholeEdits,
    execution: Execution,
) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array], list[Report]]:
    """Return the residual stream after all layers, the activations in `wanted`, and the reports of expert layers.

    contexts: by the name of a kind. wanted: names in `model.taps.TAPS`, where the shapes of activations are. edits: as
    `check_edits` returns them. Every leaf of a report has a leading axis of layers; several reports follow one another
    in the order of the layers.

    Under `scan`, consecutive layers whose kinds repeat are one `lax.scan` (see `model.layout.groups`). Eight layers
    (local, local, global, local, local, global, local, local) are two scans: the pattern of three, twice, and (local)
    twice. Each compiles its pattern once, so that the program does not grow with depth.
    """

    def layer(kind: LayerKind, params: Params, x: Array, index: int | Array, edits: WholeEdits):
        layer_dropout = None if dropout is None else dropout.at(index)
        taps = Taps(wanted, edits)
        y, _, report = Block(config, kind).apply({"params": params}, x, contexts[kind.name], None, layer_dropout, taps)
        y = taps("hidden", y)
        return y, (taps.kept, report)

    run, scans = layer, execution.scans(config)
    if execution.remat != "none":
        policy = _REMAT_POLICIES[execution.remat]
        run = jax.checkpoint(layer, static_argnums=0, policy=policy, prevent_cse=not scans)

    x, edits = edit_embedded(x, edits)
    embedded = x
    kept: list[tuple[dict[str, Array], Report]] = []  # every array [layers of a group, …]
    if scans and not isinstance(stack["layers"], tuple):
        for group in groups(kinds):
            x, of_group = _scan_group(stack["layers"], kinds, group, run, x, edits)
            kept.append(of_group)
    else:
        for index, (kind, params) in enumerate(zip(kinds, layer_trees(stack["layers"], kinds), strict=True)):
            x, of_layer = run(kind, params, x, index, edits_of(edits, index))
            kept.append(jax.tree.map(lambda leaf: leaf[None], of_layer))

    activations = {name: [tapped[name] for tapped, _ in kept] for name in wanted}
    if "hidden" in activations:
        activations["hidden"].insert(0, embedded[None])
    reports = [report for _, report in kept if report]
    return x, {name: jnp.concatenate(parts) for name, parts in activations.items()}, reports


def _scan_group(
    layers: Params, kinds: tuple[LayerKind, ...], group: Group, run: Callable, x: Array, edits: WholeEdits
) -> tuple[Array, tuple[dict[str, Array], Report]]:
    """Run a group by `lax.scan`, one repeat of its pattern per iteration; return x, activations and reports.

    For the pattern (local, local, global), twice from layer 0 on, iteration r runs the layers 3r, 3r + 1 and 3r + 2.
    Of the stacked parameters, the local layers [6, …] give the first 4 as [2, 2, …], indexed by iteration and by place
    within the pattern, and the global layers stay [2, …]: one per iteration. A later group of two local layers skips
    the 4 before it: leaf[4:6].
    """
    repeats, period = group.repeats, len(group.kinds)
    per_repeat = {kind.name: group.kinds.count(kind) for kind in group.kinds}
    params = {}
    for kind in dict.fromkeys(group.kinds):
        first = kinds[: group.first].count(kind)
        params[kind.name] = _by_repeat(layers[kind.name], first, repeats, per_repeat[kind.name])

    def run_pattern(x: Array, inputs: tuple[Array, Params, WholeEdits]) -> tuple[Array, list]:
        repeat, params, edits = inputs
        kept, seen = [], dict.fromkeys(params, 0)
        for offset, kind in enumerate(group.kinds):
            layer_params = params[kind.name]
            if per_repeat[kind.name] > 1:
                layer_params = _index(layer_params, seen[kind.name])
            seen[kind.name] += 1
            index = group.first + repeat * period + offset
            x, of_layer = run(kind, layer_params, x, index, edits_of(edits, offset))
            kept.append(of_layer)
        return x, kept

    numbers = jnp.arange(repeats)
    x, kept = jax.lax.scan(run_pattern, x, (numbers, params, _by_repeat(edits, group.first, repeats, period, True)))
    tapped, reports = zip(*kept, strict=True)
    return x, (_interleave(tapped), _interleave([report for report in reports if report]))


def _by_repeat(tree: Any, first: int, repeats: int, per_repeat: int, keep_axis: bool = False) -> Any:
    """Return the layers from `first` on, leaves [layers, …], as [repeats, per_repeat, …].

    A single layer per repeat gets no axis of its own, [repeats, …], unless keep_axis: `lax.scan` then slices the layer
    itself, where indexing it inside the loop would keep a copy for the backward pass.
    """

    def split(leaf: Any) -> Any:
        taken = leaf[first : first + repeats * per_repeat]
        if per_repeat == 1 and not keep_axis:
            return taken
        return taken.reshape(repeats, per_repeat, *leaf.shape[1:])

    return jax.tree.map(split, tree)


def _index(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _interleave(trees: Sequence[Any]) -> Any:
    """Merge one tree per place in a pattern, leaves [repeats, …], into one with leaves [layers, …].

    Two trees with the leaves [a0, a1, a2] and [b0, b1, b2] become one with the leaf [a0, b0, a1, b1, a2, b2].
    """

    def merge(*leaves: Array) -> Array:
        return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(merge, *trees) if trees else {}


def layer_trees(layers: Any, kinds: tuple[LayerKind, ...]) -> Sequence[Params]:
    """Return the parameters of each layer, in the order of the layers, from stacked or prepared ones."""
    if isinstance(layers, tuple):
        return layers
    return [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), layers[name]) for name, i in places_of(kinds)]


def auxiliary_of(reports: list[Report]) -> dict[str, Array]:
    """Merge the reports of all expert layers: means over layers, but "expert_use" [expert layers, experts]."""
    if not reports:
        return {}
    joined = {name: jnp.concatenate([report[name] for report in reports]) for name in reports[0]}
    return {name: value if name == "expert_use" else jnp.mean(value) for name, value in joined.items()}
