"""The training loop around the pure step: what a caller asks for, the members of a population, their data."""

from typing import TYPE_CHECKING

from model.lazy import lazy

if TYPE_CHECKING:
    from train.loop.loop import Loop
    from train.loop.options import Shell
    from train.loop.train import check_trainable, population, train
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {"loop": ("Loop",), "options": ("Shell",), "train": ("check_trainable", "population", "train")},
    )

__all__ = ["Loop", "Shell", "check_trainable", "population", "train"]
