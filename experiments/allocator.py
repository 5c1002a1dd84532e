"""How a command uses the memory of its machine."""

import ctypes
import sys
from contextlib import suppress

# glibc's `mallopt` parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1  # a number would be an int, and so at most 2 GiB


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
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)
        libc.mallopt(_M_TOP_PAD, 2**26)
