"""Synchronize requests to stop or to save, so that all processes of a run follow them in the same step."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

STOP, CHECKPOINT = 1, 2


class PreemptionSync:
    """Combine the requests of all processes on the devices, once per step.

    A single process sees its own request immediately. Several processes all see a request one step after it was made:
    the result is read together with the metrics of that step, so no process waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._requested = 0
        self._is_single = jax.process_count() == 1
        self._pending: Any = None
        if not self._is_single:
            devices = Mesh(mesh.devices.reshape(-1), ("device",))
            self._sharding = NamedSharding(devices, PartitionSpec("device"))
            self._combine = jax.jit(_any_of_each, out_shardings=NamedSharding(devices, PartitionSpec()))

    def request(self, flags: int) -> None:
        """Make this process's requests, STOP and CHECKPOINT or'ed; to be called once every step."""
        if self._is_single:
            self._requested = flags
            return
        before, shape = self._pending, (self._sharding.mesh.size,)
        values = np.full(shape, flags, np.int32)
        of_devices = jax.make_array_from_callback(shape, self._sharding, lambda index: values[index])
        self._pending = self._combine(of_devices)
        self._requested = 0 if before is None else int(jax.device_get(before))

    def is_requested(self, flag: int) -> bool:
        """Return whether any process made this request."""
        return bool(self._requested & flag)


def _any_of_each(flags: Int[Array, " devices"]) -> Int[Array, ""]:
    """Return the flags of all devices combined: [1, 0, 2, 1] becomes 3."""
    return jax.numpy.stack([jax.numpy.max(flags & flag) for flag in (STOP, CHECKPOINT)]).sum()
