"""The record of a run: `metrics.jsonl`, one JSON object a line, and the same numbers for TensorBoard."""

import json
from pathlib import Path
from typing import Any

from train.files import write_atomically

TIMING_FIELDS = ("seconds", "tokens_per_second")
"""The only fields that may differ between a resumed run and an uninterrupted one."""


class MetricsLog:
    """Appends lines for steps after `step`; what an earlier process wrote past `step` is cut off first."""

    def __init__(self, folder: Path, step: int, tensorboard_every: int):
        self._path = folder / "metrics.jsonl"
        _truncate(self._path, step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 – lives as long as the run
        self._folder, self._step, self._every = folder, step, tensorboard_every
        self._tensorboard: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Append one step; every `tensorboard_every` steps, and with every evaluation, to TensorBoard too."""
        self._file.write(json.dumps(record) + "\n")
        if record["step"] % self._every == 0 or "validation_loss" in record:
            if self._tensorboard is None:
                from tensorboardX import SummaryWriter

                self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._step + 1)
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Hand everything to the operating system: called before a checkpoint that relies on it."""
        self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and let go of the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


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
