"""The architectural hyperparameters of a model: frozen, hashable, validated on construction."""

import dataclasses
from typing import Any, Literal, get_args

from model.dtypes import FLOATS, dtype_name
from model.errors import InputError, UnknownNameError, check_number
from model.execution import moved, refuse_moved
from model.fields import check_names, check_types
from model.parts import Experts, Latent, Part, RopeScaling

Stack = Literal["decoder", "encoder", "encoder-decoder"]
Position = Literal["learned", "sinusoidal", "rotary", "alibi", "relative", "none"]
Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post", "sandwich"]
Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "silu"]
Head = Literal["language-model", "masked-language-model", "classifier", "scalar", "none"]
Reach = Literal["local", "global"]
Parameterization = Literal["standard", "mup"]
DType = Literal["float32", "bfloat16"]

_BIASES = ("norm_bias", "attention_bias", "attention_output_bias")
_DERIVED = ("num_kv_heads", "head_dim", "d_ff", "num_encoder_layers", "final_norm", *_BIASES)
_PARTS: dict[str, type[Part]] = {"rope_scaling": RopeScaling, "latent": Latent, "experts": Experts}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer: decoder-only, encoder-only or encoder-decoder.

    Fields left at None are derived: `num_kv_heads` = `num_heads`, `head_dim` = `d_model / num_heads`,
    `d_ff` = 4 `d_model` (plain) or 8/3 `d_model` rounded up to a multiple of 8 (gated), `num_encoder_layers` =
    `num_layers`, `final_norm` = true unless norms are "post", `norm_bias`, `attention_bias` and `attention_output_bias`
    = `use_bias`. `replace` derives them again; a field that was given stays.
    """

    # shape
    vocab_size: int
    d_model: int
    num_layers: int  # in an encoder-decoder: of the decoder
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # fewer than num_heads: GQA; 1: MQA
    head_dim: int = None  # type: ignore[assignment]
    d_ff: int = None  # type: ignore[assignment]
    max_seq_len: int = 1024
    stack: Stack = "decoder"
    num_encoder_layers: int = None  # type: ignore[assignment]
    # positions
    position: Position = "rotary"
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0  # the share of a head's features that are rotated, the first ones
    rope_interleaved: bool = False  # pairs are (2i, 2i+1) instead of (i, i + half)
    rope_scaling: RopeScaling | None = None
    local_rope_base: float | None = None  # given: the unscaled base of sliding-window layers
    relative_buckets: int = 32
    relative_max_distance: int = 128
    # attention
    latent: Latent | None = None
    qk_norm: bool = False  # RMSNorm of every head's query and key
    attention_scale: float | None = None  # None: 1/√head_dim
    attention_softcap: float | None = None  # scores become cap · tanh(scores / cap)
    attention_sinks: bool = False  # a learned logit per head that takes weight and contributes no value
    sliding_window: int | None = None  # a local layer sees this many tokens, itself included
    layer_pattern: tuple[Reach, ...] = ("local",)  # repeated over the layers; used with sliding_window
    # normalisation
    norm: Norm = "rmsnorm"
    norm_epsilon: float = 1e-5
    norm_placement: NormPlacement = "pre"
    norm_offset: bool = False  # the scale is stored as w and applied as 1 + w
    final_norm: bool = None  # type: ignore[assignment]
    # feed-forward
    activation: Activation = "silu"
    gated: bool = True
    experts: Experts | None = None
    # biases
    use_bias: bool = False  # of the feed-forward; the default of the three below
    norm_bias: bool = None  # type: ignore[assignment]  # of LayerNorm
    attention_bias: bool = None  # type: ignore[assignment]  # of queries, keys and values
    attention_output_bias: bool = None  # type: ignore[assignment]
    # embedding and head
    num_token_types: int = 0
    embedding_norm: bool = False
    scale_embedding: bool = False  # by √d_model
    tie_embeddings: bool = True
    head: Head = "language-model"
    head_bias: bool = False
    zero_readout: bool = False  # an untied head starts at zero
    scale_logits: bool = False  # by 1/√d_model, as a tied T5 does
    final_softcap: float | None = None
    pooler: bool = False  # a dense layer with tanh over the first token, as BERT has
    num_labels: int = 2  # of a classifier
    # parameterization: see model/parameterization.py
    parameterization: Parameterization = "standard"
    base_d_model: int | None = None  # "mup": the width at which it equals "standard"
    base_num_layers: int | None = None  # given: residual branches are scaled by depth, by 1 at this depth
    compute_dtype: DType = "float32"  # of products and activations; norms, softmax, logits and losses are float32
    # tokens
    eos_token_ids: tuple[int, ...] = ()
    decoder_start_token_id: int = 0  # the first token of an encoder-decoder's decoder
    derived: tuple[str, ...] = dataclasses.field(default=(), init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("eos_token_ids", "layer_pattern"):
            value = getattr(self, name)
            self._set(name, tuple(value) if isinstance(value, (list, tuple)) else (value,))  # hashable
        for name, part in _PARTS.items():
            if isinstance(getattr(self, name), dict):
                self._set(name, part.from_dict(getattr(self, name)))
        self._set("compute_dtype", dtype_name(self.compute_dtype, FLOATS, "compute_dtype"))
        check_types(self, _POSITIVE)
        self._check_layer_pattern()
        self._derive()
        self._check_consistency()

    def replace(self, **changes: Any) -> "ModelConfig":
        """Return a copy with some fields changed and derived fields derived again."""
        for name in MOVED:
            if name in changes:
                raise InputError(moved(type(self), name))
        check_names(type(self), changes, complete=False)
        fresh = {name: None for name in self.derived if name not in changes}
        return dataclasses.replace(self, **{**fresh, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which `from_dict` reads back to an equal config."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {name: value.to_dict() if isinstance(value, Part) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read `to_dict`'s output. Raises InputError for an unknown or missing field.

        Fields in MOVED, which earlier versions wrote, are ignored.
        """
        values = {name: value for name, value in values.items() if name not in MOVED}
        check_names(cls, values, complete=True)
        config = cls(**values)
        for name in _DERIVED:  # a field with the value that it would be derived to is a derived one again
            try:
                derived = cls(**{**values, **dict.fromkeys((*config.derived, name))})
            except InputError:  # no value can be derived from the other fields
                continue
            if derived == config:
                config = derived
        return config

    @property
    def is_causal(self) -> bool:
        """True if tokens of the main stack see only earlier ones: for all stacks but "encoder"."""
        return self.stack != "encoder"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _derive(self) -> None:
        self._set("derived", tuple(n for n in _DERIVED if getattr(self, n) is None))
        if self.num_kv_heads is None:
            self._set("num_kv_heads", self.num_heads)
        if self.head_dim is None:
            self._set("head_dim", self._derived_head_dim())
        if self.d_ff is None:
            gated_width = -(-8 * self.d_model // 3 // 8) * 8  # d_model = 512: 1365.33, rounded up to 1368
            self._set("d_ff", gated_width if self.gated else 4 * self.d_model)
        if self.num_encoder_layers is None:
            self._set("num_encoder_layers", self.num_layers)
        if self.final_norm is None:
            self._set("final_norm", self.norm_placement != "post")
        for name in _BIASES:
            if getattr(self, name) is None:
                self._set(name, self.use_bias)

    def _derived_head_dim(self) -> int:
        if self.latent is not None:
            return self.latent.nope_dim + self.latent.rope_dim
        if self.d_model % self.num_heads:
            divisors = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = sorted(sorted(divisors, key=lambda h: abs(h - self.num_heads))[:2])
            raise InputError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                f"try {' or '.join(map(str, near))}, or give head_dim"
            )
        return self.d_model // self.num_heads

    def _check_layer_pattern(self) -> None:
        if not self.layer_pattern:
            raise InputError("layer_pattern is empty; give 'local' and 'global' in the order of the layers")
        for reach in self.layer_pattern:
            if reach not in get_args(Reach):
                raise UnknownNameError("layer_pattern entry", str(reach), get_args(Reach))

    def _check_consistency(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                "every key/value head serves the same number of query heads"
            )
        check_number("rope_fraction", self.rope_fraction, most=1, hint="1 is all of a head's features")
        if self.position == "rotary" and self.latent is None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise InputError(
                f"head_dim={self.head_dim} times rope_fraction={self.rope_fraction:g} must be even for "
                "position='rotary', which rotates pairs of features"
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise InputError(f"d_model={self.d_model} must be even for position='sinusoidal', which needs pairs")
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.sliding_window is not None and not self.is_causal:
            raise InputError("sliding_window needs a decoder: an encoder attends in both directions")
        if self.position == "relative":
            fewest = 2 if self.stack == "decoder" else 4
            if self.relative_buckets < fewest:
                raise InputError(
                    f"relative_buckets={self.relative_buckets} must be at least {fewest} with stack={self.stack!r}"
                )
            if self.relative_max_distance <= self.relative_buckets // 2:
                raise InputError(
                    f"relative_max_distance={self.relative_max_distance} must exceed half of "
                    f"relative_buckets={self.relative_buckets}"
                )
        if self.parameterization == "mup" and self.base_d_model is None:
            raise InputError("parameterization='mup' needs base_d_model, the width at which it equals 'standard'")
        if self.pooler and self.stack != "encoder":
            raise InputError("pooler=true needs stack='encoder': it reads the first token, which must see all others")
        if self.head == "masked-language-model" and self.stack != "encoder":
            raise InputError("head='masked-language-model' needs stack='encoder'")
        if self.experts is not None and self.stack == "encoder-decoder":
            raise InputError("experts are not supported in an encoder-decoder")
        for token in (*self.eos_token_ids, self.decoder_start_token_id):
            whole = isinstance(token, int) and not isinstance(token, bool)
            if not (whole and 0 <= token < self.vocab_size):
                name = "eos_token_ids" if token in self.eos_token_ids else "decoder_start_token_id"
                raise InputError(
                    f"{name}: {token!r} is not an id of the vocabulary of {self.vocab_size}; set {name} with vocab_size"
                )

    def _check_latent(self, latent: Latent) -> None:
        if self.head_dim != latent.nope_dim + latent.rope_dim:
            raise InputError(
                f"head_dim={self.head_dim} must be nope_dim + rope_dim = {latent.nope_dim + latent.rope_dim} of latent "
                "attention; leave it out"
            )
        if self.num_kv_heads != self.num_heads:
            raise InputError("latent attention has a key for every head: leave num_kv_heads out")
        if self.position != "rotary" or self.rope_fraction != 1 or self.stack == "encoder-decoder":
            raise InputError("latent attention needs position='rotary', rope_fraction=1, and one stack")
        if self.qk_norm or self.attention_sinks:
            raise InputError(f"latent attention has no {'qk_norm' if self.qk_norm else 'attention_sinks'}")

    @property
    def rotary_dim(self) -> int:
        """The number of a head's features that are rotated."""
        return self.latent.rope_dim if self.latent is not None else int(self.head_dim * self.rope_fraction)


MOVED = ("scan_layers", "remat", "attention_kernel")
"""Fields that moved to `model.execution.Execution`."""
refuse_moved(ModelConfig, *MOVED)
_FIELDS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.init)
_POSITIVE = set(_FIELDS) - {"num_token_types", "decoder_start_token_id"}
