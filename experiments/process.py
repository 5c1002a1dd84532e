"""How this process uses the machine: it keeps its memory, and on a CPU every core is a device of its own."""

import ctypes
import os
import sys
from contextlib import suppress

# glibc's `mallopt` parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> None:
    """Let glibc keep what is freed; call it before threads are started. Another libc is left as it is.

    XLA's CPU backend takes all temporary memory of a step anew every time, and glibc gives blocks of that size back to
    the kernel: a step then spends a quarter of its time on page faults (docs/LOG.md). One arena that never shrinks
    keeps them.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)
        libc.mallopt(_M_TOP_PAD, 2**26)


def cores_as_devices() -> None:
    """Let JAX see every core of a CPU as a device; call it before JAX is used. JAX_NUM_CPU_DEVICES says otherwise.

    A batch is then split by rows, and what XLA does not cut into threads runs on all cores too.
    """
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" not in os.environ and not forced:
        import jax

        jax.config.update("jax_num_cpu_devices", _cores())


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
