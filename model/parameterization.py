"""How every parameter starts and how fast it learns: one row per role, for every width, depth and optimizer.

Standard parameterization: matrices keep the scale of what they are given (std 1/√fan_in, LeCun 1998), the matrices
that write to the residual stream are shrunk by √(2·layers) so that the stream's variance does not grow with depth
(GPT-2, section 2.3), and every parameter learns at the one rate. The token table starts at 1/√d_model: as a tied head
it then makes logits of unit variance. At GPT-2's 0.02 a narrow model first has to grow its table (docs/LOG.md).

muP (Yang et al. 2022, "Tensor Programs V", table 8): w = d_model / base_d_model. Everything whose fan-in is finite
(tables, vectors) starts and learns as at the base width; hidden matrices learn 1/w as fast under Adam; the readout
is multiplied by 1/w. What is tuned at the base width then holds at every width. Widen by more heads of one size: then
1/√head_dim is already muP's scale of scores. `scale_embedding` and `scale_logits` take their √ of base_d_model. A
router is a readout too, of few outputs from many inputs: it starts at 1/√w of a hidden matrix's scale. The logits that
a random readout starts with shrink as 1/√w; `zero_readout` starts all widths alike, which shows the rest more clearly
(the coordinate check does so), but trains worse (docs/LOG.md).

Depth (Dey et al. 2025, "CompleteP", α = 1): l = num_layers / base_num_layers. Every residual branch is multiplied by
1/l, and the shrinking by √(2·layers) stops at the base depth; Adam's rates stay, SGD's grow by l inside the layers.

Muon's updates have singular values near 0.2 · √max(fan_in, fan_out), so that their entries are of Adam's size (Liu et
al. 2025); what a matrix changes in its output keeps its size where they do not grow with width (Yang et al. 2023, "A
Spectral Condition for Feature Learning"): 1/√w.

The two factors of a low-rank adapter (`model.adapters`): a reads from many inputs into few and b the other way round,
so that a learns as a readout's hidden side does, 1/w as fast under Adam, and b as a table does (Hayou et al. 2024,
"LoRA+", find the same ratio).

Weight decay is decoupled from all of this: each step takes learning_rate · weight_decay · w off every matrix, without
its role's multiplier, so that the time over which a matrix forgets is the same at every width.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.config import ModelConfig

Family = Literal["adam", "sgd", "muon"]


class Scale(NamedTuple):
    """What a row may depend on: d_model and layers where the scale of the start is taken, and the two ratios."""

    d_model: int  # under muP the base width
    num_layers: int  # under depth scaling the base depth
    width: float  # w: over the base width; 1 in the standard parameterization
    depth: float  # l: over the base depth; 1 without depth scaling


class Role(NamedTuple):
    """One row. std: at the start, of (fan_in, scale); output: multiplies what it makes; the rest: learning rates.

    Models are exported without multipliers: `model.convert.fold` puts them into the weights.
    """

    std: Callable[[int, Scale], float]
    output: Callable[[Scale], float]
    adam: Callable[[Scale], float]
    sgd: Callable[[Scale], float]
    muon: Callable[[Scale], float]  # all but hidden and residual matrices are left to Adam
    decay: bool


_one = lambda s: 1.0
_w = lambda s: s.width
_per_w = lambda s: 1 / s.width
_per_root_w = lambda s: s.width**-0.5
_l = lambda s: s.depth
_per_l = lambda s: 1 / s.depth
_l_w = lambda s: s.depth * s.width
_l_per_w = lambda s: s.depth / s.width
_by_fan_in = lambda fan_in, s: fan_in**-0.5
_by_fan_in_and_depth = lambda fan_in, s: (2 * fan_in * s.num_layers) ** -0.5
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
    """The numbers that the rows read."""
    base_width = config.base_d_model if config.parameterization == "mup" else None
    return Scale(
        d_model=base_width or config.d_model,
        num_layers=config.base_num_layers or config.num_layers,
        width=config.d_model / (base_width or config.d_model),
        depth=config.num_layers / (config.base_num_layers or config.num_layers),
    )


def initializer(config: ModelConfig, role: str, fan_in: int) -> nn.initializers.Initializer:
    """Normal with the standard deviation of the role's row; a readout at zero if the config says so."""
    if role == "head" and config.zero_readout:
        return constant(0.0)
    return nn.initializers.normal(TABLE[role].std(fan_in, scale_of(config)), jnp.float32)


def constant(value: float) -> nn.initializers.Initializer:
    """Return an initializer of a float32 parameter that starts at this value, whatever JAX's default dtype is."""
    return nn.initializers.constant(value, jnp.float32)


def output_multiplier(config: ModelConfig, role: str) -> float:
    """What the product with a matrix of this role is multiplied by; a tied table that makes logits is a "head"."""
    return TABLE[role].output(scale_of(config))


def rate_multipliers(config: ModelConfig, params: Any, family: Family) -> Any:
    """The tree of learning-rate multipliers for an optimizer of this family."""
    rate = lambda path: getattr(TABLE[role_of(path)], family)(_scale_at(config, path))
    return jax.tree_util.tree_map_with_path(lambda path, _: float(rate(names_of(path))), params)


def _scale_at(config: ModelConfig, path: tuple[str, ...]) -> Scale:
    """Depth changes nothing outside the layers, nor width a vector over the vocabulary or the features of a head."""
    scale = scale_of(config)
    of_a_head = path[-2:-1] in (("query_norm",), ("key_norm",)) and config.latent is None
    if of_a_head or path[-2:] == ("head", "bias"):
        scale = scale._replace(width=1.0)
    return scale if "layers" in path else scale._replace(depth=1.0)


# Which row a parameter of the public tree belongs to, by its last name, or else by the last two.
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
    """The role of the parameter at `path` in the public tree; "vector" for biases and norm scales."""
    role = _BY_NAME.get(path[-1]) or _BY_PAIR.get(path[-2:])  # type: ignore[arg-type]
    if role is None:
        raise KeyError(f"parameter {'/'.join(path)} has no role in model/parameterization.py")
    return role


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """JAX's key path as names."""
    return tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def decays(path: tuple[str, ...]) -> bool:
    """Whether weight decay applies to the parameter at `path`."""
    return TABLE[role_of(path)].decay
