"""Read a run directory, which `train` writes: its record, its newest parameters, the path of its data."""

import fcntl
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from model.ambient import pinned
from model.checkpoint import newest_params, parameters_sha256
from model.config import ModelConfig
from model.errors import InputError
from model.records import read_sealed
from model.stack import Params

if TYPE_CHECKING:
    from model.adapters import Adapter

SCHEMA_VERSION = 1
STATUSES = ("planned", "running", "finished", "diverged", "failed", "interrupted")
logger = logging.getLogger("isoflop")
UNSEALED = ("status",)  # not under the checksum, so that it can be changed on a full disk


@pinned()
def load_run(folder: str | Path, base: str | Path | None = None) -> tuple[ModelConfig, Params]:
    """Return (config, parameters) of the newest intact checkpoint.

    Only the parameters of the checkpoint are read and verified, and nothing in the folder changes. Newer checkpoints
    that are damaged are named in a warning. The config is that of the checkpoint: phases may have changed its
    rope_base.

    base: the path of the weights that the run started from, for a run that holds only its trained parameters, or, if it
    started from such a run, the path of the weights that that run started from; None: the recorded path. Raises
    InputError if there is no intact checkpoint, if the base has other weights, or if a base is given for a run that
    holds a whole model.
    """
    record = read_record(folder)
    objective = record["identity"].get("objective") or {}
    if objective.get("adapter"):
        config, adapter, factors, others = _load_trained(folder)
        whole = _overlay(_base_of(Path(folder), record, base), others)
        return config, _with_adapter(whole, adapter, factors, objective.get("base_weights"))
    config, params = _saved(folder, record)
    if objective.get("trainable"):
        return config, _overlay(_base_of(Path(folder), record, base), params)
    if base is not None:
        raise InputError(f"{folder} holds a whole model and needs no base; leave --base out (base of open_model)")
    return config, params


@pinned()
def load_config(folder: str | Path) -> ModelConfig:
    """Return the config of `load_run`, without reading the base of a run that holds only its trained parameters."""
    record = read_record(folder)
    if (record["identity"].get("objective") or {}).get("adapter"):
        return load_adapter(folder)[0]
    return _saved(folder, record)[0]


@pinned()
def load_adapter(folder: str | Path) -> "tuple[ModelConfig, Adapter, Params]":
    """Return (config of the base, adapter, newest intact factors) of a run that trains an adapter.

    The adapter has the run's own rank and alpha, also where the run was a lane of a program with a larger rank. Raises
    InputError if the run trains no adapter or has no intact checkpoint.
    """
    config, used, factors, _ = _load_trained(folder)
    return config, used, factors


def _load_trained(folder: str | Path) -> "tuple[ModelConfig, Adapter, Params, Params]":
    """Return what `load_adapter` does, and the parameters that were trained beside the adapter, such as a head."""
    from model.adapters import Adapter, divide, first_columns, init_adapter
    from model.transformer import init

    record = read_record(folder)
    config, hparams = ModelConfig.from_dict(record["identity"]["config"]), record["hparams"]
    values = (record["identity"].get("objective") or {}).get("adapter")
    if not values:
        raise InputError(f"{folder} trains no adapter; train one with `isoflop train MODEL --lora RANK`")
    largest = Adapter.from_dict(dict(values))

    def init_all(key: jax.Array) -> Params:
        params = init(config, key)
        return _overlay(params, init_adapter(config, largest, params, key))

    about, tree = _newest(folder, jax.eval_shape(init_all, jax.random.key(0)), True)
    factors, others = divide(tree)
    rank, alpha = hparams.get("lora_rank") or largest.rank, hparams.get("lora_alpha") or largest.alpha
    used = largest.replace(rank=int(rank), alpha=float(alpha))
    return config.replace(**about.get("config", {})), used, first_columns(factors, used.rank), others


def _saved(folder: str | Path, record: Mapping[str, Any]) -> tuple[ModelConfig, Params]:
    """Return the config and the parameters of the newest intact checkpoint, without those of the base."""
    from model.transformer import init

    config = ModelConfig.from_dict(record["identity"]["config"])
    partial = bool((record["identity"].get("objective") or {}).get("trainable"))
    about, params = _newest(folder, jax.eval_shape(functools.partial(init, config), jax.random.key(0)), partial)
    changes = about["config"] if "config" in about else _last_changes(folder, record, about)
    return config.replace(**changes), params


def _newest(folder: str | Path, like: Params, partial: bool) -> tuple[dict[str, Any], Params]:
    found = newest_params(Path(folder), like, partial=partial)
    if found is None:
        raise InputError(f"{folder} has no intact checkpoint; train it first")
    return found


def _with_adapter(base: Params, adapter: "Adapter", tree: Params, kind: str | None) -> Params:
    """Return the base, stored as during training (kind), with the adapter merged into its matrices."""
    from model.adapters import attach, mask_and_scale
    from model.quantize import quantize_layers
    from model.weights import LowRank, is_weight

    def merge(leaf: Any) -> Any:
        return _merged(leaf) if isinstance(leaf, LowRank) else leaf

    base = base if kind is None else quantize_layers(base, kind)
    return jax.tree.map(merge, attach(base, tree, *mask_and_scale(adapter)), is_leaf=is_weight)


