"""Where a token stands: sinusoidal tables and rotary turns. Learned tables live with the embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoidal(positions: Int[Array, "batch seq"], d_model: int) -> Float[Array, "batch seq d_model"]:
    """Sines in the first half of the features, cosines in the second (Vaswani et al. 2017, section 3.5)."""
    angles = _angles(positions, d_model, 10_000.0)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotary_tables(
    positions: Int[Array, "batch seq"], head_dim: int, base: float
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """(cos, sin) of every position's angles, computed once per pass and shared by all layers."""
    angles = _angles(positions, head_dim, base)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch heads seq head_dim"],
    tables: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
) -> Float[Array, "batch heads seq head_dim"]:
    """Turn feature i with feature i + head_dim/2 (Su et al. 2021, in the half-split pairing of GPT-NeoX)."""
    cos, sin = (table[:, None].astype(x.dtype) for table in tables)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _angles(positions: Int[Array, "batch seq"], features: int, base: float) -> Float[Array, "batch seq half"]:
    frequencies = base ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    return positions[..., None].astype(jnp.float32) * frequencies[None, None]
