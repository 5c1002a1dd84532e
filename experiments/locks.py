"""Lock a folder for a change that depends on its content: one process at a time."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import InputError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if there is none; another process that asks for it waits.

    Raises InputError if the folder cannot be written, except for want of space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 – held until the block ends
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"the folder {folder} cannot be written: {error.strerror}; choose one that you may write to"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
