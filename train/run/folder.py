"""Write the run directory: what a run is and how it went. `model.runs` reads it."""

import dataclasses
import datetime
import fcntl
import importlib.metadata
import os
import platform
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from model import Execution, Params
from model.errors import InputError
from model.execution import FIELDS as EXECUTION
from model.records import check_output_folder
from model.runs import SCHEMA_VERSION, UNSEALED, load_run, read_record
from model.runs import is_held as is_held
from train.checksums import write_sealed
from train.files import is_full, write_all
from train.hosts import agree, is_writer
from train.recipe import Recipe, difference, former_execution


class BusyError(InputError):
    """Raised if another process is writing the run."""


class Run:
    """Hold a run directory open for one program; a second one gets BusyError. Of several processes process 0 writes."""

    def __init__(self, folder: Path, recipe: Recipe, execution: Execution = Execution()):
        self.folder, self.recipe, self.execution = Path(folder), recipe, execution
        self._lock: Any = None
        self.record: dict[str, Any] = agree(self._open)

    def update(self, **fields: Any) -> None:
        """Change fields of `run.json`, atomically."""
        self.record |= fields
        if is_writer():
            write_sealed(self.folder / "run.json", self.record, UNSEALED)

    def begin(self, step: int) -> str | None:
        """Record that training continues from a step; return how the execution differs from the one before, if it does.

        Steps after it are trained again, so executions that began later are removed from the record.
        """
        held = [(first, execution) for first, execution in executions(self.record, self.execution) if first < step]
        before = held[-1][1] if held else self.execution
        if not held or before != self.execution:
            held.append((step, self.execution))
        rows = [{"from_step": first, **execution.to_dict()} for first, execution in held]
        self.record.pop("stopped_early", None)
        self.update(status="running", executions=rows)
        now, old = self.execution.to_dict(), before.to_dict()
        changes = (f"{name}={now[name]} instead of {old[name]}" for name in EXECUTION if now[name] != old[name])
        return ", ".join(changes) or None

    def fail(self) -> None:
        """Record that an exception stopped the run; on a full disk only the status is overwritten, in place."""
        try:
            self.update(status="failed")
        except OSError as error:  # the caller raises what stopped the run
            if is_full(error):
                _overwrite_status(self.folder / "run.json", "failed")

    def close(self) -> None:
        """Release the lock, so that another program can open the run."""
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> dict[str, Any]:
        record = self._read_or_make()
        self._lock = self._take_lock()
        return record

    def _read_or_make(self) -> dict[str, Any]:
        path, recipe = self.folder / "run.json", self.recipe
        if path.exists():
            record = read_record(self.folder)
            if differences := difference(recipe_of(record), recipe):
                raise InputError(
                    f"{self.folder} holds a run with another configuration: {differences}; choose another folder or "
                    "that setting"
                )
            return record
        check_output_folder(
            self.folder, "a run", "has no run.json", "choose another folder for the run", ignore_hidden=True
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "schema_version": SCHEMA_VERSION,
            "run_id": recipe.run_id,
            "identity": recipe.identity,
            "hparams": recipe.hparams.to_dict(),
            "seed": int(recipe.hparams.seed),
            "status": "planned",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "device": describe_device(),
            "step": 0,
            "seconds": 0.0,
            "compile_seconds": 0.0,
            "rollbacks": [],
            "executions": [],
            "result": None,
            "wandb_id": secrets.token_hex(8),  # a run trained in a second folder is a run of its own there
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
                if remaining:  # `is_held` takes the lock for microseconds to see whether it is free
                    time.sleep(0.02)
        lock.close()
        raise BusyError(f"{self.folder} is being written by another process; wait for it or stop it")


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a run.

    status: finished, diverged or interrupted. loss: training cross-entropy of the last step, nats per token.
    validation_loss: on the fixed validation tokens at the run's end (None unless finished). epochs: passes over
    the training data; above 1 tokens were repeated. flops_6nd and flops_exact: of the whole run, by convention
    (see model/accounting.py); for a branch this includes the base run's steps up to branch_step, which the base run
    counts too. skipped: steps that were not finite. seconds: training time without compilation, over all restarts.
    stopped_early: for a run that ended because of its patience: the metric, its best value and the step of that value
    (None and 0 if no validation was finite), and the patience.
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
    stopped_early: dict[str, Any] | None = None

    @property
    def params(self) -> Params:
        """Return the parameters of the run's newest checkpoint."""
        return load_run(self.run)[1]


def recipe_of(record: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a run from its `run.json`."""
    return Recipe.from_dict({**record["identity"], "hparams": record["hparams"]})


def executions(record: Mapping[str, Any], otherwise: Execution = Execution()) -> list[tuple[int, Execution]]:
    """Return the executions of a run from its `run.json`, in order: (the step each one began at, the execution).

    otherwise: has the fields, such as microbatches and mesh, that older versions did not record.
    """
    if "executions" not in record:  # older versions kept it among the configs' fields
        return [(0, former_execution(record["identity"], otherwise))]
    rows = (dict(row) for row in record["executions"])
    return [(row.pop("from_step"), Execution.from_dict(row)) for row in rows]


def _overwrite_status(path: Path, status: str) -> None:
    """Overwrite the status in place by a word of at most its length, which needs no room on the disk."""
    content = path.read_bytes()
    found = re.search(rb'"status": "(\w+)"', content)
    if found and len(found[1]) >= len(status):
        with open(path, "r+b", buffering=0) as file:
            file.seek(found.start())
            write_all(file, f'"status": "{status}"'.encode().ljust(len(found[0])))
            os.fsync(file.fileno())


def describe_device() -> dict[str, Any]:
    """Return the platform, kind and count of the devices that JAX sees."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries whose numerics a run depends on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
