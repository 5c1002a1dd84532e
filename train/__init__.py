"""How parameters are found: pure steps, and the shell that runs them."""

from train.config import HParams, TrainConfig
from train.loop import population, train
from train.run import load_run
from train.state import TrainState, init_state
from train.step import eval_step, train_step
from train.trial import Result, Shell

__all__ = [
    "TrainConfig",
    "HParams",
    "TrainState",
    "init_state",
    "train_step",
    "eval_step",
    "train",
    "population",
    "Result",
    "Shell",
    "load_run",
]
