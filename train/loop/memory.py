"""Compare the memory that a compiled step needs, by XLA's own analysis, with what the device has."""

import dataclasses
from typing import Any

import jax

from model.memory import free_memory

_USABLE = 0.92  # of a device's memory; the rest goes to the runtime and to fragments


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. state: arguments and results, donated ones counted once; temporary: intermediate values."""

    state: int
    temporary: int

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """Return the memory of a compiled program; zeros if the backend has no analysis."""
        analysis = compiled.memory_analysis()
        if analysis is None:
            return cls(0, 0)
        state = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return cls(state, analysis.temp_size_in_bytes)

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.state + self.temporary

    def fits(self, limit: int) -> bool:
        """Return whether a device of `limit` bytes holds it."""
        return self.total <= _USABLE * limit

    def describe(self, limit: int) -> str:
        """Return one line for people."""

        def size(count: int) -> str:
            return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"

        return (
            f"{size(self.total)} of {size(limit)} per device "
            f"({size(self.state)} state and batch, {size(self.temporary)} temporary)"
        )


def device_memory(device: jax.Device | None = None) -> int:
    """Return the bytes that a program may use on a device; for a CPU the free memory, divided among its devices."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return free_memory() // jax.local_device_count()
