"""Quantization of weights: round to nearest, with a scale per output or per group of inputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.adapters import TARGETS
from model.ambient import lenient
from model.dtypes import dtype_name
from model.errors import InputError
from model.parameterization import names_of
from model.stack import Params
from model.weights import Bits, Int4, Int8, Int8Dynamic, Int8Experts, Transposed, is_weight

KINDS = ("float32", "bfloat16", "int8", "int8-dynamic", "int4")
GROUP = 32  # inputs that share an int4 scale

_NUM_FACTORS = 21  # scales tried per group and sign, from that of the largest entry down to half of it


@lenient()
def make(weight: Float[Array, "d_out d_in"], kind: str) -> Any:
    """Return a matrix in one of the stored forms of `model.weights`.

    kind: one of KINDS; "bfloat16" is `Bits` on a CPU. Raises InputError for another kind and for weights that are not
    finite.
    """
    match dtype_name(kind, KINDS, "weight type"):
        case "float32":
            return Transposed(weight.astype(jnp.float32))
        case "bfloat16":
            weight = weight.astype(jnp.bfloat16)
            if jax.default_backend() != "cpu":
                return Transposed(weight)
            return Bits(jax.lax.bitcast_convert_type(weight, jnp.uint16))
        case "int8":
            return quantize_int8(weight)
        case "int8-dynamic":
            stored = quantize_int8(weight)
            return Int8Dynamic(stored.weight, stored.scale)
        case "int4":
            return quantize_int4(weight)


@lenient()
def quantize_layers(params: Params, kind: str) -> Params:
    """Return parameters with the matrices of attention and feed-forward stored as `kind`, still stacked by layer.

    They are a frozen base for training adapters (`model.adapters`), as in QLoRA. Tables, heads, norms, biases, routers
    and the matrices of routed experts are unchanged; `infer.prepare` quantizes more, for decoding only. Raises
    InputError for prepared parameters, for "int8-dynamic", whose rounded activations have no gradient, and as `make`
    does.
    """
    if not isinstance(params.get("layers"), dict):
        raise InputError("quantize_layers takes the parameters that init or training gives, not those of infer.prepare")
    if kind == "int8-dynamic":
        raise InputError("weights int8-dynamic round activations, through which nothing learns; use int8 or int4")

    def quantize(path: tuple[Any, ...], leaf: Any) -> Any:
        names = names_of(path)
        if is_weight(leaf) or "layers" not in names or names[-1] != "weight" or names[-2] not in TARGETS:
            return leaf
        _check_finite(jnp.asarray(leaf))
        return jax.vmap(lambda matrix: make(matrix.T, kind))(jnp.asarray(leaf))

    return jax.tree_util.tree_map_with_path(quantize, params, is_leaf=is_weight)


@lenient()
def quantize_int8(weight: Float[Array, "d_out d_in"]) -> Int8:
    """Round to −127 … 127 times a scale per output, at which the largest entry is ±127.

    Raises InputError for weights that are not finite (outside of jit).
    """
    _check_finite(weight)
    return _int8(weight)


@lenient()
def quantize_experts(weight: Float[Array, "count d_in d_out"]) -> Int8Experts:
    """Round the matrix of every expert as `quantize_int8` does, with outputs on the last axis; raises as that does."""
    _check_finite(weight)
    return _int8_experts(weight)


@lenient()
def quantize_int4(weight: Float[Array, "d_out d_in"]) -> Int4:
    """Round to −8 … 7 times a scale per output and group of GROUP inputs.

    The scale is that of the least squared error among the scales at which the largest entry of the group is −8 or 7,
    and smaller ones down to half of these, which clip the largest entries. Raises InputError as `quantize_int8` does.
    """
    _check_finite(weight)
    even_inputs = 2 * -(-weight.shape[1] // 2)
    return _int4(weight, min(GROUP, even_inputs))


@jax.jit
def _int8(weight: Array) -> Int8:
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=1)
    scale = jnp.where(largest == 0, 1, largest / 127)  # NaN and infinity stay, in the scale
    return Int8(jnp.clip(jnp.round(weight / scale[:, None]), -127, 127).astype(jnp.int8), scale)


@jax.jit
def _int8_experts(weight: Array) -> Int8Experts:
    stored = jax.vmap(lambda matrix: _int8(matrix.T))(weight)
    return Int8Experts(stored.weight.swapaxes(1, 2), stored.scale)


@functools.partial(jax.jit, static_argnums=1)
def _int4(weight: Array, group: int) -> Int4:
    outputs, d_in = weight.shape
    padded = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, -d_in % group)))
    grouped = padded.reshape(outputs, -1, group)
    largest = jnp.take_along_axis(grouped, jnp.argmax(jnp.abs(grouped), axis=-1, keepdims=True), axis=-1)
    largest = jnp.where(largest == 0, 1, largest)
    factors = jnp.linspace(1, 0.5, _NUM_FACTORS, dtype=jnp.float32)
    # The largest entry, of either sign, becomes −8 or 7. A largest entry of 4 has the scales −1/2 (4 = −8 · −1/2) and
    # 4/7; a negative scale swaps the two ends of the range.
    tried = jnp.concatenate([factors / -8, factors / 7])

    def squared_error(scale: Array) -> Array:
        return jnp.sum(jnp.square(_rounded(grouped, scale) * scale - grouped), axis=-1, keepdims=True)

    def try_scale(number: Int[Array, ""], best: tuple[Array, Array]) -> tuple[Array, Array]:
        best_scale, least_error = best
        scale = largest * tried[number]
        error = squared_error(scale)
        return jnp.where(error < least_error, scale, best_scale), jnp.minimum(error, least_error)

    start = largest * tried[0]
    scale, _ = jax.lax.fori_loop(1, len(tried), try_scale, (start, squared_error(start)))
    nibbles = (_rounded(grouped, scale) + 8).astype(jnp.uint8)
    low, high = jnp.split(nibbles, 2, axis=-1)
    return Int4((low | (high << 4)).reshape(outputs, -1), scale[..., 0], d_in)


def _rounded(values: Array, scale: Array) -> Array:
    return jnp.clip(jnp.round(values / scale), -8, 7)


def _check_finite(weight: Array) -> None:
    if not isinstance(weight, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(weight))):
        raise InputError(
            f"a weight of shape {list(weight.shape)} has entries that are not finite; it cannot be rounded"
        )
