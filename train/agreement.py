"""What one process wishes and all must do in the same step: to stop, or to save because it is time."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STOP, CHECKPOINT = 1, 2


class Agreement:
    """Wishes of all processes, joined on the devices behind each step.

    One process alone is heard at once. Of several each hears of a wish when all do, one step after it was said: the
    answer comes with the metrics of the step, so that nobody waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._heard = 0
        self._alone = jax.process_count() == 1
        self._pending: Any = None
        if not self._alone:
            devices = Mesh(mesh.devices.reshape(-1), ("device",))
            self._where = NamedSharding(devices, PartitionSpec("device"))
            everywhere = NamedSharding(devices, PartitionSpec())
            join = lambda wishes: jax.numpy.stack([jax.numpy.max(wishes & bit) for bit in (STOP, CHECKPOINT)]).sum()
            self._join = jax.jit(join, out_shardings=everywhere)

    def ask(self, wish: int) -> None:
        """Say what this process wishes, once every step."""
        if self._alone:
            self._heard = wish
            return
        before, shape = self._pending, (self._where.mesh.size,)
        wishes = jax.make_array_from_callback(shape, self._where, lambda index: np.full(shape, wish, np.int32)[index])
        self._pending = self._join(wishes)
        self._heard = 0 if before is None else int(jax.device_get(before))

    def has(self, wish: int) -> bool:
        """Whether anybody wished it."""
        return bool(self._heard & wish)
