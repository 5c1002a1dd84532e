"""Lanes that lie apart: states of their own, for each of which the program of one lane runs in turn.

Stacked in one array and mapped over, a lane would be copied out of it and back at every step, which costs a CPU 12 % of
the step of a million parameters (docs/LOG.md). Apart, a lane is the solo run, bit by bit, and one that has nothing to
do costs nothing.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from train.memory import Memory

if TYPE_CHECKING:
    from train.lanes import Program


def apart(one: "Program", lanes: int) -> "Program":
    """The program of several lanes from that of one."""

    def step(states: list, batch: Any, hparams: Any, active: Any) -> tuple[list, dict[str, list]]:
        batches, settings = split(batch, lanes), split(hparams, lanes)
        states, measured = list(states), {}
        for lane in np.flatnonzero(active).tolist():
            states[lane], measured[lane] = one.step(states[lane], batches[lane], settings[lane], np.ones(1, bool))
        names = next(iter(measured.values()), {})
        nothing = np.zeros(1, np.float32)
        return states, {name: [measured[n][name] if n in measured else nothing for n in range(lanes)] for name in names}

    def put(states: list, index: Any, lane: Any) -> list:
        own = one.put(states[index], np.int32(0), lane)
        return [own if number == index else state for number, state in enumerate(states)]

    return dataclasses.replace(
        one,
        init=lambda hparams: [one.init(own) for own in split(hparams, lanes)],
        step=step,
        evaluate=lambda states, index, batch, before: one.evaluate(states[index], np.int32(0), batch, before),
        take=lambda states, index: one.take(states[index], np.int32(0)),
        put=put,
        memory=Memory(lanes * one.memory.state, one.memory.temporary),
    )


def split(stacked: Any, lanes: int) -> list:
    """Of a tree with leaves [lanes, …] every lane's own, leaves [1, …]; a list is split already."""
    if isinstance(stacked, list):
        return stacked
    leaves, structure = jax.tree.flatten(stacked)
    own = ([leaf[lane : lane + 1] for leaf in leaves] for lane in range(lanes))
    return [jax.tree.unflatten(structure, leaves) for leaves in own]


def gather(states: list, sources: Any) -> Any:
    """The states of these numbers, stacked if it is one; the second of a number is None, for a state is donated."""
    numbers = np.asarray(sources).tolist()
    if len(numbers) == 1:
        return states[numbers[0]]
    return [states[n] if n not in numbers[:place] else None for place, n in enumerate(numbers)]
