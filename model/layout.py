"""Which layer is of which kind, where its parameters stand, and how the layers are run in repeating groups."""

import dataclasses
import functools
from typing import NamedTuple

from model.config import ModelConfig
from model.parts import RopeScaling


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What layers with the same name in `params["layers"]` share.

    name: "dense" or "experts", with "local_" before it under a sliding window. window: tokens that a query sees,
    itself included; None: all. causal: no token sees a later one. cross: it also attends to an encoder.
    """

    name: str
    experts: bool
    window: int | None
    rope_base: float
    rope_scaling: RopeScaling | None
    causal: bool
    cross: bool


class Group(NamedTuple):
    """Layers `first` … that repeat `kinds` `repeats` times."""

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int


@functools.lru_cache(maxsize=1024)
def layer_kinds(config: ModelConfig, encoder: bool = False) -> tuple[LayerKind, ...]:
    """The kind of every layer of the main stack, or of the encoder of an encoder-decoder."""
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
    """For every layer: the name of its kind, and its index within that kind's stack of parameters."""
    return places_of(layer_kinds(config, encoder))


def places_of(kinds: tuple[LayerKind, ...]) -> tuple[tuple[str, int], ...]:
    """`places` of these kinds."""
    names = [kind.name for kind in kinds]
    return tuple((name, names[:index].count(name)) for index, name in enumerate(names))


@functools.lru_cache(maxsize=1024)
def groups(kinds: tuple[LayerKind, ...]) -> tuple[Group, ...]:
    """The layers as few repeating groups: each is the pattern that covers most layers from where it starts."""
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
