"""A model under muP or depth scaling as the same function in the standard parameterization.

muP and CompleteP multiply activations (`model.parameterization`, column "output"); other programs have no place for
these numbers. Every one of them multiplies something linear, so that a weight can take it:

| multiplied | the weights that take it |
|---|---|
| a residual branch, norms "pre" or "post" | its last matrices (attention's output, down) and their biases |
| a residual branch, norms "sandwich" | the scale and bias of the norm that ends it |
| the input of an untied head | the head's matrix; its bias is added later and stays |
| the input of a tied head | the model becomes untied: the head's matrix is the token table times the number |
| the tokens' vectors, where `scale_embedding` takes √base_d_model instead of √d_model | the token table |

Attention scores, routers, poolers and the dense layer of a masked-language-model head have no multiplier. To train on
from the result is another matter: learning rates no longer follow the base width.
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
    """Return a config with parameterization="standard" and no base sizes, and parameters that compute the same.

    params: as `init` or training gives them; a leaf that nothing multiplies is returned as it is. dtype: of the
    result, float32 or bfloat16; None: every leaf keeps its own. Products are float32, rounded once.

    All outputs of `forward` are equal, in float32 to rounding: residual streams and final hidden states too. A tied
    model whose head is multiplied becomes untied. Raises InputError where bfloat16 cannot hold the result: with norms
    "sandwich" and `norm_offset` a scale is stored as its distance from 1.
    """
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    given = None if dtype is None else dtype_name(dtype, FLOATS)
    dtypes = {path: jnp.dtype(given or leaf.dtype) for path, leaf in leaves.items()}
    wide = dict(leaves)

    of_branch = output_multiplier(config, "residual")
    if of_branch != 1:
        for path in leaves:
            if _ends_branch(config, path, leaves):
                _check_precision(config, path, dtypes[path])
                wide[path] = _scaled(leaves[path], of_branch, offset=config.norm_offset and path[-1] == "scale")

    of_table = (scale_of(config).d_model / config.d_model) ** 0.5 if config.scale_embedding else 1.0
    if of_table != 1:
        wide[_TABLE] = _scaled(leaves[_TABLE], of_table)

    if _scales_head(config):
        tied = _HEAD not in leaves
        wide[_HEAD] = _scaled(leaves[_TABLE].T if tied else leaves[_HEAD], logit_multiplier(config))
        dtypes[_HEAD] = dtypes[_TABLE if tied else _HEAD]

    return folded(config), traverse_util.unflatten_dict(
        {path: _rounded(leaf, dtypes[path]) for path, leaf in wide.items()}
    )


def folded(config: ModelConfig) -> ModelConfig:
    """Return the config of what `fold` makes of a model."""
    standard = config.replace(**_STANDARD)
    if not _scales_head(config):
        return standard
    return standard.replace(scale_logits=False, **({"tie_embeddings": False} if _is_tied(config) else {}))


def matrix_multiplier(config: ModelConfig, path: tuple[str, ...]) -> float:
    """Return what `fold` multiplies the matrix of a layer or of an untied head at `path` by, and a change of it too."""
    if path == ("head", "weight"):
        return logit_multiplier(config) if _scales_head(config) else 1.0
    ends = config.norm_placement != "sandwich" and role_of(path) == "residual"
    return output_multiplier(config, "residual") if ends else 1.0


def _scales_head(config: ModelConfig) -> bool:
    """Return whether the head's matrix takes a number, of which a tied table may have taken a part."""
    of_table = (scale_of(config).d_model / config.d_model) ** 0.5 if config.scale_embedding else 1.0
    standard = logit_multiplier(config.replace(**_STANDARD)) * (of_table if _is_tied(config) else 1)
    return config.head != "none" and not math.isclose(logit_multiplier(config) / standard, 1, rel_tol=1e-12)


def _is_tied(config: ModelConfig) -> bool:
    return config.tie_embeddings and config.head in ("language-model", "masked-language-model")


def _ends_branch(config: ModelConfig, path: tuple[str, ...], leaves: dict[tuple[str, ...], Any]) -> bool:
    """Return whether the leaf is a factor or summand of the last operation of a residual branch."""
    if config.norm_placement == "sandwich":
        return path[-2].endswith("_post_norm")
    matrix = (*path[:-1], "weight") if path[-1] == "bias" else path
    return matrix in leaves and role_of(matrix) == "residual"


def _check_precision(config: ModelConfig, path: tuple[str, ...], dtype: Any) -> None:
    if config.norm_offset and path[-1] == "scale" and dtype == jnp.bfloat16:
        by = output_multiplier(config, "residual")
        raise InputError(
            f"bfloat16 cannot hold this model's norms: base_num_layers={config.base_num_layers} multiplies their "
            f"scales by {by:.3g}, and norm_offset stores them as the distance from 1, which leaves too few digits; "
            "write float32"
        )


def _scaled(leaf: Any, factor: float, offset: bool = False) -> Any:
    """The product in float32; offset: the leaf is the distance from 1 of what is multiplied."""
    wide = leaf.astype(jnp.float32)
    return wide * factor + (factor - 1) if offset else wide * factor


def _rounded(leaf: Any, dtype: Any) -> Any:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)
