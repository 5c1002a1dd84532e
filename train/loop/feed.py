"""Batches that lie on the devices before they are requested: made and sent by a thread while the step before runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from model.ambient import pinned
from model.sharding import batch_sharding
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
    """Batches [lanes, batch, seq] over a mesh, in the form of their program.

    Every process makes only the rows that its own devices hold.
    """

    def __init__(self, mesh: Mesh, members: Sequence[Member], names: dict[str, Any]):
        self._sharding = batch_sharding(mesh, lanes=True)
        self._members, self._names = members, names
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
        shape = (request.program.lanes, stage.batch_size, stage.seq_len)
        where = self._sharding.addressable_devices_indices_map(shape).values()
        spans = [index[1].indices(stage.batch_size) for index in where if index is not None]
        first, end = min(span[0] for span in spans), max(span[1] for span in spans)
        local = {name: np.zeros((shape[0], end - first, shape[2]), dtype) for name, dtype in self._names.items()}
        for lane, member, step in request.slots:
            for name, values in self._members[member].batch(step, slice(first, end)).items():
                local[name][lane] = values
        if self._sharding.is_fully_addressable:
            return request.program.place(local, self._sharding)
        return {name: self._from_rows(shape, values, first) for name, values in local.items()}

    def _from_rows(self, shape: tuple[int, ...], values: np.ndarray, first: int) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return values[index[0], start - first : stop - first, index[2]]

        callback: Callable[[Any], np.ndarray] = part
        return jax.make_array_from_callback(shape, self._sharding, callback)
