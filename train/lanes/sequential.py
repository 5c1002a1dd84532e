"""Run lanes sequentially: the program of one lane runs for each state in a list.

One lane keeps the cores of a CPU busy. In a stacked state, a lane would be copied out of the array and back at every
step, which takes 12 % of a step of a million parameters on a CPU (docs/LOG.md). With a state of its own, a lane equals
the solo run bit by bit, and an inactive lane costs nothing.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model import Params
from train.lanes.program import LaneMetrics, Program
from train.loop.memory import Memory
from train.objectives.objective import Batch
from train.state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialProgram(Program):
    """Run the program of one lane for each of several; hyperparameters, batches and states are lists [lanes]."""

    one: Program

    @classmethod
    def of(cls, one: Program, lanes: int) -> "SequentialProgram":
        """Return the program of several lanes from that of one."""
        memory = Memory(lanes * one.memory.state, one.memory.temporary)
        return cls(lanes, one.lane, memory, one.compile_seconds, one)

    def place(self, tree: Any, shardings: Any = None) -> list:
        """Split the tree into one per lane, with leaves [1, …]."""
        leaves, structure = jax.tree.flatten(tree)
        split = []
        for lane in range(self.lanes):
            leaves_of_lane = [leaf[lane : lane + 1] for leaf in leaves]
            split.append(jax.tree.unflatten(structure, leaves_of_lane))
        return split if shardings is None else jax.device_put(split, [shardings] * self.lanes)

    def init(self, hparams: list) -> list:
        """Return fresh states."""
        return [self.one.init(own) for own in hparams]

    def step(
        self,
        state: list,
        batch: list,
        hparams: list,
        active: Bool[np.ndarray, " lanes"],
        frozen: Params | None = None,
    ) -> tuple[list, LaneMetrics]:
        """Step the active lanes; return the others' states unchanged, with metrics 0."""
        states, measured = list(state), {}
        for lane in np.flatnonzero(active).tolist():
            states[lane], measured[lane] = self.one.step(
                states[lane], batch[lane], hparams[lane], np.ones(1, bool), frozen
            )
        names = next(iter(measured.values()), {})
        inactive = dict.fromkeys(names, np.zeros(1, np.float32))
        by_lane = [measured.get(lane, inactive) for lane in range(self.lanes)]
        return states, {name: [metrics[name] for metrics in by_lane] for name in names}

    def evaluate(
        self,
        state: list,
        lane: int,
        batch: Batch,
        before: Float[Array | np.ndarray, " sums"],
        hparams: Any,
        frozen: Params | None = None,
    ) -> Float[Array, " sums"]:
        """Evaluate one lane's own state."""
        return self.one.evaluate(state[lane], 0, batch, before, hparams[lane], frozen)

    def score(
        self,
        state: list,
        lane: int,
        batch: Batch,
        before: Float[Array | np.ndarray, " sums"],
        hparams: Any,
        frozen: Params | None = None,
    ) -> tuple[Float[Array, "batch scored"], Float[Array, " sums"]]:
        """Score with one lane's own state."""
        return self.one.score(state[lane], 0, batch, before, hparams[lane], frozen)

    def take(self, state: list, lane: int) -> TrainState:
        """Return a copy of one lane's state."""
        return self.one.take(state[lane], 0)

    def put(self, state: list, lane: int, new: TrainState) -> list:
        """Replace one lane's state; only that one is donated."""
        own = self.one.put(state[lane], 0, new)
        return [own if number == lane else other for number, other in enumerate(state)]

    def compact(self, state: list, sources: Int[np.ndarray, " fewer"]) -> Any:
        """Return the states of these lanes, for a single lane the state itself.

        Padding is None: a state is donated, so it cannot be in the list twice. Example: sources [1, 3, 3] gives
        [state[1], state[3], None].
        """
        numbers = sources.tolist()
        if len(numbers) == 1:
            return state[numbers[0]]
        states: list[Any] = []
        for place, number in enumerate(numbers):
            is_padding = number in numbers[:place]
            states.append(None if is_padding else state[number])
        return states
