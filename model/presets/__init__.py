"""Named architectures: `get("llama3-8b")`. Presets of released models have the published parameter count."""

from model.config import ModelConfig
from model.errors import UnknownNameError
from model.presets import classic, deepseek, gemma, llama, ours, qwen
from model.presets.preset import Preset

_PRESETS: dict[str, Preset] = (
    ours.PRESETS | classic.PRESETS | llama.PRESETS | qwen.PRESETS | gemma.PRESETS | deepseek.PRESETS
)


def names() -> tuple[str, ...]:
    """Return all preset names."""
    return tuple(_PRESETS)


def get(name: str) -> ModelConfig:
    """Return the config of a preset. Raises UnknownNameError, a KeyError with the closest names."""
    return lookup(name).config


def lookup(name: str) -> Preset:
    """Return a preset: config, published parameter count and source. Raises UnknownNameError."""
    if name not in _PRESETS:
        raise UnknownNameError("preset", name, _PRESETS)
    return _PRESETS[name]


__all__ = ["Preset", "get", "lookup", "names"]
