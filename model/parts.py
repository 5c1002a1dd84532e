"""Parts of `ModelConfig` that only some architectures have, each a frozen dataclass."""

import dataclasses
from typing import Any, ClassVar, Literal, Self

from model.errors import InputError, check_number
from model.fields import check_names, check_types

ScalingKind = Literal["linear", "llama3", "yarn"]
Router = Literal["softmax", "softmax_of_chosen", "sigmoid"]
GroupScore = Literal["max", "top2"]
Dispatch = Literal["dropless", "capacity"]


class Part:
    """Base of the parts: validation, and conversion from and to plain values."""

    # Fields that must be above 0.
    POSITIVE: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output. Raises InputError for an unknown, missing or invalid field."""
        check_names(cls, values, complete=True)
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def __post_init__(self) -> None:
        check_types(self, self.POSITIVE, f"{type(self).__name__}.")


@dataclasses.dataclass(frozen=True)
class RopeScaling(Part):
    """Scaling of rotary frequencies for contexts longer than in training.

    linear: all frequencies are divided by `factor` (Chen et al. 2023). llama3: low frequencies are divided, high ones
    kept, with a smooth transition (Llama 3.1). yarn: the same by the number of turns within the original context (Peng
    et al. 2023), with cos and sin multiplied by `attention_factor` (None: 0.1 ln(factor) + 1). mscale and
    mscale_all_dim: DeepSeek's variant of that factor, m(mscale) = 0.1 · mscale · ln(factor) + 1: cos and sin are
    multiplied by m(mscale) / m(mscale_all_dim), the scores of latent attention by m(mscale_all_dim)²; 0: unused.
    truncate: round the ends of yarn's transition to whole features.
    """

    kind: ScalingKind
    factor: float
    original_max_seq_len: int = 0  # llama3, yarn: the context before stretching
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("RopeScaling.factor", self.factor, least=1)
        if self.kind != "linear" and self.original_max_seq_len < 1:
            raise InputError(f"RopeScaling of kind {self.kind!r} needs original_max_seq_len")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if self.kind == "llama3" and not low < high:
            raise InputError(f"RopeScaling.low_frequency_factor={low} must be less than high_frequency_factor={high}")
        for name in ("beta_fast", "beta_slow"):
            if self.kind == "yarn":
                check_number(f"RopeScaling.{name}", getattr(self, name), above=0)


@dataclasses.dataclass(frozen=True)
class Latent(Part):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values from one small vector per token.

    kv_rank: the size of that vector. rope_dim: the number of rotary key features, shared by all heads; the cache holds
    kv_rank + rope_dim features per token. nope_dim: the features of a head without position. v_dim: the features of a
    head's values. q_rank: the size of the compressed queries; None: queries are not compressed.
    """

    POSITIVE = ("kv_rank", "nope_dim", "rope_dim", "v_dim", "q_rank")

    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_dim % 2:
            raise InputError(f"Latent.rope_dim={self.rope_dim} must be even: rotary positions rotate pairs of features")


@dataclasses.dataclass(frozen=True)
class Experts(Part):
    """A mixture of experts in place of the feed-forward (Shazeer et al. 2017).

    count: the number of routed experts. top_k: the number of experts per token. d_ff: the width of each expert.
    shared_d_ff: the width of an expert that every token uses (DeepSeekMoE); 0: none. shared_gate: the shared expert's
    output is multiplied by a sigmoid gate (Qwen2-MoE).
    router: "softmax" over all experts before the choice (Switch, Qwen, DeepSeek-V2), "softmax_of_chosen" after it
    (Mixtral; the same as "softmax" with normalised gates), or "sigmoid" (DeepSeek-V3). selection_bias: a vector
    added to the scores for the choice only. normalise: the gates of a token sum to 1 before they are multiplied by
    `scale`. groups: the experts are split into this many groups, and a token chooses within the best top_groups, scored
    by their best expert ("max", DeepSeek-V2) or the sum of their two best ("top2", DeepSeek-V3).
    first_layer, every, dense_layers: layer i has experts where i ≥ first_layer, (i − first_layer) is a multiple of
    `every` and i is not in dense_layers. dispatch: "dropless", or "capacity": an expert takes at most
    capacity_factor · tokens · top_k / count choices of a batch and drops the rest, in passes over whole rows only;
    evaluation and decoding are dropless.
    """

    POSITIVE = ("count", "top_k", "d_ff", "groups", "top_groups", "every", "capacity_factor")

    count: int
    top_k: int
    d_ff: int
    shared_d_ff: int = 0
    shared_gate: bool = False
    router: Router = "softmax"
    selection_bias: bool = False
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    first_layer: int = 0
    every: int = 1
    dense_layers: tuple[int, ...] = ()
    dispatch: Dispatch = "dropless"
    capacity_factor: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.dense_layers
        if not isinstance(layers, (list, tuple)) or not all(type(layer) is int for layer in layers):
            raise InputError(f"Experts.dense_layers={layers!r} must be a list of layer numbers, counted from 0")
        object.__setattr__(self, "dense_layers", tuple(layers))
        if self.count % self.groups:
            raise InputError(f"Experts.groups={self.groups} does not divide count={self.count}")
        if self.top_groups > self.groups:
            raise InputError(f"Experts.top_groups={self.top_groups} exceeds groups={self.groups}")
        if self.top_k > self.count // self.groups * self.top_groups:
            raise InputError(
                f"Experts.top_k={self.top_k} exceeds the {self.count // self.groups * self.top_groups} experts that "
                f"a token may choose from"
            )
        if self.shared_gate and not self.shared_d_ff:
            raise InputError("Experts.shared_gate=true needs shared_d_ff, the width of the shared expert")

    def in_layer(self, index: int) -> bool:
        """Return whether layer `index` has experts; the others are dense."""
        after = index - self.first_layer
        return after >= 0 and after % self.every == 0 and index not in self.dense_layers
