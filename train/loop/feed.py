"""Batches that lie on the devices before they are requested: made and sent by a thread while the step before runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from model.ambient import pinned
from model.sharding import batch_shardings
from train.lanes.build import with_lanes
from train.lanes.program import Program
from train.loop.member import Member
from train.plan import Stage


class Slot(NamedTuple):
    """A member that takes part in a step: its lane, its number, and which of its steps it is."""

    lane: int
    member: int
    step: int


class Request(NamedTuple):
    """What a step takes: the program that runs it, and the members that take part."""

    program: Program
    slots: tuple[Slot, ...]


class Feed:
    """Batches [lanes, batch, …] over a mesh, in the form of their program.

    Every process makes only the rows that its own devices hold.
    """

    def __init__(self, mesh: Mesh, members: Sequence[Member]):
        self._mesh, self._members = mesh, members
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[Request, Future[Any]] | None = None

    def prepare(self, request: Request, stage: Stage) -> None:
        """Begin with the next request."""
        self._ahead = (request, self._thread.submit(self._make, request, stage))

    def take(self, request: Request, stage: Stage) -> Any:
        """The batch of a request: the prepared one, or, where something came between, another."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == request:
            return ahead[1].result()
        return self._make(request, stage)

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown(cancel_futures=True)

    @pinned()  # it runs in the thread too
    def _make(self, request: Request, stage: Stage) -> Any:
        first_member, lanes = self._members[0], request.program.lanes
        of_rows = first_member.batch_spec(stage)
        shardings = batch_shardings(self._mesh, with_lanes(of_rows, lanes), lanes=True)
        sharding = next(iter(shardings.values()))
        where = sharding.addressable_devices_indices_map((lanes, stage.batch_size)).values()
        spans = [index[1].indices(stage.batch_size) for index in where if index is not None]
        first, end = min(span[0] for span in spans), max(span[1] for span in spans)
        local = {name: np.zeros((lanes, end - first, *of.shape[1:]), of.dtype) for name, of in of_rows.items()}
        for lane, member, step in request.slots:
            for name, values in self._members[member].batch(step, slice(first, end)).items():
                local[name][lane] = values
        if sharding.is_fully_addressable:
            return request.program.place(local, shardings)
        made = _from_rows(stage.batch_size, first)
        return {name: made(values, shardings[name]) for name, values in local.items()}


def _from_rows(batch_size: int, first: int) -> Callable[[np.ndarray, NamedSharding], jax.Array]:
    """Return what makes an array of all rows of those that a process holds, the first of them `first`."""

    def make(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (values.shape[0], batch_size, *values.shape[2:])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[1].indices(batch_size)
            return values[index[0], start - first : stop - first, *index[2:]]

        return jax.make_array_from_callback(shape, sharding, part)

    return make