def _merged(weight: Any) -> np.ndarray:
    """Return the matrices of a `LowRank`, base + a @ b, with the same bits on every machine.

    A run that starts from them records their hash, and the order of summation in a matrix product depends on the
    device: here columns of `a` are added one after another.
    """
    from model.weights import is_weight, plain

    base, a, b = weight.base, np.asarray(weight.a), np.asarray(weight.b)
    if is_weight(base):
        widen: Callable = plain
        for _ in range(a.ndim - 2):
            widen = jax.vmap(widen)
        base = widen(base)
    a = a * (np.asarray(weight.mask) * np.asarray(weight.scale)[..., None])[..., None, :]
    change = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    for column in range(a.shape[-1]):
        change += a[..., column, None] * b[..., None, column, :]
    return np.asarray(base, np.float32) + change


def _base_of(folder: Path, record: Mapping[str, Any], given: str | Path | None) -> Params:
    """Return the parameters that a run started from. Raises InputError if they are missing or have another hash.

    given: their path now, or that of the weights which the base, a run itself, started from.
    """
    from model.store import open_parameters

    sha256, recorded = record["identity"]["weights"], weights_of(folder, record)
    place = Path(str(recorded) if given is None else given)
    remedy = (
        "give where they are with --base PATH (base=PATH of open_model), or first write the whole model with "
        f"`isoflop model convert {folder} OUT --base PATH`"
    )
    if not place.exists() and given is None:
        raise InputError(
            f"{folder} holds only what it trained, and the weights that it started from are not at {place} any more; "
            f"{remedy}"
        )
    params = open_parameters(place)[1]
    if given is not None and _needs_base(recorded) and parameters_sha256(params) != sha256:
        place = Path(str(recorded))
        params = open_parameters(place, given)[1]
    if parameters_sha256(params) != sha256:
        raise InputError(f"{place} holds other weights than those that {folder} started from; {remedy}")
    return params


def _needs_base(place: str | None) -> bool:
    """Return whether the path is a run that holds only its trained parameters."""
    if place is None or not (Path(place) / "run.json").is_file():
        return False
    objective = read_record(place)["identity"].get("objective") or {}
    return bool(objective.get("adapter") or objective.get("trainable"))


def _overlay(base: Params, params: Params) -> Params:
    """Return the base with the leaves of `params` in place of its own, and those that it does not have."""
    merged = dict(base)
    for name, value in params.items():
        there = base.get(name)
        merged[name] = _overlay(there, value) if isinstance(value, dict) and isinstance(there, dict) else value
    return merged


def _last_changes(folder: str | Path, record: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields that a run's phases changed, for a checkpoint of an older version without them.

    The last checkpoint of a finished run has the changes of the last phase. For other checkpoints they are unknown: a
    warning is logged and {} is returned.
    """
    bases = [phase["rope_base"] for phase in record["identity"]["train_config"]["phases"] if phase.get("rope_base")]
    if not bases:
        return {}
    if record["status"] == "finished" and about["step"] == record["step"]:
        return {"rope_base": bases[-1]}
    logger.warning(
        "%s changes rope_base in its phases, and an older version did not record which one is used at step %d: the "
        "model's own is taken; train the run to its end with this version",
        folder,
        about["step"],
    )
    return {}


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the content of a run's `run.json`. Raises InputError if it is missing or damaged.

    The status "running" becomes "interrupted" where no process holds the folder's lock: the run was killed.
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
    """Return whether a process holds the run's lock for writing."""
    try:
        with open(Path(folder) / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def data_of(run: str | Path, record: Mapping[str, Any]) -> str | dict[str, str]:
    """Return the path of a run's data, of a mixture {source: path}, by its `run.json`.

    It is the recorded path, or where that does not exist, the recorded path relative to the run.
    """
    paths, relative = record["data"], record.get("data_beside")
    if isinstance(paths, str):
        return _existing(paths, relative, Path(run))
    return {name: _existing(path, (relative or {}).get(name), Path(run)) for name, path in paths.items()}


def weights_of(run: str | Path, record: Mapping[str, Any]) -> str | None:
    """Return the path of the weights that a run started from, found as by `data_of`, or None."""
    path = record.get("weights")
    return None if path is None else _existing(path, record.get("weights_beside"), Path(run))


def data_folder(run: str | Path) -> Path | None:
    """Return the folder of a run's first data source, which holds the run's tokenizer; None: the record names none.

    The folder need not exist any more. Where it now holds other data, whose tokenizer may differ, a warning is logged.
    """
    record = read_record(run)
    if not record.get("data"):
        return None
    paths, hashes = data_of(run, record), record.get("identity", {}).get("data")
    name, path = ("", paths) if isinstance(paths, str) else next(iter(paths.items()))
    trained_on = hashes.get(name) if isinstance(hashes, Mapping) else hashes
    folder = Path(path)
    found = _manifest_hash(folder)
    if trained_on and found and found != trained_on:
        logger.warning(
            "%s holds other data now than %s was trained on, and maybe another tokenizer; put the former folder back, "
            "or give the tokenizer itself",
            folder,
            run,
        )
    return folder


def _manifest_hash(folder: Path) -> str | None:
    """Return the hash in a data folder's manifest; None if there is no manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest.get("hash") if isinstance(manifest, dict) else None


def _existing(path: str, relative: str | None, run: Path) -> str:
    """Return the path relative to the run if only that exists, otherwise `path`."""
    if relative is None or Path(path).exists():
        return path
    other = os.path.normpath(run.resolve() / relative)
    return other if Path(other).exists() else path
