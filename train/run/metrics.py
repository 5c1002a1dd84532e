"""Write and read the record of a run, `metrics.jsonl`: one JSON object per line, checked whenever it is read.

`run.json` holds a seal: how far the file reached when it was last synced, and the SHA-256 of that part. A line that was
lost, cannot be read or has been changed since is thereby detected and reported. Folders from before there were seals
are checked by their step numbers alone, which must be consecutive.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.errors import InputError
from train.channels import Channel, TensorBoard, WandB
from train.files import write_all, write_atomically
from train.hosts import is_writer
from train.run import read_record

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
NAME = "metrics.jsonl"
_NEEDED = ("step", "tokens", "flops_6nd")  # numbers in every line; `loss` is there too, but may be null
_Numbered = tuple[int, bytes, dict[str, Any]]  # a line: its number in the file, its bytes, its parsed content
logger = logging.getLogger("isoflop")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Readable lines of a `metrics.jsonl`, in order, and a description of what is wrong with it (None: nothing).

    raw: the same lines as they are in the file. doubtful: the last step whose line may not be what the run wrote; 0 if
    all lines match the seal.
    """

    lines: list[dict[str, Any]]
    raw: list[str]
    trouble: str | None
    doubtful: int

    def up_to(self, step: int) -> "Metrics":
        """Return the metrics without the lines of later steps."""
        count = sum(line["step"] <= step for line in self.lines)
        return Metrics(self.lines[:count], self.raw[:count], self.trouble, min(self.doubtful, step))

    @property
    def seal(self) -> dict[str, Any]:
        """Return the seal in `run.json` of a file that holds just these lines."""
        return _seal(self.lines[-1]["step"] if self.lines else 0, "".join(self.raw).encode(), self.doubtful)


def open_metrics(folder: str | Path, step: int = 0) -> Metrics:
    """Read and check a run's metrics. step: the step they should reach, if `run.json` does not say.

    A last line that a kill cut short, past what the seal covers, is dropped silently. Raises InputError if the file
    exists but cannot be opened, or if `run.json` is damaged.
    """
    path = Path(folder) / NAME
    while True:
        record = read_record(folder) if (path.parent / "run.json").exists() else {}
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        if record and read_record(folder).get("metrics") != record.get("metrics"):
            continue  # the run truncated its record between the two reads
        if not record and (path.parent / ".lock").exists():
            raise InputError(f"{folder} has no run.json any more, which says what a run is; put back a copy of it")
        return _judge(path, content, record, step)


def troubles(folders: Iterable[Path]) -> list[str]:
    """Return what is wrong with the records of these runs, one sentence each; runs without a folder are skipped."""
    found = []
    for folder in folders:
        try:
            trouble = open_metrics(folder).trouble if folder.is_dir() else None
        except InputError as error:
            trouble = str(error)
        if trouble:
            found.append(trouble)
    return found


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the readable lines of a run's metrics; a warning reports what is missing or damaged (`open_metrics`)."""
    metrics = open_metrics(folder)
    if metrics.trouble:
        logger.warning("%s", metrics.trouble)
    return metrics.lines


class MetricsLog:
    """Append lines to `metrics.jsonl`, which is first truncated to the lines of `begin`.

    wandb: a Weights & Biases project that gets the same numbers. With several processes process 0 writes. A line that
    cannot be written raises OSError; TensorBoard and Weights & Biases can neither stop nor delay a run.
    """

    def __init__(self, folder: Path, begin: Metrics, tensorboard_every: int, wandb: str | None = None):
        self._every, self._file = tensorboard_every, None  # type: int, Any
        self._channels: list[Channel] = []
        if not is_writer():
            return
        path, content = folder / NAME, "".join(begin.raw).encode()
        there = path.read_bytes() if path.exists() else b""
        aside = folder / "damaged" / NAME
        if begin.trouble and there and not (aside.exists() and there.startswith(content)):
            write_atomically(aside, there)  # a person may still be able to read the lines that are dropped
        if there != content:
            write_atomically(path, content)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 – lives as long as the run
        self._step, self._doubtful = begin.seal["step"], begin.doubtful
        self._bytes, self._sha256 = len(content), hashlib.sha256(content)
        first = self._step + 1
        self._tensorboard = Channel("TensorBoard", lambda: TensorBoard(folder / "tensorboard", first))
        self._channels.append(self._tensorboard)
        if wandb is not None:
            self._channels.append(WandB.channel(wandb, folder))

    def write(self, record: dict[str, Any]) -> None:
        """Append one step; every `tensorboard_every` steps, and with every evaluation, to TensorBoard too."""
        if self._file is None:
            return
        line = (json.dumps(record) + "\n").encode()
        write_all(self._file, line)
        self._bytes += len(line)
        self._sha256.update(line)
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        del numbers["step"]
        self._step = step = record["step"]
        for channel in self._channels:
            if channel is not self._tensorboard or step % self._every == 0 or "validation_loss" in record:
                channel.write(step, numbers)

    def sync(self) -> dict[str, Any]:
        """Sync the file to the disk and return its seal; called before a checkpoint that relies on it."""
        if self._file is None:
            return {}
        os.fsync(self._file.fileno())
        return _describe(self._step, self._bytes, self._sha256.hexdigest(), self._doubtful)

    def close(self) -> None:
        """Close the file and the channels."""
        if self._file is not None:
            self._file.close()
        for channel in self._channels:
            channel.close()


