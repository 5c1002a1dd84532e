"""Train models: pure steps, and the loop with files, checkpoints and processes around them."""

from typing import TYPE_CHECKING

from model.lazy import lazy

if TYPE_CHECKING:
    from train.branch import cooldown
    from train.config import HParams, TrainConfig
    from train.loop.options import RunOptions, Shell
    from train.loop.train import population, train
    from train.phases import Phase, standard_phases
    from train.recipe import Branch, Recipe, Weights, difference
    from train.run import Result, load_run
    from train.start import weights
    from train.state import TrainState, init_state
    from train.step import eval_step, train_step
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "branch": ("cooldown",),
            "config": ("HParams", "TrainConfig"),
            "phases": ("Phase", "standard_phases"),
            "recipe": ("Branch", "Recipe", "Weights", "difference"),
            "run": ("Result", "load_run"),
            "loop.options": ("RunOptions", "Shell"),
            "start": ("weights",),
            "state": ("TrainState", "init_state"),
            "step": ("eval_step", "train_step"),
            "loop.train": ("population", "train"),
        },
    )

__all__ = [
    "TrainConfig",
    "Recipe",
    "Branch",
    "Weights",
    "weights",
    "difference",
    "Phase",
    "standard_phases",
    "HParams",
    "TrainState",
    "init_state",
    "train_step",
    "eval_step",
    "train",
    "population",
    "cooldown",
    "Result",
    "RunOptions",
    "Shell",
    "load_run",
]
