"""Rotary positions in a config.json: Transformers 4 (rope_theta, rope_scaling) and Transformers 5 (rope_parameters)."""

import dataclasses
import math
from typing import Any

from model.config import ModelConfig
from model.convert.entries import Raw
from model.convert.sliding_window import FULL, SLIDING
from model.errors import InputError
from model.parts import RopeScaling

# Key → (field of RopeScaling, value if the key is missing).
_FIELDS: dict[str, tuple[str, Any]] = {
    "factor": ("factor", None),
    "original_max_position_embeddings": ("original_max_seq_len", None),
    "low_freq_factor": ("low_frequency_factor", 1.0),
    "high_freq_factor": ("high_frequency_factor", 4.0),
    "beta_fast": ("beta_fast", 32.0),
    "beta_slow": ("beta_slow", 1.0),
    "attention_factor": ("attention_factor", None),
    "mscale": ("mscale", 0.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
    "truncate": ("truncate", True),
}
_KEYS_OF_KIND = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": tuple(key for key in _FIELDS if not key.endswith("_freq_factor")),
}
# Keys that do not affect the frequencies, and keys that do not at this value.
_IGNORED = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", "original_max_position_embeddings")
_NEUTRAL = {"factor": 1, "extrapolation_factor": 1, "attn_factor": 1}


def read_scaling(parameters: Raw, raw: Raw, kinds: tuple[str, ...]) -> RopeScaling | None:
    """Return the scaling that `parameters` describe, None for rope type "default".

    raw: the config.json. Raises InputError for other kinds than `kinds`, for unknown keys and for wrong types.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", *kinds):
        known = " or ".join(("default", *kinds))
        raise InputError(f"rope type {kind!r} is not supported for this model_type; isoflop reads {known}")
    _check_keys(parameters, kind)
    if kind == "default":
        return None
    values: dict[str, Any] = {}
    for key in _KEYS_OF_KIND[kind]:
        field, default = _FIELDS[key]
        value = parameters.get(key)
        values[field] = default if value is None else value
    if "original_max_seq_len" in values:
        values["original_max_seq_len"] = values["original_max_seq_len"] or raw["max_position_embeddings"]
    if kind == "yarn":
        _complete_yarn(values, raw)
    return RopeScaling(kind, **values)


def _check_keys(parameters: Raw, kind: str) -> None:
    known = _KEYS_OF_KIND.get(kind, ())
    for key, value in parameters.items():
        neutral = value is None or key in _IGNORED or (key in _NEUTRAL and value == _NEUTRAL[key])
        if key not in known and not neutral:
            raise InputError(f"{key}={value!r} of the rotary positions is not supported for rope type {kind!r}")
    for key in known:
        value = parameters.get(key)
        if key == "truncate":
            right, wanted = isinstance(value, bool), "true or false"
        else:
            right, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
        if value is not None and not right:
            raise InputError(f"{key}={value!r} of the rotary positions must be {wanted}")


def _complete_yarn(values: dict[str, Any], raw: Raw) -> None:
    """Fill in missing numbers as Transformers does: mscale has an effect only together with mscale_all_dim."""
    if values["factor"] is None:
        values["factor"] = raw["max_position_embeddings"] / values["original_max_seq_len"]
    if not values["mscale"]:
        values["mscale"] = 0.0
        if values["mscale_all_dim"] and values["attention_factor"] is None:
            values["attention_factor"] = 0.1 * math.log(values["factor"]) + 1
    elif not values["mscale_all_dim"]:
        values["mscale"] = values["mscale_all_dim"] = 0.0


def write_scaling(scaling: RopeScaling | None) -> Raw:
    """Return the keys of a scaling, of yarn's optional ones only those that are not at their default."""
    if scaling is None:
        return {"rope_type": "default"}
    raw: Raw = {"rope_type": scaling.kind}
    for key in _KEYS_OF_KIND[scaling.kind]:
        field, default = _FIELDS[key]
        value = getattr(scaling, field)
        optional = key in ("attention_factor", "mscale", "mscale_all_dim", "truncate")
        if not optional or value != default:
            raw[key] = value
    return raw


def _object(raw: Raw, key: str) -> Raw:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{key}={value!r} must be an object or null")
    return value or {}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions with one base for all layers.

    theta: the base of files without rope_theta. kinds: supported scalings. fraction: the family supports
    partial_rotary_factor.
    """

    theta: float = 10_000.0
    kinds: tuple[str, ...] = ("linear", "llama3", "yarn")
    fraction: bool = False
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return `rope_base`, `rope_scaling` and `rope_fraction`."""
        parameters = _object(raw, "rope_scaling") or _object(raw, "rope_parameters")
        if any(isinstance(value, dict) for value in parameters.values()):
            raise InputError("rope_parameters that differ between layer types are not supported for this model_type")
        fraction = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
        if fraction != 1 and not self.fraction:
            raise InputError(f"partial_rotary_factor={fraction!r} is not supported for this model_type")
        return {
            "rope_base": parameters.get("rope_theta", raw.get("rope_theta", self.theta)),
            "rope_scaling": read_scaling(parameters, raw, self.kinds),
            "rope_fraction": fraction,
        }

    def write(self, config: ModelConfig) -> Raw:
        """Return the keys of both styles, so that older versions of Transformers load the folder too."""
        scaling = write_scaling(config.rope_scaling)
        fraction = {"partial_rotary_factor": config.rope_fraction} if self.fraction else {}
        return {
            "rope_theta": config.rope_base,
            "rope_scaling": None if config.rope_scaling is None else scaling,
            "rope_parameters": {**scaling, "rope_theta": config.rope_base, **fraction},
            **fraction,
        }


@dataclasses.dataclass(frozen=True)
class RopePerLayerType:
    """Rotary positions of Gemma 3: layers with a sliding window have their own base, and only the others are scaled."""

    theta: float = 1_000_000.0
    local_theta: float = 10_000.0
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return `rope_base`, `rope_scaling` and `local_rope_base`."""
        nested = _object(raw, "rope_parameters")
        full = {**_object(nested, FULL), **_object(raw, "rope_scaling")}
        local = _object(nested, SLIDING)
        if unknown := [key for key in nested if key not in (FULL, SLIDING) and nested[key] is not None]:
            raise InputError(f"rope_parameters has {', '.join(unknown)}; isoflop reads {FULL} and {SLIDING} in it")
        read_scaling(local, raw, ())  # raises if these layers are scaled
        return {
            "rope_base": full.get("rope_theta", raw.get("rope_theta", self.theta)),
            "rope_scaling": read_scaling(full, raw, tuple(_KEYS_OF_KIND)),
            "local_rope_base": local.get("rope_theta", raw.get("rope_local_base_freq", self.local_theta)),
        }

    def write(self, config: ModelConfig) -> Raw:
        """Return the keys of both styles."""
        scaling = write_scaling(config.rope_scaling)
        local = config.local_rope_base or config.rope_base
        return {
            "rope_theta": config.rope_base,
            "rope_local_base_freq": local,
            "rope_scaling": None if config.rope_scaling is None else scaling,
            "rope_parameters": {
                FULL: {**scaling, "rope_theta": config.rope_base},
                SLIDING: {"rope_type": "default", "rope_theta": local},
            },
        }
