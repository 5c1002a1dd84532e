"""What a named architecture is, and what is known of its released model."""

import dataclasses

from model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """An architecture, with the parameter count that its makers published and where.

    released_parameters: of the released checkpoint, a tied table once, never the number in a model's name; None: the
    architecture is our own. The preset holds the fields of the checkpoint's own configuration.
    """

    config: ModelConfig
    released_parameters: int | None = None
    source: str = ""


def safetensors(repository: str, less: str = "") -> str:
    """The source of a count: the metadata that the Hugging Face hub shows, less what is stored but no parameter."""
    return f"safetensors metadata of {repository}" + (f", less {less}" if less else "")
