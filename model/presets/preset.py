"""A named architecture, with the published facts of its released model."""

import dataclasses

from model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """An architecture with the published parameter count of its checkpoint.

    config: with the fields of the checkpoint's own configuration. released_parameters: exact count, with a tied table
    counted once, not the rounded number in the model's name; None: not a released model. source: of the count.
    """

    config: ModelConfig
    released_parameters: int | None = None
    source: str = ""


def safetensors(repository: str, less: str = "") -> str:
    """Return the source of a count: metadata on the Hugging Face hub, less stored tensors that do not count."""
    return f"safetensors metadata of {repository}" + (f", less {less}" if less else "")
