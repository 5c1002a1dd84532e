"""The interface of a training program with K lanes; its callers need not know which form its states have."""

import abc
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model import Params
from train.loop.memory import Memory
from train.objectives.objective import Batch
from train.state import TrainState

LaneStates = Any
"""The states of all lanes, in the form of the program that made them."""
LaneMetrics = dict[str, Any]
"""By name: the values of all lanes, an array [lanes] or a list."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program(abc.ABC):
    """Executables for one static shape; being compiled ahead, they can never recompile unseen.

    lanes: their number. lane: shapes and shardings of one lane's state. memory: of a step, on one device.
    compile_seconds: of all executables. Hyperparameters and batches are given as `place` lays them out.
    """

    lanes: int
    lane: TrainState
    memory: Memory
    compile_seconds: float

    @abc.abstractmethod
    def place(self, tree: Any, shardings: Any = None) -> Any:
        """Lay out a host tree with leaves [lanes, …] (hyperparameters, a batch) in the form of this program.

        shardings: of every leaf on the devices; None: they stay on the host.
        """

    @abc.abstractmethod
    def init(self, hparams: Any) -> LaneStates:
        """Return fresh states."""

    @abc.abstractmethod
    def step(
        self,
        state: LaneStates,
        batch: Any,
        hparams: Any,
        active: Bool[np.ndarray, " lanes"],
        frozen: Params | None = None,
    ) -> tuple[LaneStates, LaneMetrics]:
        """Return the states after one step of every active lane, and its metrics; `state` is donated.

        frozen: parameters that all lanes read (`Objective.split`), on the devices once; None where there are none.
        """

    @abc.abstractmethod
    def evaluate(
        self,
        state: LaneStates,
        lane: int,
        batch: Batch,
        before: Float[Array | np.ndarray, " sums"],
        hparams: Any,
        frozen: Params | None = None,
    ) -> Float[Array, " sums"]:
        """Return the sums of one lane on one batch that the objective's means are made of, and last their weight.

        before: the result for the batch before, which orders the batches: see `train.lanes.vmapped.evaluate_lane`.
        """

    @abc.abstractmethod
    def take(self, state: LaneStates, lane: int) -> TrainState:
        """Return a copy of one lane's state."""

    @abc.abstractmethod
    def put(self, state: LaneStates, lane: int, new: TrainState) -> LaneStates:
        """Return the states with one lane's replaced; `state` is donated."""

    @abc.abstractmethod
    def compact(self, state: LaneStates, sources: Int[np.ndarray, " fewer"]) -> LaneStates:
        """Return the states of the lanes `sources`, in this order, for a program with as many lanes.

        A lane that comes twice is padding the second time.
        """
