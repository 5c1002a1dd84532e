"""Define the interface of a training program with K lanes, for any form of its states."""

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
"""States of all lanes, in the form of the program that made them."""
LaneMetrics = dict[str, Any]
"""Values of all lanes by the metric's name: an array [lanes] or a list."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program(abc.ABC):
    """Executables for one static shape; compiled ahead of time, they can never recompile silently.

    lanes: their number. lane: shapes and shardings of one lane's state. memory: of a step, on one device.
    compile_seconds: of all executables. Hyperparameters and batches are passed in the form that `place` returns.
    """

    lanes: int
    lane: TrainState
    memory: Memory
    compile_seconds: float

    @abc.abstractmethod
    def place(self, tree: Any, shardings: Any = None) -> Any:
        """Lay out a host tree with leaves [lanes, …] (hyperparameters, a batch) in the form of this program.

        shardings: of every leaf on the devices; None: the leaves stay on the host.
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

        frozen: parameters that all lanes read (`Objective.split`), on the devices once; None if there are none.
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
        """Return the sums for one lane and one batch from which the objective's means are computed, then their weight.

        before: the result of the previous batch, which orders the batches: see `train.lanes.vmapped.evaluate_lane`.
        """

    @abc.abstractmethod
    def score(
        self,
        state: LaneStates,
        lane: int,
        batch: Batch,
        before: Float[Array | np.ndarray, " sums"],
        hparams: Any,
        frozen: Params | None = None,
    ) -> tuple[Float[Array, "batch scored"], Float[Array, " sums"]]:
        """Return the nats of each target of packed choices for one lane, and the `before` of the next batch.

        For programs that are compiled with `scored` (`train.lanes.build.compile_program`).
        """

    @abc.abstractmethod
    def take(self, state: LaneStates, lane: int) -> TrainState:
        """Return a copy of one lane's state."""

    @abc.abstractmethod
    def put(self, state: LaneStates, lane: int, new: TrainState) -> LaneStates:
        """Return the states with one lane's replaced; `state` is donated."""

    @abc.abstractmethod
    def compact(self, state: LaneStates, sources: Int[np.ndarray, " fewer"]) -> LaneStates:
        """Return the states of the lanes `sources`, in this order, for a program with that number of lanes.

        A repeated lane is padding. Example: sources [1, 3, 3] moves lane 1 to lane 0 and lane 3 to lane 1.
        """
