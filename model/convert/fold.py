"""Fold the multipliers of muP and depth scaling into the weights, for a model in the standard parameterization.

muP and CompleteP multiply activations (`model.parameterization`, column "output"), which other libraries cannot
represent. Each multiplier follows or precedes a linear map, so that a weight can absorb it:

| multiplied | weights that absorb the multiplier |
|---|---|
| a residual branch, norms "pre" or "post" | its last matrices (attention output, down) and their biases |
| a residual branch, norms "sandwich" | scale and bias of the norm at its end |
| the input of an untied head | the head's matrix; its bias, which is added later, is unchanged |
| the input of a tied head | the model becomes untied: the head's matrix is the token table times the multiplier |
| token embeddings, if `scale_embedding` multiplies by √base_d_model instead of √d_model | the token table |

Attention scores, routers, poolers and the dense layer of a masked-language-model head have no multiplier. Training from
the result differs: learning rates no longer follow the base width.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from model.config import ModelConfig
from model.dtypes import FLOATS, DTypeLike, dtype_name
from model.errors import InputError
from model.heads import logit_multiplier
from model.parameterization import output_multiplier, role_of, scale_of
from model.stack import Params

_TABLE, _HEAD = ("embedding", "tokens"), ("head", "weight")
_STANDARD: dict[str, Any] = {"parameterization": "standard", "base_d_model": None, "base_num_layers": None}


def fold(config: ModelConfig, params: Params, *, dtype: DTypeLike | None = None) -> tuple[ModelConfig, Params]:
    """Return a config with parameterization="standard" and no base sizes, and parameters of the same function.

    params: as from `init` or training; leaves without a multiplier are returned unchanged. dtype: of the result,
    float32 or bfloat16; None: that of each leaf. Products are computed in float32 and rounded once.

    All outputs of `forward` are equal, in float32 up to rounding, residual streams and final hidden states included. A
    tied model with a multiplier at its head becomes untied. Raises InputError if bfloat16 cannot represent the result:
    with norms "sandwich" and `norm_offset`, a scale is stored as its difference from 1.
    """
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    given = None if dtype is None else dtype_name(dtype, FLOATS)
    dtypes = {path: jnp.dtype(given or leaf.dtype) for path, leaf in leaves.items()}
    wide = dict(leaves)

    branch_multiplier = output_multiplier(config, "residual")
    if branch_multiplier != 1:
        for path in leaves:
            if _ends_branch(config, path, leaves):
                _check_precision(config, path, dtypes[path])
                offset = config.norm_offset and path[-1] == "scale"
                wide[path] = _scaled(leaves[path], branch_multiplier, offset=offset)

    table_multiplier = _table_multiplier(config)
    if table_multiplier != 1:
        wide[_TABLE] = _scaled(leaves[_TABLE], table_multiplier)

    if _scales_head(config):
        tied = _HEAD not in leaves
        wide[_HEAD] = _scaled(leaves[_TABLE].T if tied else leaves[_HEAD], logit_multiplier(config))
        dtypes[_HEAD] = dtypes[_TABLE if tied else _HEAD]

    rounded = {path: _rounded(leaf, dtypes[path]) for path, leaf in wide.items()}
    return folded(config), traverse_util.unflatten_dict(rounded)


def folded(config: ModelConfig) -> ModelConfig:
    """Return the config that `fold` returns."""
    standard = config.replace(**_STANDARD)
    if not _scales_head(config):
        return standard
    return standard.replace(scale_logits=False, tie_embeddings=config.tie_embeddings and not _is_tied(config))


def matrix_multiplier(config: ModelConfig, path: tuple[str, ...]) -> float:
    """Return the multiplier that `fold` applies to a layer's matrix or an untied head, and to any adapter on it."""
    if path == ("head", "weight"):
        return logit_multiplier(config) if _scales_head(config) else 1.0
    ends = config.norm_placement != "sandwich" and role_of(path) == "residual"
    return output_multiplier(config, "residual") if ends else 1.0


def _table_multiplier(config: ModelConfig) -> float:
    return (scale_of(config).d_model / config.d_model) ** 0.5 if config.scale_embedding else 1.0


def _scales_head(config: ModelConfig) -> bool:
    """Return whether the head has a multiplier beyond that of the standard config and, if tied, of the token table."""
    standard = logit_multiplier(config.replace(**_STANDARD))
    if _is_tied(config):
        standard *= _table_multiplier(config)
    return config.head != "none" and not math.isclose(logit_multiplier(config) / standard, 1, rel_tol=1e-12)


def _is_tied(config: ModelConfig) -> bool:
    return config.tie_embeddings and config.head in ("language-model", "masked-language-model")


def _ends_branch(config: ModelConfig, path: tuple[str, ...], leaves: dict[tuple[str, ...], Any]) -> bool:
    """Return whether the leaf belongs to the last operation of a residual branch."""
    if config.norm_placement == "sandwich":
        return path[-2].endswith("_post_norm")
    matrix = (*path[:-1], "weight") if path[-1] == "bias" else path
    return matrix in leaves and role_of(matrix) == "residual"


def _check_precision(config: ModelConfig, path: tuple[str, ...], dtype: Any) -> None:
    if config.norm_offset and path[-1] == "scale" and dtype == jnp.bfloat16:
        by = output_multiplier(config, "residual")
        raise InputError(
            f"bfloat16 cannot represent this model's norms: base_num_layers={config.base_num_layers} multiplies their "
            f"scales by {by:.3g}, and norm_offset stores the difference from 1, which leaves too few digits; "
            "write float32"
        )


def _scaled(leaf: Any, factor: float, offset: bool = False) -> Any:
    """Return the product in float32. offset: the leaf x stands for 1 + x, so the result is factor · (1 + x) - 1."""
    wide = leaf.astype(jnp.float32)
    return wide * factor + (factor - 1) if offset else wide * factor


def _rounded(leaf: Any, dtype: Any) -> Any:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)
