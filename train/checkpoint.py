"""Orbax checkpoints that are verified before they are believed.

`RUN/checkpoints/STEP` holds the state as Orbax wrote it, `checkpoint.json` (step, score, the state's leaves) and
`checksums.json`. Orbax notices most damage, but one flipped bit in an array file restores silently wrong: so the
checksums are the SHA-256 of every other file, and a checkpoint that does not agree with them is damaged.

A checkpoint is made under a hidden name and renamed when it is whole, and renamed to a hidden name before it is
deleted. So a kill at any moment leaves whole checkpoints and hidden leftovers, which the run's next process removes.
All processes of a run must see the same folder; process 0 decides, names and deletes.
"""

import errno
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from model.errors import InputError
from train.checksums import CHECKSUMS, checksums, read_intact, verify
from train.files import sync_folder, sync_tree, write_json
from train.hosts import agree, is_writer

_ABOUT = "checkpoint.json"
_STATE = "state"
_KEY = "rng"  # the leaf of a training state whose shape is that of a PRNG's key
_FILE_OVERHEAD = 2**16  # bytes of Orbax's metadata, of the description and of the checksums
_WRITING, _DELETED, _REPLACED = "writing", "deleted", "replaced"
logger = logging.getLogger("isoflop")


class Checkpoints:
    """The checkpoints of one run.

    After each save these stay: the newest `keep`, multiples of `keep_every` (0: none), those of `keep_steps`, and with
    `keep_best` the one of the lowest score. read_only: for a folder whose run another process may be training; nothing
    is moved or removed. With several processes all of them call every method but `steps`, `whole_steps` and `close`.
    """

    def __init__(
        self,
        run: Path,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: bool = False,
        keep_steps: tuple[int, ...] = (),
        read_only: bool = False,
    ):
        if keep < 1 or keep_every < 0:
            raise InputError(f"keep={keep} must be at least 1 and keep_every={keep_every} at least 0 (0: none)")
        self._folder = Path(run).absolute() / "checkpoints"
        self._keep, self._keep_every, self._keep_best, self._keep_steps = keep, keep_every, keep_best, keep_steps
        self._read_only = read_only
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._checkpointer: ocp.StandardCheckpointer | None = None

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Copy the state to the host, then write it in the background; a failed earlier save is raised here.

        state: a tree of NumPy arrays, the same in all processes, and jax.Arrays, sharded in any way; it may be donated
        or changed as soon as this returns. score: what `keep_best` keeps the lowest of. A checkpoint that the step has
        already is replaced. Raises OSError (ENOSPC) before anything is begun where the disk has no room: a writer that
        fails half-way leaves little more than a page of tracebacks.
        """
        self.wait()
        state = jax.tree.map(_savable, state)
        agree(self._make_room, step, 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _FILE_OVERHEAD)
        if self._checkpointer is None:
            # Lanes are saved at once: without names of their own their processes would meet at each other's barriers.
            own = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=str(self._folder))
            self._checkpointer = ocp.StandardCheckpointer(multiprocessing_options=own)
        self._checkpointer.save(self._hidden(step, _WRITING) / _STATE, state)
        about = {"step": step, "score": None if score is None else float(score), "leaves": _leaves(state)}
        self._writer = threading.Thread(target=self._finish, args=(step, about), name=f"checkpoint-{step}")
        self._writer.start()

    def wait(self) -> None:
        """Until the save under way is on the disk; raises in all processes what went wrong with it.

        What the disk refused is an OSError with its errno. The checkpoints before it are as they were.
        """
        if self._writer is None:
            return
        failure = self._join()
        if failure is not None and not is_writer():
            raise failure
        agree(_raise, failure)

    def close(self) -> None:
        """Wait for this process's part, and let go of Orbax's threads."""
        try:
            _raise(self._join())
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def steps(self) -> list[int]:
        """Steps with a checkpoint on the disk, intact or not, oldest first.

        As this process sees it: while a save is under way, several processes must ask through `agree`.
        """
        return sorted(int(path.name) for path in self._folder.glob("[0-9]*") if path.name.isdigit())

    def whole_steps(self) -> list[int]:
        """Steps whose checkpoint was finished, oldest first; what it says now is not verified."""
        return [step for step in self.steps() if (self._path(step) / CHECKSUMS).is_file()]

    def restore_newest(self, like: Any, at_most: int | None = None, any_prng: bool = False) -> tuple[int, Any] | None:
        """(step, state) of the newest intact checkpoint, of at most that step; None if there is none.

        like: a tree of shapes and dtypes. A leaf with a sharding comes back as a jax.Array laid out so, on any mesh;
        without one as a NumPy array. Each damaged checkpoint on the way is named in a warning and moved to
        `RUN/damaged/`, so that its step can be written again. Raises InputError where the leaves are not those saved.
        any_prng: the key of dropout, which a reader does not need, may be of another PRNG, and comes back as it is.
        """
        self.wait()
        leaves = {name: leaf for name, leaf in _leaves(like).items() if not (any_prng and name == _KEY)}
        step = agree(self._newest_intact, at_most, leaves)
        return None if step is None else (step, self._read(step, like))

    def restore(self, step: int, like: Any) -> Any:
        """The state of that step, as `restore_newest` gives it. Raises InputError if there is none or it is damaged."""
        self.wait()
        agree(self._must_be_intact, step, _leaves(like))
        return self._read(step, like)

    def discard_after(self, step: int) -> None:
        """Delete every checkpoint of a later step, the last one first, so that the run can go on from this one."""
        self.wait()
        agree(self._discard_after, step)

    def _path(self, step: int) -> Path:
        return self._folder / str(step)

    def _hidden(self, step: int, kind: str) -> Path:
        return self._folder / f".{step}.{kind}"

    def _join(self) -> BaseException | None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        return failure

    def _make_room(self, step: int, needed: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        self._hidden(step, _WRITING).mkdir()

    def _finish(self, step: int, about: dict[str, Any]) -> None:
        try:
            assert self._checkpointer is not None
            self._checkpointer.wait_until_finished()  # of all processes
            if is_writer():
                self._publish(step, about)
                self._thin_out(step)
        except BaseException as failure:  # carried to the training thread, which raises it
            if is_writer():
                shutil.rmtree(self._hidden(step, _WRITING), ignore_errors=True)
            self._failure = _disk_error(failure, self._folder)

    def _publish(self, step: int, about: dict[str, Any]) -> None:
        writing, replaced = self._hidden(step, _WRITING), self._hidden(step, _REPLACED)
        write_json(writing / _ABOUT, about)
        write_json(writing / CHECKSUMS, checksums(writing))
        sync_tree(writing)  # before it is named, and named before older ones go: a power cut leaves one that is whole
        if self._path(step).exists():
            os.rename(self._path(step), replaced)
        os.rename(writing, self._path(step))
        sync_folder(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _thin_out(self, newest: int) -> None:
        whole = self.whole_steps()
        kept = {newest, *whole[-self._keep :], *self._keep_steps}
        if self._keep_every:
            kept |= {step for step in whole if step % self._keep_every == 0}
        if self._keep_best:
            scored = [(score, step) for step in whole if (score := self._score(step)) is not None]
            kept |= {step for _, step in sorted(scored)[:1]}
        for step in self.steps():
            if step not in kept:
                self._delete(step)

    def _score(self, step: int) -> float | None:
        about = read_intact(self._path(step), _ABOUT)
        return None if about is None else about["score"]

    def _delete(self, step: int) -> None:
        """Under a hidden name first: half a checkpoint never looks like one."""
        os.rename(self._path(step), self._hidden(step, _DELETED))
        shutil.rmtree(self._hidden(step, _DELETED), ignore_errors=True)

    def _discard_after(self, step: int) -> None:
        self._sweep()
        for later in reversed(self.steps()):
            if later > step:
                self._delete(later)

    def _sweep(self) -> None:
        """Remove what a killed process left under hidden names."""
        for path in [] if self._read_only else self._folder.glob(".*"):
            found = re.fullmatch(rf"\.(\d+)\.({_WRITING}|{_DELETED}|{_REPLACED})", path.name)
            if found and found[2] == _REPLACED and not self._path(int(found[1])).exists():
                os.rename(path, self._path(int(found[1])))  # killed before the new one had taken its place
            elif found:
                shutil.rmtree(path)

    def _newest_intact(self, at_most: int | None, leaves: dict[str, str]) -> int | None:
        self._sweep()
        refused: set[int] = set()
        # Listed anew each time: while one is verified here, a run that another process trains may replace them all.
        while steps := [step for step in self.steps() if step not in refused and (at_most is None or step <= at_most)]:
            reason = verify(self._path(steps[-1]))
            if reason is None:
                self._must_have(steps[-1], leaves)
                return steps[-1]
            if self._path(steps[-1]).exists():
                refused.add(steps[-1])
                self._set_aside(steps[-1], reason)
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        damaged = self._folder.parent / "damaged" / str(step)
        moved = "" if self._read_only else f"; moved to {damaged}"
        logger.warning("checkpoint %s is not used: %s%s", self._path(step), reason, moved)
        if not self._read_only:
            damaged.parent.mkdir(exist_ok=True)
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.move(self._path(step), damaged)

    def _must_be_intact(self, step: int, leaves: dict[str, str]) -> None:
        there = ", ".join(map(str, self.steps())) or "none"
        if step not in self.steps():
            raise InputError(f"{self._folder} has no checkpoint of step {step}; the steps there are: {there}")
        reason = verify(self._path(step))
        if reason is not None:
            raise InputError(f"checkpoint {self._path(step)} cannot be used: {reason}; the steps there are: {there}")
        self._must_have(step, leaves)

    def _must_have(self, step: int, leaves: dict[str, str]) -> None:
        saved = (read_intact(self._path(step), _ABOUT) or {"leaves": {}})["leaves"]
        wrong = [
            f"{name} is {saved.get(name, 'absent')} there and {leaves.get(name, 'absent')} here"
            for name in sorted(saved.keys() | leaves.keys())
            if saved.get(name) != leaves.get(name) and (name != _KEY or name in leaves)
        ]
        if len(wrong) == 1 and wrong[0].startswith(f"{_KEY} is uint32"):
            raise InputError(
                f"checkpoint {self._path(step)} was written under another PRNG of JAX: {wrong[0]}; runs are trained "
                "with threefry2x32 whatever JAX_DEFAULT_PRNG_IMPL says, so train into another folder"
            )
        if wrong:
            more = f", and {len(wrong) - 3} more leaves differ" if len(wrong) > 3 else ""
            raise InputError(
                f"checkpoint {self._path(step)} is of another version or configuration: {'; '.join(wrong[:3])}{more}; "
                "open it with what wrote it, or train into another folder"
            )

    def _read(self, step: int, like: Any) -> Any:
        arguments = ocp.args.PyTreeRestore(item=like, restore_args=jax.tree.map(_restore_args, like))
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(self._path(step) / _STATE, args=arguments)


def _leaves(tree: Any) -> dict[str, str]:
    """{"params/head/weight": "float32[64,1000]", …}, the same for a state and its shapes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _savable(leaf: Any) -> Any:
    """Orbax takes no NumPy scalar, and no jax.Array of one process among several: process 0 writes its own."""
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return leaf
    return np.asarray(leaf)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _disk_error(failure: BaseException, folder: Path) -> BaseException:
    """TensorStore puts the error of the operating system into the text of a ValueError; make it an OSError again."""
    found = re.search(r"(?:os_error_code='|OS error )(\d+)", str(failure))
    if found is None:
        return failure
    error = OSError(int(found[1]), os.strerror(int(found[1])), str(folder))
    error.__cause__ = failure
    return error


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure
