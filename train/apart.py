"""Where lanes lie: stacked in one array, or apart as states of their own.

An accelerator that small models leave idle runs lanes side by side, stacked and vmapped. The cores of a CPU are busy
with one: there the program of one lane runs for each in turn. Stacked, a lane would be copied out of the array and back
at every step, which costs a CPU 12 % of the step of a million parameters (docs/LOG.md). Apart, a lane is the solo run,
bit by bit, and one that has nothing to do costs nothing.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.loop.memory import Memory
from train.program import Program


def side_by_side() -> bool:
    """Whether lanes run by vmap, so that one that has ended still costs its work; else in turn, and it is skipped."""
    return jax.default_backend() != "cpu"


def lie_apart(mesh: Mesh) -> bool:
    """Whether several lanes are states of their own. Not over several devices, where programs that are under way at
    once may wait for one another's collectives for ever."""
    return not side_by_side() and mesh.size == 1


def as_lanes(mesh: Mesh, stacked: Any) -> Any:
    """A tree with leaves [lanes, …] as a program takes it: itself, or where lanes lie apart a list of their own."""
    lanes = jax.tree.leaves(stacked)[0].shape[0]
    return split(stacked, lanes) if lanes > 1 and lie_apart(mesh) else stacked


def compacts(wanted: bool | None) -> bool:
    """Whether lanes move to a smaller program once enough have ended (`Shell.compact`)."""
    return side_by_side() if wanted is None else wanted


def apart(one: Program, lanes: int) -> Program:
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
