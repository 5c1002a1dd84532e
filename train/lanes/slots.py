"""Assign the members of a population to the lanes of a program.

Lanes without a member are padding: compiled, but never active.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Self

import numpy as np
from jaxtyping import Int

from train.config import HParams, stack_hparams


@dataclasses.dataclass(frozen=True)
class Slots:
    """Assignment of members to lanes. lanes: their number; members: the numbers of the members in the first lanes.

    Example: Slots(4, (0, 2, 5)) has member 0 in lane 0, member 2 in lane 1, member 5 in lane 2; lane 3 is padding.
    """

    lanes: int
    members: tuple[int, ...]

    def lane(self, member: int) -> int:
        """Return the lane of a member."""
        return self.members.index(member)

    def stack(self, hparams: list[HParams]) -> HParams:
        """Return the hyperparameters of the lanes, leaves [lanes], from those of all members; padding copies lane 0."""
        return stack_hparams([hparams[member] for member in self._filled()])

    def compacted(self, active: Collection[int], multiple: int = 1) -> Self:
        """Return slots with the active members only, the lanes halved while all of them still have one; or these slots.

        multiple: the number of lanes is rounded up to it. Since lane counts come from halving alone, any sequence of
        endings compiles at most log2 K more programs for K lanes. Example: Slots(8, (0, …, 7)) with the members 1, 4
        and 6 active becomes Slots(4, (1, 4, 6)).
        """
        lanes = self.lanes
        while lanes > 1 and 2 * len(active) <= lanes:
            lanes = (lanes + 1) // 2
        lanes = math.ceil(lanes / multiple) * multiple
        if lanes >= self.lanes or not active:
            return self
        return dataclasses.replace(self, lanes=lanes, members=tuple(n for n in self.members if n in active))

    def sources(self, before: "Slots") -> Int[np.ndarray, " lanes"]:
        """Return for every lane the lane that its member had in the slots `before`.

        Example: Slots(4, (1, 4, 6)) after Slots(8, (0, …, 7)) has the sources [1, 4, 6, 1].
        """
        return np.array([before.lane(member) for member in self._filled()], np.int32)

    def _filled(self) -> list[int]:
        """Return the member of every lane; padding repeats the first member."""
        padding = self.lanes - len(self.members)
        return [*self.members, *[self.members[0]] * padding]
