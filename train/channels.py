"""Send a run's numbers to TensorBoard and Weights & Biases, besides `metrics.jsonl`.

Neither can stop or delay a run. Each is written by a thread of its own, and is dropped with one warning if it raises or
stops taking numbers.
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

CLOSE_SECONDS = 60.0  # time that a channel gets at the end of a run to write the rest
_WAITING = 10_000  # steps that a channel may be behind
logger = logging.getLogger("isoflop")


class Sink(Protocol):
    """Destination of a channel, called in the channel's own thread."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of one step."""

    def close(self) -> None:
        """Finish writing."""


class Channel:
    """Pass steps to a sink, which is opened in the channel's thread at the first step."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]):
        self._name, self._open_sink = name, open_sink
        self._steps: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._dropped = threading.Event()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Pass one step on, without waiting."""
        if self._thread is None:  # a daemon, so that a hanging channel does not keep the process alive
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._put((step, numbers))

    def close(self) -> None:
        """Wait until the sink has written everything, at most `CLOSE_SECONDS`."""
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
        except BaseException as failure:  # no failure of a channel may stop the run
            self._drop(f"{type(failure).__name__}: {failure}")

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            message = "%s gets no more of this run (%s); the run is not affected, and metrics.jsonl has every step"
            logger.warning(message, self._name, reason)


class TensorBoard:
    """Event file with one event per step; events that an earlier process wrote from `first_step` on are hidden."""

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
        """Close the file."""
        self._file.close()

    def _write_event(self, **fields: Any) -> None:
        """Append a TFRecord: length, its checksum, the event, its checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        content = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        length_checksum, content_checksum = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        write_all(self._file, length + length_checksum + content + content_checksum)


class WandB:
    """Weights & Biases run with the folder's name, which is resumed when the folder's run is."""

    def __init__(self, project: str, folder: Path):
        import wandb

        record = read_record(folder)
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=record.get("wandb_id", record["run_id"]),  # older folders have no id of their own
            resume="allow",
            dir=folder,
            config=record["identity"],
        )

    @classmethod
    def channel(cls, project: str, folder: Path) -> Channel:
        """Return a run's channel. Raises InputError if the library is missing; other failures drop it later."""
        try:
            importlib.import_module("wandb")
        except ImportError:
            raise InputError("Weights & Biases is not installed: pip install 'isoflop[wandb]'") from None
        except Exception as failure:
            logger.debug("import wandb: %s", failure)  # raised again, and reported, when the channel opens
        return Channel("Weights & Biases", lambda: cls(project, folder))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Log one step."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()
