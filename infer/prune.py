"""Smaller by leaving out: entries of matrices set to zero, or whole layers removed. Trees as training has them."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model import ModelConfig, Params, forward
from model.ambient import lenient
from model.checks import check_number
from model.errors import InputError, UnknownNameError
from model.layout import layer_kinds, places
from model.linear import Linear
from model.parameterization import names_of, role_of
from model.weights import Transposed, is_weight

Method = Literal["magnitude", "wanda"]
Pattern = Literal["2:4"]

_EXPERTS = "experts"  # the stacked matrices of a mixture's experts


@lenient()
def prune(
    config: ModelConfig,
    params: Params,
    method: str = "magnitude",
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    calibration: Int[Array | np.ndarray, "batch seq"] | None = None,
) -> Params:
    """The same tree with the entries of least score at zero, in every matrix of the layers.

    Of each output's inputs the share `sparsity` goes, rounded down; with pattern "2:4" instead two of every four
    neighbours, which sparse tensor cores skip. Scores: "magnitude": |w|; "wanda": |w| · ‖x‖₂ of the input over the
    calibration tokens (Sun et al. 2023, section 3), all inputs being those of the unpruned model. Experts' matrices go
    by magnitude, for each expert sees other tokens. Tables, head, norms, biases and routers stay.

    Raises InputError on a sparsity outside [0, 1), inputs that the pattern does not divide, prepared parameters, and
    "wanda" without calibration tokens.
    """
    if method not in get_args(Method):
        raise UnknownNameError("pruning method", method, get_args(Method))
    if pattern is not None and pattern not in get_args(Pattern):
        raise UnknownNameError("pattern", pattern, get_args(Pattern))
    check_number("sparsity", sparsity, least=0, below=1, hint="0.5 sets half of the entries to zero")
    _check_plain(params)
    norms: dict[tuple[str, ...], Array] = {}
    if method == "wanda":
        if calibration is None:
            raise InputError('method "wanda" needs calibration tokens; give some, or use method "magnitude"')
        norms = input_norms(config, params, jnp.asarray(calibration))

    def one(path: tuple[Any, ...], value: Any) -> Any:
        names = names_of(path)
        if "layers" not in names or role_of(names) not in ("hidden", "residual"):
            return value
        if pattern is not None and value.shape[-2] % 4:
            raise InputError(f"{'/'.join(names)} has {value.shape[-2]} inputs, which the pattern 2:4 does not divide")
        score = np.abs(np.asarray(value, np.float32))
        if method == "wanda" and _EXPERTS not in names[-2:]:
            score = score * np.asarray(norms[names[:-1]])[..., None]
        return jnp.where(_kept(score, sparsity, pattern), value, 0)

    return jax.tree_util.tree_map_with_path(one, params)


def _kept(
    score: Float[np.ndarray, "*stack d_in d_out"], sparsity: float, pattern: str | None
) -> Bool[np.ndarray, "..."]:
    """Which entries stay: per output, or per output and four neighbouring inputs; of equals any may go.

    On the host: it selects in linear time, where XLA would sort.
    """
    columns = np.ascontiguousarray(np.swapaxes(score, -1, -2))
    d_in = columns.shape[-1]
    grouped = columns.reshape(-1, d_in if pattern is None else 4)
    goes = int(sparsity * d_in + 1e-9) if pattern is None else 2
    kept = np.ones(grouped.shape, bool)
    if goes:
        least = np.argpartition(grouped, goes - 1, axis=-1)[:, :goes]
        np.put_along_axis(kept, least, False, axis=-1)
    return np.swapaxes(kept.reshape(columns.shape), -1, -2)


@lenient()
def input_norms(
    config: ModelConfig, params: Params, tokens: Int[Array, "batch seq"]
) -> dict[tuple[str, ...], Float[Array, "layers d_in"]]:
    """‖x‖₂ over the tokens of every input of every `Linear` of the layers, by the path of its stacked weight.

    An encoder-decoder reads the tokens on both sides.
    """
    sides = [False, True] if config.stack == "encoder-decoder" else [False]
    unstacked = params | {"layers": _one_by_one(config, params["layers"], encoder=False)}
    if len(sides) == 2:
        encoder = params["encoder"]
        unstacked["encoder"] = encoder | {"layers": _one_by_one(config, encoder["layers"], encoder=True)}

    @jax.jit
    def squares(params: Params) -> dict[tuple[str, ...], list[Array]]:
        seen: dict[tuple[str, ...], list[Array]] = {}

        def look(call, args, kwargs, context):
            if isinstance(context.module, Linear) and context.method_name == "__call__":
                x = args[0].astype(jnp.float32)
                seen.setdefault(context.module.path, []).append(jnp.sum(x * x, axis=tuple(range(x.ndim - 1))))
            return call(*args, **kwargs)

        inputs: dict[str, Any] = {"encoder_tokens": tokens} if len(sides) == 2 else {}
        with nn.intercept_methods(look):
            forward(config, params, tokens, outputs=("final_hidden",), **inputs)
        return seen

    seen = squares(unstacked)
    norms: dict[tuple[str, ...], list[Array]] = {}
    # The encoder runs first; a path has one entry for every layer that has it, in the order of the layers.
    for encoder in reversed(sides):
        prefix = ("encoder", "layers") if encoder else ("layers",)
        layers = (unstacked["encoder"] if encoder else unstacked)["layers"]
        for (kind, _), tree in zip(places(config, encoder), layers, strict=True):
            for path in [path for path in seen if _has(tree, path)]:
                norms.setdefault((*prefix, kind, *path), []).append(jnp.sqrt(seen[path].pop(0)))
    return {path: jnp.stack(rows) for path, rows in norms.items()}


@lenient()
def drop_layers(
    config: ModelConfig,
    params: Params,
    layers: Sequence[int] | int,
    calibration: Int[Array | np.ndarray, "batch seq"] | None = None,
) -> tuple[ModelConfig, Params]:
    """(config, parameters) without these layers of the main stack: their indices, or how many.

    A number takes those whose removal changes the residual stream least over the calibration tokens: the smallest
    `block_influence`. Raises InputError on indices that do not exist, on dropping all layers, a number without
    calibration tokens, and depth-scaled models, whose remaining layers would be multiplied differently.
    """
    _check_plain(params)
    if config.base_num_layers is not None:
        raise InputError(
            "base_num_layers scales every layer by their number; such a model cannot lose layers: first fold that into "
            "the weights (model.convert.fold)"
        )
    if isinstance(layers, int):
        if calibration is None:
            raise InputError(f"to choose {layers} layers takes calibration tokens; give some, or the layers' indices")
        least = np.argsort(block_influence(config, params, jnp.asarray(calibration)), kind="stable")
        layers = [int(index) for index in least[: max(layers, 0)]]
    wrong = [index for index in layers if not 0 <= index < config.num_layers]
    if wrong:
        raise InputError(f"there is no layer {wrong[0]}; the model has {config.num_layers}, counted from 0")
    stay = [index for index in range(config.num_layers) if index not in set(layers)]
    if not stay:
        raise InputError(f"at least one of the model's {config.num_layers} layers must stay")
    where, kinds = places(config), layer_kinds(config)
    keep: dict[str, list[int]] = {}
    for index in stay:
        keep.setdefault(where[index][0], []).append(where[index][1])
    taken = {
        name: jax.tree.map(lambda leaf, own=own: leaf[np.asarray(own)], params["layers"][name])
        for name, own in keep.items()
    }
    changes: dict[str, Any] = {"num_layers": len(stay)}
    if config.stack == "encoder-decoder":
        changes["num_encoder_layers"] = config.num_encoder_layers
    if len(config.layer_pattern) > 1:
        pattern = config.layer_pattern
        changes["layer_pattern"] = tuple(pattern[index % len(pattern)] for index in stay)
    if config.experts is not None:
        dense = tuple(new for new, old in enumerate(stay) if not kinds[old].experts)
        changes["experts"] = config.experts.replace(first_layer=0, every=1, dense_layers=dense)
    return config.replace(**changes), params | {"layers": taken}


@lenient()
def block_influence(config: ModelConfig, params: Params, tokens: Int[Array, "batch seq"]) -> np.ndarray:
    """1 − the mean cosine between the residual stream before and after each layer (Men et al. 2024, equation 1)."""
    inputs: dict[str, Any] = {"encoder_tokens": tokens} if config.stack == "encoder-decoder" else {}

    @jax.jit
    def influence(params: Params) -> Array:
        hidden = forward(config, params, tokens, outputs=("hidden",), **inputs).hidden
        assert hidden is not None
        before, after = hidden[:-1].astype(jnp.float32), hidden[1:].astype(jnp.float32)
        lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        return 1 - jnp.mean(jnp.sum(before * after, axis=-1) / jnp.maximum(lengths, 1e-30), axis=(1, 2))

    return np.asarray(influence(params))


def _one_by_one(config: ModelConfig, layers: Params, encoder: bool) -> tuple[Params, ...]:
    """One tree per layer, its matrices stored so that each is multiplied alone, by the `Linear` that owns it."""

    def alone(path: tuple[Any, ...], value: Any) -> Any:
        return Transposed(value.T) if names_of(path)[-1] == "weight" else value

    trees = (jax.tree.map(lambda leaf, i=i: leaf[i], layers[name]) for name, i in places(config, encoder))
    return tuple(jax.tree_util.tree_map_with_path(alone, tree) for tree in trees)


def _has(tree: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return bool(path)


def _check_plain(params: Params) -> None:
    if not isinstance(params.get("layers"), dict):
        raise InputError("pruning takes the parameters that init or training gives, not those of infer.prepare")
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError("pruning takes plain matrices; fold the adapters first (model.adapters.fold)")
