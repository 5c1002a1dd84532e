"""The run directory: what a run is and how it went. `model.runs` reads it."""

import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import time
from pathlib import Path
from typing import Any

import jax

from model import ModelConfig, Params
from model.errors import InputError
from model.runs import SCHEMA_VERSION, UNSEALED, load_run, read_record
from model.runs import is_held as is_held
from train.checksums import write_sealed
from train.config import HParams, TrainConfig
from train.files import is_full, write_all
from train.hosts import agree, is_writer
from train.schedule import uses_horizon

ROUNDING_ONLY = ("accumulate", "loss_chunks", "norms")
"""Fields of the TrainConfig that may differ when a run is resumed: they change no number but by rounding."""


class BusyError(InputError):
    """Another process writes this run."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """All that decides a run's numbers. The versions of libraries and the number of steps are not part of it."""

    config: ModelConfig
    train_config: TrainConfig
    hparams: HParams
    data_hash: str | dict[str, str]
    branch: dict[str, Any] | None = None  # which run it leaves, and after how many steps

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the horizon only where the schedule reads it, and nothing that changes rounding alone."""
        hparams, train_config = self.hparams.to_dict(), self.train_config.to_dict()
        for name in ROUNDING_ONLY:
            del train_config[name]
        if not uses_horizon(self.train_config, self.hparams):
            del hparams["total_steps"]
        if hparams["data_seed"] < 0:  # then `seed` says it all, as in runs from before there was another
            del hparams["data_seed"]
        return {
            "config": json.loads(json.dumps(self.config.to_dict())),
            "train_config": train_config,
            "hparams": hparams,
            "data": self.data_hash,
            **({"branch": self.branch} if self.branch else {}),
        }

    @property
    def run_id(self) -> str:
        """The hash that names the run, wherever its folder is."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


class Run:
    """An open run directory. One program at a time: a second one is refused. Of several processes the first writes."""

    def __init__(self, folder: Path, identity: Identity):
        self.folder, self.identity = Path(folder), identity
        self._lock: Any = None
        self.record: dict[str, Any] = agree(self._open)

    def update(self, **fields: Any) -> None:
        """Change fields of `run.json`, atomically."""
        self.record |= fields
        if is_writer():
            write_sealed(self.folder / "run.json", self.record, UNSEALED)

    def fail(self) -> None:
        """Note that an exception stopped it; on a full disk only the status is overwritten, in place."""
        try:
            self.update(status="failed")
        except OSError as error:  # what went wrong is raised by the caller
            if is_full(error):
                _overwrite_status(self.folder / "run.json", "failed")

    def close(self) -> None:
        """Let another program open it."""
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> dict[str, Any]:
        record = self._read_or_make()
        self._lock = self._take_lock()
        return record

    def _read_or_make(self) -> dict[str, Any]:
        path, identity = self.folder / "run.json", self.identity
        if path.exists():
            record = read_record(self.folder)
            if record["run_id"] != identity.run_id:
                raise InputError(
                    f"{self.folder} holds a run with another configuration: "
                    f"{_difference(record['identity'], identity.to_dict())}; choose another folder or that setting"
                )
            return record
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; a run needs a folder of its own")
        if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty and has no run.json; choose another folder for the run")
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "schema_version": SCHEMA_VERSION,
            "run_id": identity.run_id,
            "identity": identity.to_dict(),
            "hparams": identity.hparams.to_dict(),
            "seed": int(identity.hparams.seed),
            "status": "planned",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "device": describe_device(),
            "step": 0,
            "seconds": 0.0,
            "compile_seconds": 0.0,
            "rollbacks": [],
            "result": None,
            "wandb_id": secrets.token_hex(8),  # of the folder: another one with this run is another run there
        }
        write_sealed(path, record, UNSEALED)
        return record

    def _take_lock(self) -> Any:
        lock = open(self.folder / ".lock", "w")  # noqa: SIM115 – held until close; the kernel frees it on a kill
        for remaining in reversed(range(5)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                if remaining:  # one that only looks whether a process holds it (`is_held`) has it for microseconds
                    time.sleep(0.02)
        lock.close()
        raise BusyError(f"{self.folder} is being written by another process; wait for it or stop it")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run went.

    status: finished, diverged or interrupted. loss: training cross-entropy of the last step, nats per token.
    validation_loss: on the fixed validation tokens at the run's end (None unless finished). epochs: passes over
    the training data; above 1 tokens were repeated. flops_6nd and flops_exact: of the whole run, by convention
    (see model/accounting.py), the trunk's part of a branch included; branch_step: the steps of that part, which the
    trunk has been charged for. skipped: steps that were not finite. seconds: training time without compilation, over
    all restarts.
    """

    run: Path
    status: str
    steps: int
    tokens: int
    epochs: float
    parameters: int
    flops_6nd: float
    flops_exact: float
    loss: float | None
    validation_loss: float | None
    seconds: float
    compile_seconds: float
    skipped: int = 0
    rollbacks: int = 0
    branch_step: int = 0

    @property
    def params(self) -> Params:
        """The parameters of the run's newest checkpoint."""
        return load_run(self.run)[1]


def _overwrite_status(path: Path, status: str) -> None:
    """Replace the status in place by a word that is no longer, which needs no room on the disk."""
    content = path.read_bytes()
    found = re.search(rb'"status": "(\w+)"', content)
    if found and len(found[1]) >= len(status):
        with open(path, "r+b", buffering=0) as file:
            file.seek(found.start())
            write_all(file, f'"status": "{status}"'.encode().ljust(len(found[0])))
            os.fsync(file.fileno())


def describe_device() -> dict[str, Any]:
    """The kind and count of devices that JAX sees."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def versions() -> dict[str, str]:
    """Of Python and of the libraries whose numerics a run depends on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    lines = []
    for part in new:
        if not isinstance(new[part], dict):
            if old.get(part) != new[part]:
                lines.append(f"{part} {old.get(part)} there, {new[part]} here")
            continue
        before = old.get(part, {})
        for name in sorted(before.keys() | new[part].keys()):
            if before.get(name) != new[part].get(name):
                lines.append(f"{name}={before.get(name)} there, {new[part].get(name)} here")
    return ", ".join(lines)
