"""The other destinations of a run's numbers besides `metrics.jsonl`: TensorBoard and Weights & Biases.

None of them can stop or hold up a run. Each is written by a thread of its own, and one that raises, or takes nothing
any more, is dropped with one warning.
"""

import importlib
import logging
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from model.errors import InputError
from train.files import write_all
from train.run import read_record

CLOSE_SECONDS = 60.0  # that a channel gets at the end of a run for what it has not written yet
_WAITING = 10_000  # steps
logger = logging.getLogger("isoflop")


class Sink(Protocol):
    """What a channel writes to, in its own thread."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Finish."""


class Channel:
    """Hands steps over to a sink, which is opened in the channel's thread when the first one comes."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]):
        self._name, self._open_sink = name, open_sink
        self._steps: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._dropped = threading.Event()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Hand over one step; returns at once."""
        if self._thread is None:  # a daemon: one that hangs does not keep the process
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._put((step, numbers))

    def close(self) -> None:
        """Wait until the sink has everything, but no longer than `CLOSE_SECONDS`."""
        if self._thread is None:
            return
        self._put(None)
        self._thread.join(0 if self._dropped.is_set() else CLOSE_SECONDS)
        if self._thread.is_alive():
            self._drop(f"it has not finished within {CLOSE_SECONDS:.0f} s")

    def _put(self, entry: tuple[int, dict[str, float]] | None) -> None:
        if self._dropped.is_set():
            return
        try:
            self._steps.put_nowait(entry)
        except queue.Full:
            self._drop(f"it has taken nothing for {_WAITING:,} steps")

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (entry := self._steps.get()) is not None and not self._dropped.is_set():
                sink.write(*entry)
            sink.close()
        except BaseException as failure:  # whatever it is, the run goes on
            self._drop(f"{type(failure).__name__}: {failure}")

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            said = "%s gets no more of this run (%s); the run is not affected, and metrics.jsonl has every step"
            logger.warning(said, self._name, reason)


class TensorBoard:
    """An event file, one event a step; what an earlier process wrote from `first_step` on is hidden."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115 – lives as long as the channel
        self._write_event(step=first_step, file_version="brain.Event:2")
        self._write_event(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Append one step."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write_event(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _write_event(self, **fields: Any) -> None:
        """A TFRecord: length, its checksum, the event, its checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        content = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        write_all(self._file, length + checksums[0] + content + checksums[1])


class WandB:
    """A Weights & Biases run of the folder's name, which goes on when the folder's run does."""

    def __init__(self, project: str, folder: Path):
        import wandb

        record = read_record(folder)
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=record.get("wandb_id", record["run_id"]),  # folders from before there were ids of their own: as then
            resume="allow",
            dir=folder,
            config=record["identity"],
        )

    @classmethod
    def channel(cls, project: str, folder: Path) -> Channel:
        """Raise InputError where the library is not installed; whatever else is wrong with it drops the channel."""
        try:
            importlib.import_module("wandb")
        except ImportError:
            raise InputError("Weights & Biases is not installed: pip install 'isoflop[wandb]'") from None
        except Exception as failure:
            logger.debug("import wandb: %s", failure)  # raised again, and said, where the channel opens it
        return Channel("Weights & Biases", lambda: cls(project, folder))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Log one step."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()
