"""Sequential lanes: a list of states, over which the program of one lane runs one after the other.

The cores of a CPU are busy with one lane. Stacked, a lane would be copied out of the array and back at every step,
which costs a CPU 12 % of the step of a million parameters (docs/LOG.md). As a state of its own a lane is the solo run,
bit by bit, and an inactive one costs nothing.
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
    """Runs the program of one lane for each of several; hyperparameters, batches and states are lists [lanes]."""

    one: Program

    @classmethod
    def of(cls, one: Program, lanes: int) -> "SequentialProgram":
        """Return the program of several lanes from that of one."""
        memory = Memory(lanes * one.memory.state, one.memory.temporary)
        return cls(lanes, one.lane, memory, one.compile_seconds, one)

    def place(self, tree: Any, shardings: Any = None) -> list:
        """Split the tree into one for each lane, leaves [1, …]."""
        leaves, structure = jax.tree.flatten(tree)
        own = ([leaf[lane : lane + 1] for leaf in leaves] for lane in range(self.lanes))
        split = [jax.tree.unflatten(structure, leaves) for leaves in own]
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
        """Step the active lanes; the others' states are handed back and their metrics are 0."""
        states, measured = list(state), {}
        for lane in np.flatnonzero(active).tolist():
            own = states[lane], batch[lane], hparams[lane], np.ones(1, bool)
            states[lane], measured[lane] = self.one.step(*own, frozen)
        names = next(iter(measured.values()), {})
        nothing = np.zeros(1, np.float32)
        lanes = range(self.lanes)
        return states, {name: [measured[n][name] if n in measured else nothing for n in lanes] for name in names}

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

    def take(self, state: list, lane: int) -> TrainState:
        """Return a copy of one lane's state."""
        return self.one.take(state[lane], 0)

    def put(self, state: list, lane: int, new: TrainState) -> list:
        """Replace one lane's state; only that one is donated."""
        own = self.one.put(state[lane], 0, new)
        return [own if number == lane else other for number, other in enumerate(state)]

    def compact(self, state: list, sources: Int[np.ndarray, " fewer"]) -> Any:
        """Return the states of these lanes, for one lane its own; padding is None, because a state is donated."""
        numbers = sources.tolist()
        if len(numbers) == 1:
            return state[numbers[0]]
        return [state[n] if n not in numbers[:place] else None for place, n in enumerate(numbers)]
