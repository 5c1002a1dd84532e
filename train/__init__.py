"""How parameters are found: pure steps, and the shell that runs them."""

from train.branch import cooldown
from train.config import HParams, TrainConfig
from train.phases import Phase, standard_phases
from train.recipe import Branch, Recipe, Weights
from train.run import Result, load_run
from train.shell import Shell
from train.state import TrainState, init_state
from train.step import eval_step, train_step
from train.training import population, train

__all__ = [
    "TrainConfig",
    "Recipe",
    "Branch",
    "Weights",
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
    "Shell",
    "load_run",
]
