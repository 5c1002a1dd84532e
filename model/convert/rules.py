"""Rules from the tensor names of other libraries to the leaves of our parameters, and short forms to write them."""

import dataclasses
from collections.abc import Callable

from model.config import ModelConfig


def _any_model(config: ModelConfig) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One tensor name of another library and the leaves that it holds.

    leaves: paths of our leaves; several if the tensor holds them one after another along its output axis. tensor: the
    name in the file. In both, {i} is the layer and {e} the expert. The rule applies to models that have its leaves and
    for which `when` is true. transposed: stored as [out, in], like torch's Linear. outside: not part of the base model,
    so that the name has no prefix. optional: read only if the file has the name, instead of the other rules for its
    leaves, and never written. fallback: name to read if `tensor` is missing.
    """

    leaves: tuple[str, ...]
    tensor: str
    transposed: bool = False
    outside: bool = False
    optional: bool = False
    fallback: str | None = None
    when: Callable[[ModelConfig], bool] = _any_model

    def replace(self, **changes) -> "TensorRule":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def table(leaf: str, tensor: str, transposed: bool = False) -> tuple[TensorRule, ...]:
    """Return the rule of a single array."""
    return (TensorRule((leaf,), tensor, transposed),)


def norm(leaf: str, tensor: str) -> tuple[TensorRule, ...]:
    """Return the rules of a norm's scale and bias."""
    return TensorRule((f"{leaf}/scale",), f"{tensor}.weight"), TensorRule((f"{leaf}/bias",), f"{tensor}.bias")


def linear(leaves: str | tuple[str, ...], tensor: str, transposed: bool = True) -> tuple[TensorRule, ...]:
    """Return the rules of a projection, or of several fused ones, stored as [out, in]."""
    leaves = (leaves,) if isinstance(leaves, str) else leaves
    return (
        TensorRule(tuple(f"{leaf}/weight" for leaf in leaves), f"{tensor}.weight", transposed),
        TensorRule(tuple(f"{leaf}/bias" for leaf in leaves), f"{tensor}.bias"),
    )


def conv(leaves: str | tuple[str, ...], tensor: str) -> tuple[TensorRule, ...]:
    """Return the rules of a projection stored as [in, out], like OpenAI's Conv1D."""
    return linear(leaves, tensor, transposed=False)


def experts(tensor: str, up: str, gate: str, down: str) -> tuple[TensorRule, ...]:
    """Return the rules of experts with one tensor per expert and projection."""
    return tuple(
        TensorRule((f"feed_forward/experts/{leaf}",), f"{tensor}.{name}.weight", transposed=True)
        for leaf, name in (("up", up), ("gate", gate), ("down", down))
    )


def fused_experts(tensor: str) -> tuple[TensorRule, ...]:
    """Return the rules of Transformers 5's layout: all experts in one tensor, gate and up fused."""
    pair = ("feed_forward/experts/gate", "feed_forward/experts/up")
    return (
        TensorRule(pair, f"{tensor}.gate_up_proj", transposed=True, optional=True),
        TensorRule(("feed_forward/experts/down",), f"{tensor}.down_proj", transposed=True, optional=True),
    )


def within(leaf_prefix: str, tensor_prefix: str, *groups: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """Return the rules with a prefix before their leaves and names, such as that of a layer."""
    return tuple(
        rule.replace(
            leaves=tuple(f"{leaf_prefix}{leaf}" for leaf in rule.leaves), tensor=f"{tensor_prefix}{rule.tensor}"
        )
        for group in groups
        for rule in group
    )


def of_head(kind: str, *groups: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """Return the rules for models with a head of this kind; heads are outside the base model."""

    def has_head(config: ModelConfig) -> bool:
        return config.head == kind

    return tuple(rule.replace(outside=True, when=has_head) for group in groups for rule in group)


DECODER_HEADS = (
    *of_head("language-model", table("head/weight", "lm_head.weight", transposed=True)),
    *of_head("classifier", table("head/weight", "score.weight", transposed=True)),
)
