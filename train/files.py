"""Write files atomically (written to a temporary name, synced, then renamed), and explain errors of the disk."""

import errno
import os
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from model.records import file_sha256 as file_sha256
from model.records import json_text

_THREADS = 8  # threads that wait for the disk


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step: a reader, or a run after a kill, sees the old content or the new.

    Anything but a regular file, such as /dev/stdout or a named pipe, is written to directly.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):  # it may never have been created
            beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # with the path that the caller knows
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities become null, which every reader accepts."""
    write_atomically(Path(path), json_text(value))


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write all content to an unbuffered file; a full disk raises here instead of when the file is closed."""
    try:
        while content:
            content = content[file.write(content) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error  # the system's error lacks the path


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk, so that what was created, renamed or removed survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder and all that is in it to the disk, concurrently: many syncs take little longer than one."""
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(sync_folder, [folder, *folder.rglob("*")]))  # also syncs the content of a file


def check_writable(path: Path) -> None:
    """Raise OSError if no file can be written at that path; called before its content is computed."""
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        return
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_full(error: BaseException) -> bool:
    """Return whether the disk or the quota was full. Orbax and TensorStore wrap the system's error in their own."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)


def refusal(error: OSError) -> str:
    """Return one sentence that says which file cannot be used, why, and what to do."""
    path, reason = error.filename, error.strerror or str(error)
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    advice = {
        errno.EROFS: "; choose a folder on a disk that can be written",
        errno.EACCES: "; choose a folder that you may write to, or change its permissions",
        errno.EPERM: "; choose a folder that you may write to, or change its permissions",
        errno.ENOTDIR: "; a part of that path is a file, choose one made of folders",
        errno.EISDIR: "; it is a folder, name a file",
        errno.EIO: "; the disk may be failing",
        errno.ENAMETOOLONG: "; choose a shorter one",
    }
    return f"{path} cannot be used: {reason}{advice.get(error.errno or 0, '')}"
