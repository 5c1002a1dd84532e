"""Remove whole layers: those with given indices, or those that change the residual stream least."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from infer.compress.sparsity import check_prunable
from model import ModelConfig, Params, forward
from model.ambient import lenient
from model.errors import InputError
from model.layout import layer_kinds, places


@lenient()
def drop_layers(
    config: ModelConfig,
    params: Params,
    layers: Sequence[int] | int,
    calibration: Int[Array | np.ndarray, "batch seq"] | None = None,
) -> tuple[ModelConfig, Params]:
    """Return the config and parameters without some layers of the main stack.

    layers: indices from 0, or a number of layers: those with the smallest `block_influence` over the calibration
    tokens. Raises InputError on indices that do not exist, on dropping all layers, on a number without calibration
    tokens, and for depth-scaled models, whose remaining layers would get another multiplier.
    """
    check_prunable(params)
    if config.base_num_layers is not None:
        raise InputError(
            "base_num_layers scales every layer by their number; such a model cannot lose layers: first fold that into "
            "the weights (model.convert.fold)"
        )
    if isinstance(layers, int):
        if calibration is None:
            raise InputError(f"choosing {layers} layers needs calibration tokens; give some, or the layers' indices")
        by_influence = np.argsort(block_influence(config, params, jnp.asarray(calibration)), kind="stable")
        layers = [int(index) for index in by_influence[: max(layers, 0)]]
    wrong = [index for index in layers if not 0 <= index < config.num_layers]
    if wrong:
        raise InputError(f"there is no layer {wrong[0]}; the model has {config.num_layers}, counted from 0")
    kept = [index for index in range(config.num_layers) if index not in set(layers)]
    if not kept:
        raise InputError(f"at least one of the model's {config.num_layers} layers must stay")
    return _config_of(config, kept), params | {"layers": _take_layers(config, params["layers"], kept)}


def _take_layers(config: ModelConfig, layers: Params, kept: Sequence[int]) -> Params:
    rows_of: dict[str, list[int]] = {}  # rows of each stack of layers of one kind
    layer_places = places(config)
    for index in kept:
        kind, row = layer_places[index]
        rows_of.setdefault(kind, []).append(row)
    return {
        kind: jax.tree.map(lambda leaf, rows=rows: leaf[np.asarray(rows)], layers[kind])
        for kind, rows in rows_of.items()
    }


def _config_of(config: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    changes: dict[str, Any] = {"num_layers": len(kept)}
    if config.stack == "encoder-decoder":
        changes["num_encoder_layers"] = config.num_encoder_layers
    if len(config.layer_pattern) > 1:
        pattern = config.layer_pattern
        changes["layer_pattern"] = tuple(pattern[index % len(pattern)] for index in kept)
    if config.experts is not None:
        kinds = layer_kinds(config)
        dense = tuple(new for new, old in enumerate(kept) if not kinds[old].experts)
        changes["experts"] = config.experts.replace(first_layer=0, every=1, dense_layers=dense)
    return config.replace(**changes)


@lenient()
def block_influence(
    config: ModelConfig, params: Params, tokens: Int[Array, "batch seq"]
) -> Float[np.ndarray, " layers"]:
    """Return 1 − the mean cosine similarity of the residual stream before and after each layer, in [0, 2].

    Source: Men et al. 2024, equation 1.
    """
    inputs: dict[str, Any] = {"encoder_tokens": tokens} if config.stack == "encoder-decoder" else {}

    @jax.jit
    def influence(params: Params) -> Array:
        hidden = forward(config, params, tokens, outputs=("hidden",), **inputs).hidden
        assert hidden is not None
        before, after = hidden[:-1].astype(jnp.float32), hidden[1:].astype(jnp.float32)
        products = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        return 1 - jnp.mean(jnp.sum(before * after, axis=-1) / jnp.maximum(products, 1e-30), axis=(1, 2))

    return np.asarray(influence(params))
