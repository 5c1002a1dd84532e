"""What the loop drives: the executables of one static shape, for one lane or several."""

import dataclasses
from collections.abc import Callable
from typing import Any

from train.config import HParams
from train.loop.memory import Memory
from train.objective import Batch
from train.state import TrainState

Lanes = Any
"""A TrainState with leaves [lanes, …], or a list of TrainStates of one lane each."""
LaneMetrics = dict[str, Any]
"""By name: of every lane its value, an array [lanes] or a list."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Executables for one static shape; being compiled ahead, they can never recompile unseen.

    step(lanes, batches, hyperparameters, active): as `as_lanes` makes them; active is bool [lanes]. take(lanes, index)
    is a copy of one lane, put(lanes, index, lane) the lanes with one replaced. lane: its shapes and shardings.
    """

    init: Callable[[HParams], Lanes]
    step: Callable[[Lanes, Any, Any, Any], tuple[Lanes, LaneMetrics]]
    evaluate: Callable[[Lanes, Any, Batch, Any], Any]
    take: Callable[[Lanes, Any], TrainState]
    put: Callable[[Lanes, Any, TrainState], Lanes]
    lane: TrainState
    compile_seconds: float
    memory: Memory
