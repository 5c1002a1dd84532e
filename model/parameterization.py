"""How every parameter starts: one row per role.

Standard parameterization: matrices keep the scale of what they are given (std 1/√fan_in, LeCun 1998), and
the two matrices of each layer that write to the residual stream are shrunk by √(2·layers), so that the stream's
variance does not grow with depth (GPT-2, section 2.3). The token table starts at 1/√d_model: as a tied head it
then makes logits of unit variance. At GPT-2's 0.02 a narrow model first has to grow its table (docs/LOG.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn


class Role(NamedTuple):
    """One row: the standard deviation at the start, and whether weight decay applies."""

    init_std: Callable[[int, int], float]  # (fan_in, num_layers) → standard deviation
    decay: bool


TABLE: dict[str, Role] = {
    "embedding": Role(lambda fan_in, num_layers: fan_in**-0.5, decay=True),
    "position": Role(lambda fan_in, num_layers: 0.02, decay=False),
    "hidden": Role(lambda fan_in, num_layers: fan_in**-0.5, decay=True),
    "residual": Role(lambda fan_in, num_layers: (2 * fan_in * num_layers) ** -0.5, decay=True),
    "head": Role(lambda fan_in, num_layers: fan_in**-0.5, decay=True),
}


def initializer(role: str, *, fan_in: int, num_layers: int) -> nn.initializers.Initializer:
    """A normal initializer with the standard deviation of the role's row."""
    return nn.initializers.normal(TABLE[role].init_std(fan_in, num_layers))


# Which row a parameter of the public tree belongs to, by the two last names of its path.
_ROLE_OF_PATH: dict[tuple[str, str], str] = {
    ("embedding", "tokens"): "embedding",
    ("embedding", "positions"): "position",
    ("query", "weight"): "hidden",
    ("key", "weight"): "hidden",
    ("value", "weight"): "hidden",
    ("output", "weight"): "residual",
    ("up", "weight"): "hidden",
    ("gate", "weight"): "hidden",
    ("down", "weight"): "residual",
    ("head", "weight"): "head",
}


def role_of(path: tuple[str, ...]) -> str:
    """The role of the parameter at `path` in the public tree; "vector" for biases and norm scales."""
    if path[-1] in ("scale", "bias"):
        return "vector"
    try:
        return _ROLE_OF_PATH[path[-2], path[-1]]
    except KeyError:
        raise KeyError(f"parameter {'/'.join(path)} has no role in model/parameterization.py") from None


def decays(path: tuple[str, ...]) -> bool:
    """Whether weight decay applies to the parameter at `path`."""
    role = role_of(path)
    return role != "vector" and TABLE[role].decay
