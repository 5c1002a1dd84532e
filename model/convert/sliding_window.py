"""Sliding windows in a config.json: the window, and the layers that have it (layer_types)."""

import dataclasses
from collections.abc import Callable
from typing import Any

from model.config import ModelConfig
from model.convert.entries import Raw
from model.errors import InputError

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(config: ModelConfig) -> list[str]:
    """Return SLIDING or FULL for each layer of the decoder."""
    if config.sliding_window is None:
        return [FULL] * config.num_layers
    pattern = config.layer_pattern
    return [SLIDING if pattern[index % len(pattern)] == "local" else FULL for index in range(config.num_layers)]


def shortest_pattern(types: list[str]) -> tuple[str, ...]:
    """Return the shortest `layer_pattern` that repeats to the given types.

    Five layers S F S F S, with S for SLIDING and F for FULL, give ("local", "global").
    """

    def repeats(period: int) -> bool:
        return all(types[index] == types[index % period] for index in range(len(types)))

    period = next(period for period in range(1, len(types) + 1) if repeats(period))
    return tuple("local" if kind == SLIDING else "global" for kind in types[:period])


def _all_sliding(raw: Raw, layers: int) -> list[str]:
    return [SLIDING] * layers


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """The sliding window and the layers that have it.

    default: the window of files without the key. types: (config.json, layers) → layer types of files without
    layer_types. listed: the family writes layer_types and may mix both kinds. switched: the family has a window only if
    use_sliding_window is true.
    """

    default: int | None
    types: Callable[[Raw, int], list[str]] = _all_sliding
    listed: bool = False
    switched: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The window's keys; use_sliding_window and max_window_layers only for families with the switch."""
        switch = ("use_sliding_window", "max_window_layers") if self.switched else ()
        return ("sliding_window", "layer_types", *switch)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return `sliding_window` and `layer_pattern`."""
        layers, window = raw["num_hidden_layers"], raw.get("sliding_window", self.default)
        switch = raw.get("use_sliding_window")
        if switch is not None and not isinstance(switch, bool):
            raise InputError(f"use_sliding_window={switch!r} must be true or false")
        if self.switched and not switch:
            window = None
        types = raw.get("layer_types") or self.types(raw, layers)
        if len(types) != layers or set(types) - {SLIDING, FULL}:
            raise InputError(
                f"layer_types={types!r} is not supported; isoflop reads {SLIDING} or {FULL} for each layer"
            )
        if window is None or SLIDING not in types:
            return {"sliding_window": None}
        if not self.listed and FULL in types:
            raise InputError("layer_types with both kinds of attention is not supported for this model_type")
        return {"sliding_window": window, "layer_pattern": shortest_pattern(types)}

    def write(self, config: ModelConfig) -> Raw:
        """Return the window, for families that list them also the layer types."""
        raw: Raw = {"sliding_window": config.sliding_window}
        if self.switched:
            raw["use_sliding_window"] = config.sliding_window is not None
        elif raw["sliding_window"] is None and self.listed:
            raw["sliding_window"] = self.default  # Transformers needs a window even if no layer has it
        if self.listed:
            types = layer_types(config)
            raw["layer_types"] = types
            raw["max_window_layers"] = types.index(SLIDING) if SLIDING in types else len(types)
        return raw
