"""The kind of each layer, its index in the stacked parameters, and the repeating groups for a scan over layers."""

import dataclasses
import functools
from typing import NamedTuple

from model.config import ModelConfig
from model.parts import RopeScaling


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Properties that layers with the same name in `params["layers"]` share.

    name: "dense" or "experts", with "local_" before it under a sliding window. experts: a mixture of experts in place
    of the feed-forward. window: the number of tokens that a query sees, itself included; None: all. causal: no token
    sees a later one. cross: the layer also attends to an encoder.
    """

    name: str
    experts: bool
    window: int | None
    rope_base: float
    rope_scaling: RopeScaling | None
    causal: bool
    cross: bool


class Group(NamedTuple):
    """Consecutive layers from `first` on, whose kinds are the pattern `kinds`, `repeats` times."""

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int


@functools.lru_cache(maxsize=1024)
def layer_kinds(config: ModelConfig, encoder: bool = False) -> tuple[LayerKind, ...]:
    """Return the kind of every layer of the main stack, or of the encoder of an encoder-decoder."""
    kinds = []
    for index in range(config.num_encoder_layers if encoder else config.num_layers):
        reach = config.layer_pattern[index % len(config.layer_pattern)]
        local = config.sliding_window is not None and reach == "local" and not encoder
        experts = config.experts is not None and config.experts.in_layer(index)
        own_base = local and config.local_rope_base is not None
        kinds.append(
            LayerKind(
                name=("local_" if local else "") + ("experts" if experts else "dense"),
                experts=experts,
                window=config.sliding_window if local else None,
                rope_base=config.local_rope_base if own_base else config.rope_base,  # type: ignore[arg-type]
                rope_scaling=None if own_base else config.rope_scaling,
                causal=config.is_causal and not encoder,
                cross=config.stack == "encoder-decoder" and not encoder,
            )
        )
    return tuple(kinds)


def places(config: ModelConfig, encoder: bool = False) -> tuple[tuple[str, int], ...]:
    """Return (name of its kind, index in the stacked parameters of that kind) for every layer.

    Layers of the kinds (local, local, global, local) are at ("local", 0), ("local", 1), ("global", 0), ("local", 2).
    """
    return places_of(layer_kinds(config, encoder))


def places_of(kinds: tuple[LayerKind, ...]) -> tuple[tuple[str, int], ...]:
    """Return `places` for layers of these kinds."""
    names = [kind.name for kind in kinds]
    return tuple((name, names[:index].count(name)) for index, name in enumerate(names))


@functools.lru_cache(maxsize=1024)
def groups(kinds: tuple[LayerKind, ...]) -> tuple[Group, ...]:
    """Split the layers into few repeating groups, greedily: each is the pattern that covers most of the layers left.

    (local, local, global, local, local, global, local, local) is the pattern (local, local, global) twice from layer 0
    on, and (local) twice from layer 6 on.
    """
    found: list[Group] = []
    first = 0
    while first < len(kinds):
        rest = kinds[first:]
        best = Group(first, rest[:1], 1)
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == rest[:period]:
                repeats += 1
            if repeats > 1 and repeats * period > len(best.kinds) * best.repeats:
                best = Group(first, rest[:period], repeats)
        found.append(best)
        first += len(best.kinds) * best.repeats
    return tuple(found)
