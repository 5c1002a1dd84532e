"""Prepare the next batch in a thread while a step runs, so that it is on the devices when it is requested."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Shaped

from model.ambient import pinned
from model.sharding import batch_shardings
from train.lanes.build import with_lanes
from train.lanes.program import Program
from train.loop.member import Member
from train.plan import Stage


class Slot(NamedTuple):
    """Member that takes part in a step. lane, member: numbers; step: which of the member's own steps it is, from 0."""

    lane: int
    member: int
    step: int


class BatchKey(NamedTuple):
    """Batch of a step, by the program that takes it and the members that it is for."""

    program: Program
    slots: tuple[Slot, ...]


class Feed:
    """Supply batches [lanes, batch, …] over a mesh, in the form that their program takes.

    Every process builds only the rows that its own devices hold.
    """

    def __init__(self, mesh: Mesh, members: Sequence[Member]):
        self._mesh, self._members = mesh, members
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[BatchKey, Future[Any]] | None = None

    def prepare(self, key: BatchKey, stage: Stage) -> None:
        """Start to build the batch of the next step."""
        self._ahead = (key, self._thread.submit(self._make, key, stage))

    def take(self, key: BatchKey, stage: Stage) -> Any:
        """Return the batch of a key: the prepared one, or a new one if the batch of another key was prepared."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == key:
            return ahead[1].result()
        return self._make(key, stage)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    @pinned()  # also for the thread
    def _make(self, key: BatchKey, stage: Stage) -> Any:
        lanes, batch_size = key.program.lanes, stage.batch_size
        spec = self._members[0].batch_spec(stage)  # the same for all members
        of_lanes = with_lanes(spec, lanes)
        shardings = batch_shardings(self._mesh, of_lanes, lanes=True)
        name, sharding = next(iter(shardings.items()))  # which splits the rows as all others do
        first, end = _own_rows(sharding, of_lanes[name].shape)
        local = {}
        for name, array in spec.items():
            local[name] = np.zeros((lanes, end - first, *array.shape[1:]), array.dtype)
        for lane, member, step in key.slots:
            for name, values in self._members[member].batch(step, slice(first, end)).items():
                local[name][lane] = values
        if sharding.is_fully_addressable:
            return key.program.place(local, shardings)
        return {name: _from_own_rows(values, shardings[name], batch_size, first) for name, values in local.items()}


def _own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the first row, and one past the last row, that the devices of this process hold of [lanes, batch, …].

    Example: 16 rows over 8 devices of two processes are 2 rows per device; the devices of the second process hold the
    rows 8–9, 10–11, 12–13 and 14–15, so its rows are (8, 16).
    """
    starts, ends = [], []
    for index in sharding.addressable_devices_indices_map(shape).values():
        if index is not None:
            start, end, _ = index[1].indices(shape[1])
            starts.append(start)
            ends.append(end)
    return min(starts), max(ends)


def _from_own_rows(
    values: Shaped[np.ndarray, "lanes own_rows ..."], sharding: NamedSharding, batch_size: int, first: int
) -> Shaped[jax.Array, "lanes batch ..."]:
    """Assemble an array of all rows, of which this process gives those from row `first` on.

    Example: with first=8, JAX asks a device's callback for the rows 10–11 of the batch, which are values[:, 2:4].
    """

    def rows_of_device(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, end, _ = index[1].indices(batch_size)
        return values[index[0], start - first : end - first, *index[2:]]

    shape = (values.shape[0], batch_size, *values.shape[2:])
    return jax.make_array_from_callback(shape, sharding, rows_of_device)
