"""Rotary positions in a config.json: the style of Transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""

import dataclasses
import math
from typing import Any

from model.config import ModelConfig
from model.convert.fields import FULL, SLIDING, Raw
from model.errors import InputError
from model.parts import RopeScaling

# Their key → our field, with the value that a missing key means.
_KEYS = {
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
_KEYS_OF = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": tuple(key for key in _KEYS if not key.endswith("_freq_factor")),
}


# Keys of which no kind's frequencies depend, with the only value that is known to change nothing; ...: any.
_ASIDE = {
    **dict.fromkeys(("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"), ...),
    "original_max_position_embeddings": ...,
    "factor": 1,
    "extrapolation_factor": 1,
    "attn_factor": 1,
}


def read_scaling(parameters: Raw, raw: Raw, kinds: tuple[str, ...]) -> RopeScaling | None:
    """The scaling that `parameters` describes. Raises InputError on a kind that is not among `kinds`."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", *kinds):
        known = " or ".join(("default", *kinds))
        raise InputError(f"rope type {kind!r} is not supported for this model_type; isoflop reads {known}")
    for key, value in parameters.items():
        aside = value is None or (key in _ASIDE and _ASIDE[key] in (..., value))
        if not aside and key not in _KEYS_OF.get(kind, ()):
            raise InputError(f"{key}={value!r} of the rotary positions is not supported for rope type {kind!r}")
    if kind == "default":
        return None
    for key in _KEYS_OF[kind]:
        value = parameters.get(key)
        if value is not None and (
            not isinstance(value, (int, float)) or isinstance(value, bool) != (key == "truncate")
        ):
            wanted = "true or false" if key == "truncate" else "a number"
            raise InputError(f"{key}={value!r} of the rotary positions must be {wanted}")
    values = {_KEYS[key][0]: parameters.get(key) for key in _KEYS_OF[kind]}
    values |= {ours: default for ours, default in _KEYS.values() if ours in values and values[ours] is None}
    if "original_max_seq_len" in values:
        values["original_max_seq_len"] = values["original_max_seq_len"] or raw["max_position_embeddings"]
    if kind == "yarn":
        _settle_yarn(values, raw)
    return RopeScaling(kind, **values)  # type: ignore[arg-type]


def _settle_yarn(values: dict[str, Any], raw: Raw) -> None:
    """What Transformers makes of missing numbers: mscale counts only together with mscale_all_dim."""
    if values["factor"] is None:
        values["factor"] = raw["max_position_embeddings"] / values["original_max_seq_len"]
    if not values["mscale"]:
        values["mscale"] = 0.0
        if values["mscale_all_dim"] and values["attention_factor"] is None:
            values["attention_factor"] = 0.1 * math.log(values["factor"]) + 1
    elif not values["mscale_all_dim"]:
        values["mscale"] = values["mscale_all_dim"] = 0.0


def write_scaling(scaling: RopeScaling | None) -> Raw:
    """The keys of that scaling, without those that say nothing."""
    if scaling is None:
        return {"rope_type": "default"}
    values = {key: getattr(scaling, _KEYS[key][0]) for key in _KEYS_OF[scaling.kind]}
    silent = {"attention_factor": None, "mscale": 0.0, "mscale_all_dim": 0.0, "truncate": True}
    return {"rope_type": scaling.kind} | {k: v for k, v in values.items() if k not in silent or v != silent[k]}


def _object(raw: Raw, key: str) -> Raw:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{key}={value!r} must be an object or null")
    return value or {}


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary base for all layers. `fraction`: the family may turn only the first part of a head."""

    theta: float = 10_000.0
    kinds: tuple[str, ...] = ("linear", "llama3", "yarn")
    fraction: bool = False
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

    def read(self, raw: Raw) -> dict[str, Any]:
        """`rope_base`, `rope_scaling` and `rope_fraction`."""
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
        """Both styles, so that older readers load the folder too."""
        scaling = write_scaling(config.rope_scaling)
        fraction = {"partial_rotary_factor": config.rope_fraction} if self.fraction else {}
        return {
            "rope_theta": config.rope_base,
            "rope_scaling": None if config.rope_scaling is None else scaling,
            "rope_parameters": {**scaling, "rope_theta": config.rope_base, **fraction},
            **fraction,
        }


@dataclasses.dataclass(frozen=True)
class RopePerReach:
    """Gemma 3: sliding-window layers have a base of their own, and only the others are scaled."""

    theta: float = 1_000_000.0
    local_theta: float = 10_000.0
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")

    def read(self, raw: Raw) -> dict[str, Any]:
        """`rope_base`, `rope_scaling` and `local_rope_base`."""
        nested = _object(raw, "rope_parameters")
        whole = {**_object(nested, FULL), **_object(raw, "rope_scaling")}
        local = _object(nested, SLIDING)
        if beside := [key for key in nested if key not in (FULL, SLIDING) and nested[key] is not None]:
            raise InputError(f"rope_parameters has {', '.join(beside)}; isoflop reads {FULL} and {SLIDING} in it")
        read_scaling(local, raw, ())  # raises: these layers are not scaled
        return {
            "rope_base": whole.get("rope_theta", raw.get("rope_theta", self.theta)),
            "rope_scaling": read_scaling(whole, raw, tuple(_KEYS_OF)),
            "local_rope_base": local.get("rope_theta", raw.get("rope_local_base_freq", self.local_theta)),
        }

    def write(self, config: ModelConfig) -> Raw:
        """Both styles."""
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
