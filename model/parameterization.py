"""Initial scales and learning rates of all parameters: one row per role, for every width, depth and optimizer.

Standard parameterization: matrices preserve the variance of their input (std 1/√fan_in, LeCun 1998), the matrices
that write to the residual stream are scaled down by √(2·layers) so that the stream's variance does not grow with depth
(GPT-2, section 2.3), and all parameters have the same learning rate. The token table starts at 1/√d_model, so that as a
tied head it gives logits of unit variance. At GPT-2's 0.02 a narrow model first has to grow its table (docs/LOG.md).

muP (Yang et al. 2022, "Tensor Programs V", table 8): w = d_model / base_d_model. Parameters whose fan-in does not grow
with width (tables, vectors) have the scale and learning rate of the base width; hidden matrices have 1/w of the
learning rate under Adam; the readout is multiplied by 1/w. Hyperparameters tuned at the base width then transfer to
every width. Widen by more heads of the same size: 1/√head_dim is then already muP's scale of attention scores.
`scale_embedding` and `scale_logits` use √base_d_model. A router is also a readout, from many inputs to few outputs: it
starts at 1/√w of a hidden matrix's scale. The initial logits of a random readout shrink as 1/√w; `zero_readout` starts
all widths from the same logits, which makes the coordinate check clearer but trains worse (docs/LOG.md).

Depth (Dey et al. 2025, "CompleteP", α = 1): l = num_layers / base_num_layers. Every residual branch is multiplied by
1/l, and the factor √(2·layers) is that of the base depth; Adam's learning rates stay, SGD's grow by l within layers.

Muon's updates have singular values near 0.2 · √max(fan_in, fan_out), so that their entries are of the size of Adam's
(Liu et al. 2025). The change of a matrix's output keeps its size if the singular values do not grow with width (Yang et
al. 2023, "A Spectral Condition for Feature Learning"): 1/√w.

Low-rank adapters (`model.adapters`): the factor a maps many inputs to few outputs and has 1/w of the learning rate
under Adam, as hidden matrices do; b maps few to many and has that of a table (Hayou et al. 2024, "LoRA+", find the same
ratio).

Weight decay does not depend on the role: each step subtracts learning_rate · weight_decay · weight from every matrix,
without its role's multiplier, so that the time constant of the decay is the same at every width.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.config import ModelConfig

Family = Literal["adam", "sgd", "muon"]


class Scale(NamedTuple):
    """The size of a model as seen by a row of the table: base width and depth, and the ratios to them."""

    d_model: int  # under muP the base width
    num_layers: int  # under depth scaling the base depth
    width: float  # w: d_model over the base width; 1 in the standard parameterization
    depth: float  # l: num_layers over the base depth; 1 without depth scaling


class Role(NamedTuple):
    """One row of the table.

    std: the initial standard deviation, of (fan_in, scale). output: the factor on the product; exported models have
    none, `model.convert.fold` multiplies it into the weights. adam, sgd, muon: the factor on the learning rate. decay:
    whether weight decay applies.
    """

    std: Callable[[int, Scale], float]
    output: Callable[[Scale], float]
    adam: Callable[[Scale], float]
    sgd: Callable[[Scale], float]
    muon: Callable[[Scale], float]  # applies to hidden and residual matrices; the other roles get Adam's updates
    decay: bool


def _one(s: Scale) -> float:
    return 1.0


def _w(s: Scale) -> float:
    return s.width


def _per_w(s: Scale) -> float:
    return 1 / s.width


def _per_root_w(s: Scale) -> float:
    return s.width**-0.5


def _l(s: Scale) -> float:
    return s.depth


def _per_l(s: Scale) -> float:
    return 1 / s.depth


def _l_w(s: Scale) -> float:
    return s.depth * s.width


def _l_per_w(s: Scale) -> float:
    return s.depth / s.width


def _by_fan_in(fan_in: int, s: Scale) -> float:
    return fan_in**-0.5


def _by_fan_in_and_depth(fan_in: int, s: Scale) -> float:
    return (2 * fan_in * s.num_layers) ** -0.5


# fmt: off
TABLE: dict[str, Role] = {
    #                  std at the start                             output   Adam    SGD       Muon         decay
    "embedding": Role(lambda fan_in, s: s.d_model**-0.5,            _one,   _one,   _w,       _one,        True),
    "position":  Role(lambda fan_in, s: 0.02,                       _one,   _one,   _w,       _one,        False),
    "hidden":    Role(_by_fan_in,                                   _one,   _per_w, _l,       _per_root_w, True),
    "residual":  Role(_by_fan_in_and_depth,                         _per_l, _per_w, _l,       _per_root_w, True),
    "router":    Role(lambda fan_in, s: (fan_in * s.width) ** -0.5, _one,   _per_w, _l_per_w, _per_w,      True),
    "head":      Role(lambda fan_in, s: (fan_in / s.width) ** -0.5, _per_w, _one,   _w,       _one,        True),
    "vector":    Role(lambda fan_in, s: 0.0,                        _one,   _one,   _l_w,     _one,        False),
    "adapter_a": Role(lambda fan_in, s: (3 * fan_in) ** -0.5,       _one,   _per_w, _l_per_w, _per_w,      True),
    "adapter_b": Role(lambda fan_in, s: 0.0,                        _one,   _one,   _l_w,     _one,        True),
}
# fmt: on


def scale_of(config: ModelConfig) -> Scale:
    """Return the scale of a model. d_model = 512 over base_d_model = 128 under muP: d_model 128, width 4."""
    base_width = (config.base_d_model if config.parameterization == "mup" else None) or config.d_model
    base_depth = config.base_num_layers or config.num_layers
    return Scale(
        d_model=base_width,
        num_layers=base_depth,
        width=config.d_model / base_width,
        depth=config.num_layers / base_depth,
    )


def initializer(config: ModelConfig, role: str, fan_in: int) -> nn.initializers.Initializer:
    """Return a normal initializer with the std of the role's row; zeros for a head with `zero_readout`."""
    if role == "head" and config.zero_readout:
        return constant(0.0)
    return nn.initializers.normal(TABLE[role].std(fan_in, scale_of(config)), jnp.float32)


