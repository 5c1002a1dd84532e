"""A stack of layers: the same Block, scanned or looped, with its parameters stacked over the layers of a kind."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from model.block import Block
from model.config import ModelConfig
from model.context import whole_rows
from model.execution import Execution
from model.layout import Group, LayerKind, groups, layer_kinds, places_of
from model.norm import Normalize
from model.parameterization import initializer
from model.taps import Taps, edit_embedded, edits_of

Params = dict[str, Any]
"""{"embedding": …, "layers": {kind: every leaf stacked over the layers of that kind}, "final_norm": …, "head": …, …}.

An encoder-decoder's encoder is a second stack under "encoder". `model.layout` says which layer is of which kind.
`infer.prepare` turns "layers" into a tuple with one tree per layer; every function here takes both.
"""
# What of a layer stays for its backward pass, by the execution's `remat`.
_KEPT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def init_stack(config: ModelConfig, key: Array, encoder: bool) -> Params:
    """{"layers", "final_norm", "relative_bias"} of one stack."""
    kinds = layer_kinds(config, encoder)
    x = jnp.zeros((1, 1, config.d_model), jnp.float32)
    one = jnp.zeros((1, 1), jnp.int32)
    stack: Params = {}
    if config.position == "relative":
        make = initializer(config, "position", config.d_model)
        stack["relative_bias"] = {"table": make(key, (config.relative_buckets, config.num_heads))}
    source, source_mask = (x, jnp.ones((1, 1, 1), bool)) if kinds[0].cross else (None, None)
    plain = Execution(attention_kernel="xla")  # it changes no parameter, and a fused one takes no single token
    contexts = whole_rows(config, stack, kinds, one, None, source, source_mask, plain)
    layers = {}
    for number, kind in enumerate(dict.fromkeys(kinds)):
        init_block = lambda key, kind=kind: Block(config, kind).init(key, x, contexts[kind.name])["params"]
        layers[kind.name] = jax.vmap(init_block)(jax.random.split(jax.random.fold_in(key, number), kinds.count(kind)))
    stack["layers"] = layers
    if config.final_norm:
        stack["final_norm"] = Normalize(config).init(key, x)["params"]
    return stack


def run_layers(config, stack, kinds, x, contexts, dropout, wanted, edits, execution):
    """The residual stream after all layers; by name the activations wanted; of every expert layer its report.

    wanted: names in `model.taps.TAPS`. edits: of `check_edits`.
    """

    def layer(kind, tree, x, index, edits):
        at_layer = None if dropout is None else dropout.at(index)
        taps = Taps(wanted, edits)
        y, _, report = Block(config, kind).apply({"params": tree}, x, contexts[kind.name], None, at_layer, taps)
        y = taps("hidden", y)
        return y, (taps.kept, report)

    run, scans = layer, execution.scans(config)
    if execution.remat != "none":
        run = jax.checkpoint(layer, static_argnums=0, policy=_KEPT[execution.remat], prevent_cse=not scans)

    x, edits = edit_embedded(x, edits)
    kept, embedded = [], x
    if scans and not isinstance(stack["layers"], tuple):
        for group in groups(kinds):
            x, one = _scan_group(config, stack["layers"], kinds, group, run, x, edits)
            kept.append(one)
    else:
        trees = layer_trees(stack["layers"], kinds)
        for index, (kind, tree) in enumerate(zip(kinds, trees, strict=True)):
            x, one = run(kind, tree, x, index, edits_of(edits, index))
            kept.append(jax.tree.map(lambda leaf: leaf[None], one))
    layers, reports = zip(*kept, strict=True)
    parts = {name: [part[name] for part in layers] for name in wanted}
    if "hidden" in parts:
        parts["hidden"].insert(0, embedded[None])
    return x, {name: jnp.concatenate(found) for name, found in parts.items()}, [report for report in reports if report]


def _scan_group(config, layers, kinds, group: Group, run, x, edits):
    """One repeating group by `lax.scan`: x after it, and what was kept of its layers, leading axis [layers]."""
    period = len(group.kinds)
    xs: dict[str, Any] = {}
    for kind in dict.fromkeys(group.kinds):
        before, per_round = kinds[: group.first].count(kind), group.kinds.count(kind)
        end = before + per_round * group.repeats
        # With one layer a round, the loop's own slice is the layer: a slice of it would be kept for the backward pass.
        shape = (group.repeats, per_round) if per_round > 1 else (group.repeats,)
        cut = lambda leaf, a=before, b=end, shape=shape: leaf[a:b].reshape(*shape, *leaf.shape[1:])
        xs[kind.name] = jax.tree.map(cut, layers[kind.name])
    last = group.first + period * group.repeats
    rounds = lambda leaf: leaf[group.first : last].reshape(group.repeats, period, *leaf.shape[1:])

    def body(x, of_round):
        number, trees, edits = of_round
        kept, seen = [], dict.fromkeys(trees, 0)
        for offset, kind in enumerate(group.kinds):
            tree = trees[kind.name]
            if group.kinds.count(kind) > 1:
                tree = jax.tree.map(lambda leaf, i=seen[kind.name]: leaf[i], tree)
            seen[kind.name] += 1
            x, one = run(kind, tree, x, group.first + number * period + offset, edits_of(edits, offset))
            kept.append(one)
        return x, kept

    x, kept = jax.lax.scan(body, x, (jnp.arange(group.repeats), xs, jax.tree.map(rounds, edits)))
    # Back into the order of the layers; a layer without experts has nothing to report.
    taps, reports = zip(*kept, strict=True)
    in_order = lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    together = lambda trees: jax.tree.map(in_order, *trees) if trees else {}
    return x, (together(taps), together([report for report in reports if report]))


def layer_trees(layers: Any, kinds: tuple[LayerKind, ...]):
    """One tree of parameters per layer, in order."""
    if isinstance(layers, tuple):
        return layers
    return [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), layers[name]) for name, i in places_of(kinds)]


def auxiliary_of(reports: list[dict[str, Array]]) -> dict[str, Array]:
    """The reports of all expert layers, each [layers, …], as one."""
    if not reports:
        return {}
    joined = {name: jnp.concatenate([report[name] for report in reports]) for name in reports[0]}
    return {name: value if name == "expert_use" else jnp.mean(value) for name, value in joined.items()}
