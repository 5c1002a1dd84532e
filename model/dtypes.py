"""Names of dtypes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike as DTypeLike

from model.errors import UnknownNameError

FLOATS = ("float32", "bfloat16")
"""The dtypes of parameters and of matrix products."""


def dtype_name(given: Any, supported: Sequence[str], what: str = "dtype") -> str:
    """Return the name of a dtype that is given as a name, a JAX or NumPy dtype or a scalar type.

    A supported name need not be a dtype ("int8-dynamic"). Raises UnknownNameError, listing `supported`, for any other.
    """
    name = given
    if given is not None and not isinstance(given, str):
        try:
            name = jnp.dtype(given).name
        except TypeError:
            name = str(given)
    if name not in supported:
        raise UnknownNameError(what, name, supported, guess=False)
    return name
