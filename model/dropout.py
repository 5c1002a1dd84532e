"""Dropout with a traced rate, so that a sweep over rates compiles once."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray


@struct.dataclass
class Dropout:
    """A rate in [0, 1) and the key of a place in the network."""

    rate: Float[Array, ""]
    key: PRNGKeyArray

    def at(self, place: int | Array) -> "Dropout":
        """Return the dropout of a place in the network, whose masks are independent of those of other places."""
        return self.replace(key=jax.random.fold_in(self.key, place))  # type: ignore[attr-defined]

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Zero entries with probability `rate` and scale the rest by 1/(1 − rate) (Srivastava et al. 2014)."""
        keep = jax.random.uniform(self.key, x.shape, jnp.float32) >= self.rate
        return jnp.where(keep, x / (1 - self.rate).astype(x.dtype), 0)