def _seal(step: int, content: bytes, doubtful: int) -> dict[str, Any]:
    return _describe(step, len(content), hashlib.sha256(content).hexdigest(), doubtful)


def _describe(step: int, size: int, sha256: str, doubtful: int) -> dict[str, Any]:
    return {"step": step, "bytes": size, "sha256": sha256, "doubtful": doubtful}


def _judge(path: Path, content: bytes | None, record: dict[str, Any], step: int) -> Metrics:
    """Compare the content of a `metrics.jsonl` (None: there is no file) with the seal of its `run.json`."""
    text, seal = content or b"", record.get("metrics")
    if not seal:  # a folder from before there were seals
        ended = record.get("status") in ("finished", "diverged")
        seal = _seal(record.get("step", 0) if ended else 0, b"", 0)
    intact = hashlib.sha256(text[: seal["bytes"]]).hexdigest() == seal["sha256"]
    doubtful = seal["doubtful"] if intact else seal["step"]
    pieces = text.split(b"\n")
    if not pieces[-1] or len(text) > seal["bytes"]:
        del pieces[-1]  # empty, or a line that a kill cut short
    parsed = [(number, piece, _parse(piece)) for number, piece in enumerate(pieces, start=1)]
    whole = _in_order([(number, piece, line) for number, piece, line in parsed if line is not None])
    damaged = sorted({number for number, _, _ in parsed} - {number for number, _, _ in whole})
    there = {line["step"] for _, _, line in whole}
    branch = (record.get("identity") or {}).get("branch")
    first = branch["step"] + 1 if branch else 1  # a branch at step 100 records its steps from 101 on
    last = max(step, seal["step"], *there, 0)
    missing = [number for number in range(first, last + 1) if number not in there]
    trouble = []
    if content is None and missing:
        trouble.append("the file is missing")
    if damaged:
        trouble.append(f"{_ranges('line', damaged)} cannot be read")
    if missing:
        trouble.append(f"{_ranges('step', missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if doubtful and text:
        trouble.append(f"up to step {doubtful} it is not what the run wrote (its checksum differs)")
    return Metrics(
        lines=[line for _, _, line in whole],
        raw=[piece.decode() + "\n" for _, piece, _ in whole],
        trouble=f"{path}: {'; '.join(trouble)}" if trouble else None,
        doubtful=doubtful,
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a line: a step's numbers, and names such as its phase; None if they cannot be read."""
    try:
        record = json.loads(line.decode())
        plain = all(value is None or isinstance(value, (int, float, str)) for value in record.values())
        known = not isinstance(record["loss"], str) and all(math.isfinite(record[name]) for name in _NEEDED)
        return record if plain and known and isinstance(record["step"], int) and record["step"] > 0 else None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        return None


def _in_order(lines: list[_Numbered]) -> list[_Numbered]:
    """Return the lines whose steps rise; a line that jumps ahead is dropped, instead of all lines after it.

    Example: of the steps 1, 2, 90, 3, 4 the line of step 90 is dropped.
    """
    kept: list[_Numbered] = []
    for index, (number, raw, line) in enumerate(lines):
        before = kept[-1][2]["step"] if kept else 0
        following = lines[index + 1][2]["step"] if index + 1 < len(lines) else line["step"]
        if line["step"] > before and not before < following < line["step"]:
            kept.append((number, raw, line))
    return kept


def _ranges(name: str, numbers: list[int]) -> str:
    """Return `steps 3, 7–9` for the rising numbers 3, 7, 8, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}–{last}" for first, last in runs[:5]]
    more = f" and {len(runs) - 5} more stretches" if len(runs) > 5 else ""
    return f"{name}{'s' if len(numbers) > 1 else ''} {', '.join(shown)}{more}"
