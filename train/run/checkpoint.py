"""Save and restore Orbax checkpoints; each is verified before it is used.

`RUN/checkpoints/STEP` holds the parameters and the rest of the state as Orbax wrote them (see `model.checkpoint`),
`checkpoint.json` and `checksums.json`. Orbax notices most damage, but one flipped bit in an array file restores
silently wrong: the checksums are therefore the SHA-256 of every other file, and a checkpoint that does not match them
is damaged.

A checkpoint is written under a hidden name and renamed when it is complete, and renamed to a hidden name before it is
deleted. A kill at any moment thus leaves complete checkpoints and hidden leftovers, which the run's next process
removes. All processes of a run must see the same folder; process 0 decides, renames and deletes.
"""

import errno
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from model.checkpoint import (
    ABOUT,
    FOLDER,
    items_of,
    leaves_of,
    newest_intact,
    require_leaves,
    restore,
    steps_in,
    warn,
)
from model.errors import InputError, check_at_least_one, check_whole
from train.checksums import CHECKSUMS, checksums, read_intact, verify
from train.files import sync_folder, sync_tree, write_json
from train.hosts import agree, is_writer
from train.run.best import DEFAULT_METRIC, Best, metric_of

_FILE_OVERHEAD = 2**17  # bytes of Orbax's metadata, of the description and of the checksums
_WRITING, _DELETED, _REPLACED = "writing", "deleted", "replaced"


