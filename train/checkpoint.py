"""Orbax checkpoints that are verified before they are believed.

Orbax notices most damage, but one flipped bit in an array file restores silently wrong. So every checkpoint
carries `checksums.json`, the SHA-256 of each of its files, written last: a checkpoint without it was
never finished, one that does not agree with it is damaged.
"""

import errno
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.files import file_sha256, json_text, write_json

CHECKSUMS = "checksums.json"
_FILE_OVERHEAD = 2**16  # bytes of Orbax's metadata and of the checksums
logger = logging.getLogger("isoflop")


class Checkpoints:
    """The checkpoints of one run, in `RUN/checkpoints/STEP`; the newest `keep` stay."""

    def __init__(self, run: Path, keep: int = 2):
        self._folder = Path(run).absolute() / "checkpoints"
        self._keep = keep
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._manager: ocp.CheckpointManager | None = None

    def save(self, step: int, state: Any) -> None:
        """Write a host copy of the state in the background; a failed earlier save is raised here.

        Raises OSError (ENOSPC) before anything is begun where the disk has no room for it: a writer that fails half-way
        leaves little more than a page of tracebacks.
        """
        self.wait()
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _FILE_OVERHEAD
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True)
            )
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._writer = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._writer.start()

    def wait(self) -> None:
        """Until the save under way is on the disk; raises what went wrong with it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait, and let go of Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def steps(self) -> list[int]:
        """Steps with a checkpoint on the disk, whole or not, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def restore_newest(self, like: Any) -> tuple[int, Any] | None:
        """(step, state as NumPy arrays) of the newest intact checkpoint; None if there is none.

        like: a tree of shapes and dtypes. Each damaged or unfinished checkpoint on the way is named in a
        warning and moved to `RUN/damaged/`, so that its step can be written again.
        """
        self.wait()
        for step in reversed(self.steps()):
            reason = verify(self._folder / str(step))
            if reason is None:
                with ocp.StandardCheckpointer() as checkpointer:
                    return step, checkpointer.restore(self._folder / str(step) / "default", like)
            self._set_aside(step, reason)
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        damaged = self._folder.parent / "damaged" / str(step)
        logger.warning("checkpoint %s is not used: %s; moved to %s", self._folder / str(step), reason, damaged)
        damaged.parent.mkdir(exist_ok=True)
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.move(self._folder / str(step), damaged)

    def _finish(self, step: int) -> None:
        try:
            assert self._manager is not None
            self._manager.wait_until_finished()
            folder = self._folder / str(step)
            write_json(folder / CHECKSUMS, _checksums(folder))
        except BaseException as failure:  # carried to the training thread, which raises it
            self._failure = failure


def verify(checkpoint: Path) -> str | None:
    """None if every file is as it was written, else what is wrong."""
    try:
        text = (checkpoint / CHECKSUMS).read_text(encoding="utf-8")
        expected = json.loads(text)
    except FileNotFoundError:
        return "it was never finished (no checksums)"
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    if text != json_text(expected):
        return f"{CHECKSUMS} is damaged"
    actual = _checksums(checkpoint)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"its file {name} is missing"
        if name not in expected:
            return f"its file {name} does not belong to it"
        if actual[name] != expected[name]:
            return f"its file {name} is damaged (checksum differs)"
    return None


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}
