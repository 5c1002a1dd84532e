"""The training loop around the pure step: its entry points, the members of a population, their data."""

from typing import TYPE_CHECKING

from model.lazy import lazy

if TYPE_CHECKING:
    from train.loop.loop import Loop
    from train.loop.options import Shell
    from train.loop.train import check_trainable, population
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {"loop": ("Loop",), "options": ("Shell",), "train": ("check_trainable", "population")},
    )

__all__ = ["Loop", "Shell", "check_trainable", "population"]  # `train` would be the module of that name
