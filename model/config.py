"""Every architectural hyperparameter: frozen, hashable, validated when made."""

import dataclasses
from typing import Any, Literal, get_args

from model.errors import InputError, UnknownNameError

Position = Literal["learned", "sinusoidal", "rotary", "none"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
DType = Literal["float32", "bfloat16"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "position": get_args(Position),
    "norm": get_args(Norm),
    "activation": get_args(Activation),
    "compute_dtype": get_args(DType),
}
_COUNTS = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "max_seq_len",
)
_DERIVED = ("num_kv_heads", "head_dim", "d_ff")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with pre-norm blocks.

    Fields left at None are derived: `num_kv_heads` = `num_heads`, `head_dim` = `d_model / num_heads`,
    `d_ff` = 4 `d_model` (plain) or 8/3 `d_model` rounded up to a multiple of 8 (gated). A derived
    field follows its source through `replace`; one that was given stays.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # fewer than num_heads: GQA; 1: MQA
    head_dim: int = None  # type: ignore[assignment]
    d_ff: int = None  # type: ignore[assignment]
    max_seq_len: int = 1024
    position: Position = "rotary"
    rope_base: float = 10_000.0
    norm: Norm = "rmsnorm"
    norm_epsilon: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    use_bias: bool = False
    tie_embeddings: bool = True
    scan_layers: bool = True
    compute_dtype: DType = "float32"
    eos_token_ids: tuple[int, ...] = ()
    derived: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))  # a list would not hash
        self._check_types()
        self._derive()
        self._check_consistency()

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed; derived fields are derived anew."""
        for name in changes:
            if name not in _FIELDS:
                raise UnknownNameError("ModelConfig field", name, _FIELDS)
        fresh = {name: None for name in self.derived if name not in changes}
        return dataclasses.replace(self, **{**fresh, **changes, "derived": ()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back to an equal config."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read `to_dict`'s output. Raises InputError on an unknown or missing field."""
        for name in values:
            if name not in _FIELDS:
                raise UnknownNameError("ModelConfig field", name, _FIELDS)
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in missing if name not in values]
        if missing:
            raise InputError(f"the model config lacks {', '.join(missing)}")
        config = cls(**values)
        for name in _DERIVED:  # a field that is as it would be derived follows its source again
            free = cls(**{**values, **dict.fromkeys((*config.derived, name))})
            config = free if free == config else config
        return config

    def _derive(self) -> None:
        set_field = lambda name, value: object.__setattr__(self, name, value)
        set_field("derived", tuple(n for n in _DERIVED if getattr(self, n) is None))
        if self.num_kv_heads is None:
            set_field("num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                divisors = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
                near = sorted(sorted(divisors, key=lambda h: abs(h - self.num_heads))[:2])
                raise InputError(
                    f"num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                    f"try {' or '.join(map(str, near))}, or give head_dim"
                )
            set_field("head_dim", self.d_model // self.num_heads)
        if self.d_ff is None:
            gated_width = -(-8 * self.d_model // 3 // 8) * 8
            set_field("d_ff", gated_width if self.gated else 4 * self.d_model)

    def _check_types(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name in _DERIVED:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}={value!r} must be a whole number of at least 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UnknownNameError(name, str(getattr(self, name)), choices)
        for name in ("norm_epsilon", "rope_base"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)!r} must be positive")

    def _check_consistency(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.position == "rotary" and self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim} must be even for position='rotary', which turns pairs")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise InputError(f"d_model={self.d_model} must be even for position='sinusoidal', which fills pairs")
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(f"eos_token_ids has {token}, outside the vocabulary of {self.vocab_size}")


_FIELDS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name != "derived")
