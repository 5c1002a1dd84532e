"""A canonical form of configurations, equal for all that compute the same function."""

import dataclasses
from collections.abc import Callable

from model.config import ModelConfig
from model.convert.sliding_window import layer_types, shortest_pattern

# Fields that have an effect only under a condition; without it they are set to their defaults.
_CONDITIONS: dict[tuple[str, ...], Callable[[ModelConfig], bool]] = {
    ("rope_base", "rope_fraction", "rope_interleaved", "rope_scaling"): lambda c: c.position == "rotary",
    ("local_rope_base",): lambda c: c.position == "rotary" and c.sliding_window is not None,
    ("relative_buckets", "relative_max_distance"): lambda c: c.position == "relative",
    ("num_labels",): lambda c: c.head == "classifier",
    ("tie_embeddings",): lambda c: c.head in ("language-model", "masked-language-model"),
    ("head_bias", "final_softcap", "scale_logits"): lambda c: c.head != "none",
    ("num_encoder_layers", "decoder_start_token_id"): lambda c: c.stack == "encoder-decoder",
    ("norm_bias",): lambda c: c.norm == "layernorm",
    ("base_d_model",): lambda c: c.parameterization == "mup",
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
# Precision and initialisation, which are no part of the function.
_IGNORED = ("compute_dtype", "zero_readout")


def canonical(config: ModelConfig) -> ModelConfig:
    """Return a config of the same function, with fields without effect at their defaults and one form of the others."""
    changes = {name: _DEFAULTS[name] for name in _IGNORED}
    for names, condition in _CONDITIONS.items():
        if not condition(config):
            changes |= {name: _DEFAULTS[name] for name in names}
    changes["layer_pattern"] = shortest_pattern(layer_types(config)) if config.sliding_window else ("local",)
    if config.attention_scale == config.head_dim**-0.5:
        changes["attention_scale"] = None
    if config.local_rope_base == config.rope_base and config.rope_scaling is None:
        changes["local_rope_base"] = None
    if config.experts is not None:
        changes |= _canonical_experts(config)
    return config.replace(**changes)


def _canonical_experts(config: ModelConfig) -> dict:
    experts = config.experts
    assert experts is not None
    dense = tuple(index for index in range(config.num_layers) if not experts.in_layer(index))
    changes = {"first_layer": 0, "every": 1, "dense_layers": dense, "dispatch": "dropless", "capacity_factor": 1.25}
    if experts.router == "softmax_of_chosen":
        changes |= {"router": "softmax", "normalise": True}
    if experts.groups == experts.top_groups:
        changes |= {"groups": 1, "top_groups": 1, "group_score": "max"}
    if not experts.shared_d_ff:
        changes["shared_gate"] = False
    fields = {"experts": experts.replace(**changes)}
    return fields if dense else {**fields, "d_ff": experts.d_ff}


def differences(first: ModelConfig, second: ModelConfig) -> list[str]:
    """Return the fields in which two configs compute different functions, as name=value of the first."""
    a, b = canonical(first).to_dict(), canonical(second).to_dict()
    return [f"{name}={a[name]!r}" for name in a if a[name] != b[name]]
