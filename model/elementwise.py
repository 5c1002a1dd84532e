"""What elementwise functions keep for their gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def keep_inputs(function: Callable) -> Callable:
    """Have an elementwise function keep its inputs alone for the backward pass, which computes it once more.

    Left to itself `jax.grad` keeps every factor of it: of silu(gate) · up six arrays instead of two. Stacked over the
    layers of a scan, these are written and read again, which takes longer than to compute them (docs/LOG.md).
    """
    return jax.checkpoint(function, prevent_cse=False)


@jax.custom_jvp
def softmax(x: Float[Array, "*batch key"]) -> Float[Array, "*batch key"]:
    """Softmax over the last axis, which keeps its result alone for the backward pass."""
    exponents = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return exponents / jnp.sum(exponents, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (change,) = primals, tangents
    y = softmax(x)
    return y, y * (change - jnp.sum(y * change, axis=-1, keepdims=True))