def constant(value: float) -> nn.initializers.Initializer:
    """Return an initializer of a float32 constant, independent of JAX's default dtype."""
    return nn.initializers.constant(value, jnp.float32)


def output_multiplier(config: ModelConfig, role: str) -> float:
    """Return the factor on the product with a matrix of this role; the role of a tied token table is "head"."""
    return TABLE[role].output(scale_of(config))


def rate_multipliers(config: ModelConfig, params: Any, family: Family) -> Any:
    """Return the tree of learning-rate multipliers for an optimizer of this family."""

    def multiplier(key_path: tuple[Any, ...], _: Any) -> float:
        path = names_of(key_path)
        of_scale = getattr(TABLE[role_of(path)], family)
        return float(of_scale(_scale_at(config, path)))

    return jax.tree_util.tree_map_with_path(multiplier, params)


def _scale_at(config: ModelConfig, path: tuple[str, ...]) -> Scale:
    """Return the scale for a parameter: no depth outside the layers, no width for vectors that do not grow with it.

    The latter are vectors over the vocabulary and over the features of one attention head.
    """
    scale = scale_of(config)
    is_of_one_head = path[-2:-1] in (("query_norm",), ("key_norm",)) and config.latent is None
    if is_of_one_head or path[-2:] == ("head", "bias"):
        scale = scale._replace(width=1.0)
    return scale if "layers" in path else scale._replace(depth=1.0)


# The role of a parameter of the public tree, by the last name of its path or else by the last two.
_BY_NAME = dict.fromkeys(("scale", "bias", "sinks", "selection_bias"), "vector")
_BY_PAIR: dict[tuple[str, str], str] = {
    ("embedding", "tokens"): "embedding",
    ("embedding", "positions"): "position",
    ("embedding", "types"): "position",
    ("relative_bias", "table"): "position",
    **{(name, "weight"): "hidden" for name in ("query", "key", "value", "up", "gate", "pooler", "transform")},
    **{(name, "weight"): "hidden" for name in ("query_down", "query_up", "key_value_down", "key_value_up")},
    ("experts", "up"): "hidden",
    ("experts", "gate"): "hidden",
    ("experts", "down"): "residual",
    ("output", "weight"): "residual",
    ("down", "weight"): "residual",
    ("router", "weight"): "router",
    ("shared_gate", "weight"): "router",
    ("head", "weight"): "head",
    ("weight", "a"): "adapter_a",
    ("weight", "b"): "adapter_b",
    **{(name, "a"): "adapter_a" for name in ("up", "gate", "down")},  # of experts
    **{(name, "b"): "adapter_b" for name in ("up", "gate", "down")},
}


def role_of(path: tuple[str, ...]) -> str:
    """Return the role of the parameter at `path` in the public tree; "vector" for biases and norm scales."""
    role = _BY_NAME.get(path[-1]) or _BY_PAIR.get(path[-2:])  # type: ignore[arg-type]
    if role is None:
        raise KeyError(f"parameter {'/'.join(path)} has no role in model/parameterization.py")
    return role


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return JAX's key path as names."""
    return tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def decays(path: tuple[str, ...]) -> bool:
    """Return whether weight decay applies to the parameter at `path`."""
    return TABLE[role_of(path)].decay