class Checkpoints:
    """Save, restore and delete the checkpoints of one run.

    After each save these are kept: the newest `keep`, multiples of `keep_every` (0: none), those of `keep_steps`, and
    with `keep_best` the one with the best score. keep_best: the name of the metric of the scores; True:
    validation_loss. read_only: for a folder whose run another process may be training; nothing is moved or removed.
    With several processes all of them must call every method but `steps`, `whole_steps` and `close`.
    """

    def __init__(
        self,
        run: Path,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: bool | str = False,
        higher_is_better: bool = False,
        keep_steps: tuple[int, ...] = (),
        read_only: bool = False,
    ):
        check_at_least_one(keep=keep)
        check_whole("keep_every", keep_every, hint="0 keeps none")
        self._folder = Path(run).absolute() / FOLDER
        self._keep, self._keep_every, self._keep_best, self._keep_steps = keep, keep_every, keep_best, keep_steps
        self._metric, self._read_only = metric_of(keep_best), read_only
        self._higher_is_better = higher_is_better
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._checkpointer: ocp.AsyncCheckpointer | None = None

    def save(self, step: int, state: Any, score: float | None = None, config: Mapping[str, Any] | None = None) -> None:
        """Copy the state to the host, then write it in the background; an earlier save that failed raises here.

        state: a tree of NumPy arrays, the same in all processes, and jax.Arrays, sharded in any way; it may be donated
        or changed as soon as this returns. Its field `params`, if it has one, is stored as an item of its own.
        score: the value of the metric that `keep_best` names. config: fields of the model's config whose value at this
        step is not the one in the run's record. An existing checkpoint of the step is replaced. Raises OSError (ENOSPC)
        before it writes anything if the disk has too little room: Orbax reports a write that fails half-way by little
        more than a page of tracebacks.
        """
        self.wait()
        state = jax.tree.map(_savable, state)
        agree(self._make_room, step, 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _FILE_OVERHEAD)
        if self._checkpointer is None:
            # Lanes save concurrently: without a prefix of their own they would wait at each other's barriers.
            own = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=str(self._folder))
            # Directories are created synchronously: Orbax would wait for them by the wall clock, which may jump.
            at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            options = ocp.CompositeOptions(multiprocessing_options=own, async_options=at_once)
            handler = ocp.CompositeCheckpointHandler(composite_options=options)
            self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=at_once, multiprocessing_options=own)
        about: dict[str, Any] = {
            "step": step,
            "score": None if score is None else float(score),
            "leaves": leaves_of(state),
        }
        about |= {"metric": self._metric, "config": dict(config or {})}
        if jax.process_count() > 1:  # the collectives of Orbax belong to the thread that runs all others
            self._write(step, state)
            left = None
        else:
            left = _on_host(state)
        arguments = (step, about, left)
        self._writer = threading.Thread(target=self._finish, args=arguments, name=f"checkpoint-{step}")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the save under way is on the disk; raise its error, if any, in all processes.

        An error of the disk is an OSError with its errno. Earlier checkpoints are not affected.
        """
        if self._writer is None:
            return
        failure = self._join()
        if failure is not None and not is_writer():
            raise failure
        agree(_raise, failure)

    def close(self) -> None:
        """Wait for this process's part of a save, and stop Orbax's threads."""
        try:
            _raise(self._join())
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint on the disk, intact or not, oldest first.

        Processes may see the folder at different moments of a save: several of them must call this through `agree`.
        """
        return steps_in(self._folder)

    def whole_steps(self) -> list[int]:
        """Return the steps whose checkpoint was completed, oldest first, without verifying its content."""
        return [step for step in self.steps() if (self._path(step) / CHECKSUMS).is_file()]

    def restore_newest(self, like: Any, at_most: int | None = None) -> tuple[int, Any] | None:
        """Return (step, state) of the newest intact checkpoint, up to step `at_most`; None if there is none.

        like: a tree of shapes and dtypes. A leaf with a sharding is restored as a jax.Array of that layout, on any
        mesh; a leaf without one as a NumPy array. Each damaged checkpoint on the way is reported by a warning and moved
        to `RUN/damaged/`, so that its step can be saved again. Raises InputError if the leaves are not those saved.
        """
        self.wait()
        step = agree(self._newest_intact, at_most, leaves_of(like))
        return None if step is None else (step, restore(self._path(step), like))

    def restore(self, step: int, like: Any) -> Any:
        """Return the state of a step as `restore_newest` does. Raises InputError if it is missing or damaged."""
        self.wait()
        agree(self._must_be_intact, step, leaves_of(like))
        return restore(self._path(step), like)

    def discard_after(self, step: int) -> None:
        """Delete every checkpoint of a later step, the last one first, so that the run can continue from this one."""
        self.wait()
        agree(self._discard_after, step)

    def _path(self, step: int) -> Path:
        return self._folder / str(step)

    def _hidden(self, step: int, kind: str) -> Path:
        return self._folder / f".{step}.{kind}"

    def _written(self, step: int) -> Path:
        """Return where Orbax writes a checkpoint, next to its own temporary folder, before it is renamed."""
        return self._hidden(step, _WRITING) / str(step)

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

    def _write(self, step: int, state: Any) -> None:
        assert self._checkpointer is not None
        items = {name: ocp.args.StandardSave(item) for name, item in items_of(state).items()}
        self._checkpointer.save(self._written(step), args=ocp.args.Composite(**items))

    def _finish(self, step: int, about: dict[str, Any], state: Any) -> None:
        """Write the state (None: Orbax is writing it already), wait for it, and publish it."""
        try:
            assert self._checkpointer is not None
            if state is not None:
                self._write(step, state)
            self._checkpointer.wait_until_finished()  # of all processes
            if is_writer():
                self._publish(step, about)
                self._thin_out(step)
        except BaseException as failure:  # carried to the training thread, which raises it
            if is_writer():
                shutil.rmtree(self._hidden(step, _WRITING), ignore_errors=True)
            self._failure = _disk_error(failure, self._folder)

    def _publish(self, step: int, about: dict[str, Any]) -> None:
        written, replaced = self._written(step), self._hidden(step, _REPLACED)
        write_json(written / ABOUT, about)
        write_json(written / CHECKSUMS, checksums(written))
        # Synced before the rename, and renamed before older ones are deleted: a power cut leaves a complete one.
        sync_tree(written)
        if self._path(step).exists():
            os.rename(self._path(step), replaced)
        os.rename(written, self._path(step))
        sync_folder(self._folder)
        shutil.rmtree(self._hidden(step, _WRITING), ignore_errors=True)  # empty now
        shutil.rmtree(replaced, ignore_errors=True)

    def _thin_out(self, newest: int) -> None:
        whole = self.whole_steps()
        kept = {newest, *whole[-self._keep :], *self._keep_steps}
        if self._keep_every:
            kept |= {step for step in whole if step % self._keep_every == 0}
        if self._keep_best:
            scores = [{"step": step, self._metric: self._score(step)} for step in whole]
            best = Best.of(self._metric, scores, higher_is_better=self._higher_is_better)
            if best.value is not None:
                kept.add(best.step)
        for step in self.steps():
            if step not in kept:
                self._delete(step)

    def _score(self, step: int) -> float | None:
        """Return the metric at a step; None if it is unknown or the stored score is of another metric."""
        about = read_intact(self._path(step), ABOUT) or {"score": None}
        metric = about.get("metric", DEFAULT_METRIC)  # older versions scored by the loss alone
        return about["score"] if metric == self._metric else None

    def _delete(self, step: int) -> None:
        """Delete under a hidden name: a checkpoint that is half deleted must not look like a complete one."""
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
                os.rename(path, self._path(int(found[1])))  # killed between the two renames of a replacement
            elif found:
                shutil.rmtree(path)

    def _newest_intact(self, at_most: int | None, leaves: dict[str, str]) -> int | None:
        self._sweep()
        step = newest_intact(self._folder, verify, self._set_aside, at_most)
        if step is not None:
            require_leaves(self._path(step), leaves)
        return step

    def _set_aside(self, path: Path, reason: str) -> None:
        if self._read_only:
            return warn(path, reason)
        damaged = self._folder.parent / "damaged" / path.name
        warn(path, reason, f"; moved to {damaged}")
        damaged.parent.mkdir(exist_ok=True)
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.move(path, damaged)

    def _must_be_intact(self, step: int, leaves: dict[str, str]) -> None:
        there = ", ".join(map(str, self.steps())) or "none"
        if step not in self.steps():
            raise InputError(f"{self._folder} has no checkpoint of step {step}; the steps there are: {there}")
        reason = verify(self._path(step))
        if reason is not None:
            raise InputError(f"checkpoint {self._path(step)} cannot be used: {reason}; the steps there are: {there}")
        require_leaves(self._path(step), leaves)


def _savable(leaf: Any) -> Any:
    """Return a leaf in a form that Orbax saves.

    Orbax takes no NumPy scalars and, with several processes, no jax.Array that a single process holds: those become
    NumPy arrays, which process 0 writes.
    """
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return leaf
    return np.asarray(leaf)


def _on_host(state: Any) -> Any:
    """Return the state as NumPy arrays that neither a donation nor the caller can change.

    A jax.Array on a CPU becomes a view of its buffer: JAX does not donate a buffer that has a view, but copies it.
    """
    leaves = jax.tree.leaves(state)
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else np.array(leaf), state)


def _disk_error(failure: BaseException, folder: Path) -> BaseException:
    """Convert a failure back to an OSError: TensorStore puts the errno into the text of a ValueError."""
    found = re.search(r"(?:os_error_code='|OS error )(\d+)", str(failure))
    if found is None:
        return failure
    error = OSError(int(found[1]), os.strerror(int(found[1])), str(folder))
    error.__cause__ = failure
    return error


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure
