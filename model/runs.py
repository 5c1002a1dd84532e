"""Read a run directory: its record, its newest parameters, where its data are. `train` writes it."""

import fcntl
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from model.ambient import pinned
from model.checkpoint import newest_params
from model.config import ModelConfig
from model.errors import InputError
from model.records import read_sealed
from model.stack import Params

SCHEMA_VERSION = 1
STATUSES = ("planned", "running", "finished", "diverged", "failed", "interrupted")
UNSEALED = ("status",)  # which may have to be written where there is no room for anything longer


@pinned()
def load_run(folder: str | Path) -> tuple[ModelConfig, Params]:
    """(config, parameters of the newest intact checkpoint). Raises InputError if there is none.

    Nothing else of the checkpoint is read or verified, and nothing in the folder changes. A damaged checkpoint on the
    way is named in a warning.
    """
    from model.transformer import init

    config = ModelConfig.from_dict(read_record(folder)["identity"]["config"])
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    params = newest_params(Path(folder), shapes)
    if params is None:
        raise InputError(f"{folder} has no intact checkpoint; train it first")
    return config, params


def read_record(folder: str | Path) -> dict[str, Any]:
    """`run.json` of a run. Raises InputError if there is none or it is damaged.

    A run that says it is running, though no process holds its folder, was killed: its status reads as interrupted.
    """
    path = Path(folder) / "run.json"
    try:
        record = read_sealed(path, UNSEALED)
    except FileNotFoundError:
        raise InputError(f"{folder} is not a run: it has no run.json") from None
    if record.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is not a run.json of schema version {SCHEMA_VERSION}")
    if record.get("status", "planned") not in STATUSES:
        raise InputError(f"{path} is damaged: its status is not one of {', '.join(STATUSES)}; put back a copy of it")
    if record.get("status") == "running" and not is_held(folder):
        record["status"] = "interrupted"
    return record


def is_held(folder: str | Path) -> bool:
    """Return whether a process has the run open for writing."""
    try:
        with open(Path(folder) / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def data_of(run: str | Path, record: Mapping[str, Any]) -> str | dict[str, str]:
    """Return where the data of a run are, by its `run.json`: where they were, or else where they lay beside the run."""
    places, beside = record["data"], record.get("data_beside")
    if isinstance(places, str):
        return _found(places, beside, Path(run))
    return {name: _found(place, (beside or {}).get(name), Path(run)) for name, place in places.items()}


def data_folder(run: str | Path) -> Path | None:
    """Return the folder of a run's first data, whose tokenizer it used; it may be gone. None: the record names none."""
    record = read_record(run)
    if not record.get("data"):
        return None
    places = data_of(run, record)
    return Path(places if isinstance(places, str) else next(iter(places.values())))


def _found(place: str, beside: str | None, run: Path) -> str:
    if beside is None or Path(place).exists():
        return place
    other = os.path.normpath(run.resolve() / beside)
    return other if Path(other).exists() else place
