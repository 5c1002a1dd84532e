"""Assign the members of a population to the lanes of a program.

Lanes that hold none are padding: compiled, never active.
"""

import dataclasses
from collections.abc import Collection
from typing import Self

import numpy as np
from jaxtyping import Int

from train.config import HParams, stack_hparams


@dataclasses.dataclass(frozen=True)
class Slots:
    """lanes: how many the program has. members: the numbers of the members in its first lanes, in order."""

    lanes: int
    members: tuple[int, ...]

    def lane(self, member: int) -> int:
        """Return the lane of a member."""
        return self.members.index(member)

    def stack(self, hparams: list[HParams]) -> HParams:
        """Return the hyperparameters of every lane, leaves [lanes], from those of all members; padding has lane 0's."""
        return stack_hparams([hparams[member] for member in self._filled()])

    def compacted(self, active: Collection[int], multiple: int = 1) -> Self:
        """Return the active members in half as many lanes, halved as often as all still get a slot; or the same slots.

        multiple: divides the number of lanes. Counts come from halving alone, so that all the ways down from K lanes
        compile at most log2 K further programs.
        """
        lanes = self.lanes
        while lanes > 1 and 2 * len(active) <= lanes:
            lanes = (lanes + 1) // 2
        lanes = -(-lanes // multiple) * multiple
        if lanes >= self.lanes or not active:
            return self
        return dataclasses.replace(self, lanes=lanes, members=tuple(n for n in self.members if n in active))

    def sources(self, before: "Slots") -> Int[np.ndarray, " lanes"]:
        """Return for every lane the lane in the slots `before` that held its member."""
        return np.array([before.lane(member) for member in self._filled()], np.int32)

    def _filled(self) -> list[int]:
        return [*self.members, *[self.members[0]] * (self.lanes - len(self.members))]
