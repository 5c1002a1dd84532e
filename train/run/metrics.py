"""The record of a run: `metrics.jsonl`, one JSON object a line, written by `MetricsLog` and judged whenever it is read.

`run.json` holds a seal: how far the file reached when it was last synced, and the SHA-256 of it up to there. So a line
that was lost, cannot be read or was changed since is noticed and named. Folders from before there were seals are judged
by their steps alone, which follow one another.
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
_Numbered = tuple[int, bytes, dict[str, Any]]  # of a line: its number in the file, its bytes, what they say
logger = logging.getLogger("isoflop")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The lines of a `metrics.jsonl` that can be read, in order, and in words what is wrong with it (None: nothing).

    raw: the same lines as they are written. doubtful: the last step whose line may not say what the run
    wrote; 0 if all agree with the seal.
    """

    lines: list[dict[str, Any]]
    raw: list[str]
    trouble: str | None
    doubtful: int

    def up_to(self, step: int) -> "Metrics":
        """The lines of no later step."""
        count = sum(line["step"] <= step for line in self.lines)
        return Metrics(self.lines[:count], self.raw[:count], self.trouble, min(self.doubtful, step))

    @property
    def seal(self) -> dict[str, Any]:
        """Return what `run.json` says of a file of just these lines."""
        return _seal(self.lines[-1]["step"] if self.lines else 0, "".join(self.raw).encode(), self.doubtful)


def open_metrics(folder: str | Path, step: int = 0) -> Metrics:
    """Read and judge a run's metrics. step: up to which they should reach, where `run.json` does not say.

    A last line that a kill cut short, past what the seal covers, is left out without a word. Raises InputError where
    the file is there but cannot be opened, or `run.json` is damaged.
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
            continue  # the run has cut its record in between
        if not record and (path.parent / ".lock").exists():
            raise InputError(f"{folder} has no run.json any more, which says what a run is; put back a copy of it")
        return _judge(path, content, record, step)


def troubles(folders: Iterable[Path]) -> list[str]:
    """Return what is wrong with the records of these runs, a sentence each; a run that has no folder is passed over."""
    found = []
    for folder in folders:
        try:
            trouble = open_metrics(folder).trouble if folder.is_dir() else None
        except InputError as error:
            trouble = str(error)
        found += [trouble] if trouble else []
    return found


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; a warning names what is missing or cannot be read (see `open_metrics`)."""
    metrics = open_metrics(folder)
    if metrics.trouble:
        logger.warning("%s", metrics.trouble)
    return metrics.lines


class MetricsLog:
    """Appends lines after those of `begin`, what `metrics.jsonl` is cut to first.

    wandb: a Weights & Biases project that gets the same numbers. Of several processes the first writes. A line that the
    disk refuses is an OSError; TensorBoard and Weights & Biases can neither stop nor hold up a run.
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
            write_atomically(aside, there)  # before lines go that might still be read by eye
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
        """Have everything on the disk, and return the seal; called before a checkpoint that relies on it."""
        if self._file is None:
            return {}
        os.fsync(self._file.fileno())
        return _describe(self._step, self._bytes, self._sha256.hexdigest(), self._doubtful)

    def close(self) -> None:
        """Let go of the files."""
        if self._file is not None:
            self._file.close()
        for channel in self._channels:
            channel.close()


def _seal(step: int, content: bytes, doubtful: int) -> dict[str, Any]:
    return _describe(step, len(content), hashlib.sha256(content).hexdigest(), doubtful)


def _describe(step: int, size: int, sha256: str, doubtful: int) -> dict[str, Any]:
    return {"step": step, "bytes": size, "sha256": sha256, "doubtful": doubtful}


def _judge(path: Path, content: bytes | None, record: dict[str, Any], step: int) -> Metrics:
    text, seal = content or b"", record.get("metrics")
    if not seal:  # of a folder from before there were seals
        ended = record.get("status") in ("finished", "diverged")
        seal = _seal(record.get("step", 0) if ended else 0, b"", 0)
    intact = hashlib.sha256(text[: seal["bytes"]]).hexdigest() == seal["sha256"]
    doubtful = seal["doubtful"] if intact else seal["step"]
    pieces = text.split(b"\n")
    if not pieces[-1] or len(text) > seal["bytes"]:
        del pieces[-1]  # nothing, or what a kill cut short
    parsed = [(number, piece, _parse(piece)) for number, piece in enumerate(pieces, start=1)]
    whole = _in_order([(number, piece, line) for number, piece, line in parsed if line is not None])
    damaged = sorted({number for number, _, _ in parsed} - {number for number, _, _ in whole})
    there = {line["step"] for _, _, line in whole}
    first = 1 + ((record.get("identity") or {}).get("branch") or {"step": 0})["step"]
    missing = [number for number in range(first, max(step, seal["step"], *there, 0) + 1) if number not in there]
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
    """One step's numbers, and the names of its phase and the like; None where they cannot be read."""
    try:
        record = json.loads(line.decode())
        plain = all(value is None or isinstance(value, (int, float, str)) for value in record.values())
        known = not isinstance(record["loss"], str) and all(math.isfinite(record[name]) for name in _NEEDED)
        return record if plain and known and isinstance(record["step"], int) and record["step"] > 0 else None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        return None


def _in_order(lines: list[_Numbered]) -> list[_Numbered]:
    """The lines whose steps rise; one that has jumped ahead goes, and not all those behind it."""
    kept: list[_Numbered] = []
    for index, (number, raw, line) in enumerate(lines):
        before = kept[-1][2]["step"] if kept else 0
        following = lines[index + 1][2]["step"] if index + 1 < len(lines) else line["step"]
        if line["step"] > before and not before < following < line["step"]:
            kept.append((number, raw, line))
    return kept


def _ranges(name: str, numbers: list[int]) -> str:
    """`steps 3, 7–9` of the rising numbers 3, 7, 8, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}–{last}" for first, last in runs[:5]]
    more = f" and {len(runs) - 5} more stretches" if len(runs) > 5 else ""
    return f"{name}{'s' if len(numbers) > 1 else ''} {', '.join(shown)}{more}"
