"""Elementwise functions that save little for the backward pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def keep_inputs(function: Callable) -> Callable:
    """Wrap an elementwise function so that it saves only its inputs for the backward pass, which recomputes it.

    By default `jax.grad` saves every intermediate: five arrays for silu(gate) · up instead of two. A scan over layers
    stacks all of them, and writing and reading the stacks takes longer than recomputing (docs/LOG.md).
    """
    return jax.checkpoint(function, prevent_cse=False)


@jax.custom_jvp
def softmax(x: Float[Array, "*batch key"]) -> Float[Array, "*batch key"]:
    """Return the softmax over the last axis, which saves only its result for the backward pass."""
    exponents = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return exponents / jnp.sum(exponents, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    y = softmax(x)
    return y, y * (tangent - jnp.sum(y * tangent, axis=-1, keepdims=True))
