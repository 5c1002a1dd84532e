"""The record of a run: `metrics.jsonl`, one JSON object a line, and the same numbers for TensorBoard."""

import json
from pathlib import Path
from typing import Any

from model.errors import InputError
from train.files import write_atomically
from train.hosts import is_writer

TIMING_FIELDS = (
    "seconds",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "data_seconds",
    "dispatch_seconds",
    "device_seconds",
)
"""The only fields that may differ between a resumed run and an uninterrupted one."""


class MetricsLog:
    """Appends lines for steps after `step`; what an earlier process wrote past `step` is cut off first.

    wandb: a Weights & Biases project that gets the same numbers. Of several processes the first writes.
    """

    def __init__(self, folder: Path, step: int, tensorboard_every: int, wandb: str | None = None):
        self._folder, self._step, self._every = folder, step, tensorboard_every
        self._file = self._tensorboard = self._wandb = None  # type: Any
        if not is_writer():
            return
        path = folder / "metrics.jsonl"
        _truncate(path, step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 – lives as long as the run
        if wandb is not None:
            self._wandb = _open_wandb(wandb, folder)

    def write(self, record: dict[str, Any]) -> None:
        """Append one step; every `tensorboard_every` steps, and with every evaluation, to TensorBoard too."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        step: int = record["step"]
        del numbers["step"]
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if step % self._every == 0 or "validation_loss" in record:
            self._write_tensorboard(step, numbers)

    def _write_tensorboard(self, step: int, numbers: dict[str, float]) -> None:
        """All numbers in one event: tensorboardX's SummaryWriter takes half a millisecond for each."""
        from tensorboardX import FileWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        if self._tensorboard is None:
            self._tensorboard = FileWriter(str(self._folder / "tensorboard"))
            first = self._step + 1  # what an earlier process wrote from there on is not to be shown
            self._tensorboard.add_event(Event(step=first, file_version="brain.Event:2"))
            self._tensorboard.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._tensorboard.add_summary(Summary(value=values), step)

    def flush(self) -> None:
        """Hand everything to the operating system: called before a checkpoint that relies on it."""
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Flush and let go of the files."""
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_wandb(project: str, folder: Path) -> Any:
    """A Weights & Biases run of the folder's name, which goes on when the folder's run does."""
    try:
        import wandb
    except ImportError:
        raise InputError("Weights & Biases is not installed: pip install 'isoflop[wandb]'") from None
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return wandb.init(
        project=project, name=folder.name, id=record["run_id"], resume="allow", dir=folder, config=record["identity"]
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; a line cut short by a kill is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    return [record for record in map(_parse, path.read_text(encoding="utf-8").splitlines()) if record is not None]


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
    if len(kept) < len(lines):
        write_atomically(path, "".join(line + "\n" for line in kept))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
