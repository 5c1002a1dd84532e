"""The process of a command: standard streams, memory allocation, cache of compiled programs, signals."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# glibc's `mallopt` parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1  # an int, so at most 2 GiB


def keep_memory() -> None:
    """Let glibc keep what is freed; call it before threads are started. Another libc is left as it is.

    XLA's CPU backend allocates the temporary memory of a step again at every step, and glibc returns blocks of that
    size to the kernel: a step then spends a quarter of its time on page faults (docs/LOG.md). One arena that never
    shrinks keeps them.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)
        libc.mallopt(_M_TOP_PAD, 2**26)


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr if the process has none: the next opened file would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 – stays open


def use_compile_cache() -> None:
    """Keep compiled programs across processes; JAX_COMPILATION_CACHE_DIR names another place for them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # which JAX reads when it is imported, later
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(home / "isoflop" / "xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Make SIGTERM end the work as Ctrl-C does; in the main thread only, since no other one can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous: Callable | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
