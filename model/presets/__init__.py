"""Named architectures: `get("llama3-8b")`. Those of released models carry the published parameter count."""

from model.config import ModelConfig
from model.errors import UnknownNameError
from model.presets import classic, deepseek, gemma, llama, ours, qwen
from model.presets.preset import Preset

_PRESETS: dict[str, Preset] = (
    ours.PRESETS | classic.PRESETS | llama.PRESETS | qwen.PRESETS | gemma.PRESETS | deepseek.PRESETS
)


def names() -> tuple[str, ...]:
    """All preset names."""
    return tuple(_PRESETS)


def get(name: str) -> ModelConfig:
    """The config of that name. Raises UnknownNameError (a KeyError) that lists the close names."""
    return lookup(name).config


def lookup(name: str) -> Preset:
    """The config of that name with its published parameter count and source; raises as `get` does."""
    if name not in _PRESETS:
        raise UnknownNameError("preset", name, _PRESETS)
    return _PRESETS[name]


__all__ = ["Preset", "get", "lookup", "names"]
