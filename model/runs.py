"""Read a run directory: its record, its newest parameters, where its data are. `train` writes it."""

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
UNSEALED = ("status",)  # which may have to be written where there is no room for anything longer


@pinned()
def load_run(folder: str | Path, base: str | Path | None = None) -> tuple[ModelConfig, Params]:
    """(config, parameters of the newest intact checkpoint). Raises InputError if there is none.

    Nothing else of the checkpoint is read or verified, and nothing in the folder changes. A damaged checkpoint on the
    way is named in a warning. The config is the one at that checkpoint: phases may have changed its rope_base.
    base: where the weights lie that the run started from, for one that holds only what it trained, or where that is
    such a run too, those that it started from; None: where they lay. Raises InputError where they are others, and on a
    base for a run that holds a whole model.
    """
    record = read_record(folder)
    objective = record["identity"].get("objective") or {}
    if objective.get("adapter"):
        config, adapter, factors, others = _load_trained(folder)
        whole = _over(_base_of(Path(folder), record, base), others)
        return config, _with_adapter(whole, adapter, factors, objective.get("base_weights"))
    config, params = _own(folder, record)
    if objective.get("trainable"):
        return config, _over(_base_of(Path(folder), record, base), params)
    if base is not None:
        raise InputError(f"{folder} holds a whole model and needs no base; leave --base out (base of open_model)")
    return config, params


@pinned()
def load_config(folder: str | Path) -> ModelConfig:
    """Return the config that `load_run` does, without the base of a run that holds only what it trained."""
    record = read_record(folder)
    if (record["identity"].get("objective") or {}).get("adapter"):
        return load_adapter(folder)[0]
    return _own(folder, record)[0]


@pinned()
def load_adapter(folder: str | Path) -> "tuple[ModelConfig, Adapter, Params]":
    """(config of the base, the adapter as it is used, its newest intact factors) of a run that trains one.

    A lane of a smaller rank gives that rank alone. Raises InputError where the run trains no adapter, or has no intact
    checkpoint.
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
    fresh = lambda key: _over(init(config, key), init_adapter(config, largest, init(config, key), key))
    about, tree = _newest(folder, jax.eval_shape(fresh, jax.random.key(0)), True)
    factors, others = divide(tree)
    rank, alpha = hparams.get("lora_rank") or largest.rank, hparams.get("lora_alpha") or largest.alpha
    used = largest.replace(rank=int(rank), alpha=float(alpha))
    return config.replace(**about.get("config", {})), used, first_columns(factors, used.rank), others


def _own(folder: str | Path, record: Mapping[str, Any]) -> tuple[ModelConfig, Params]:
    """Return the config at the newest intact checkpoint, and the parameters that it holds."""
    from model.transformer import init

    config = ModelConfig.from_dict(record["identity"]["config"])
    partial = bool((record["identity"].get("objective") or {}).get("trainable"))
    about, params = _newest(folder, jax.eval_shape(functools.partial(init, config), jax.random.key(0)), partial)
    return config.replace(**(about["config"] if "config" in about else _as_phases_end(folder, record, about))), params


def _newest(folder: str | Path, like: Params, partial: bool) -> tuple[dict[str, Any], Params]:
    found = newest_params(Path(folder), like, partial=partial)
    if found is None:
        raise InputError(f"{folder} has no intact checkpoint; train it first")
    return found


def _with_adapter(base: Params, adapter: "Adapter", tree: Params, kind: str | None) -> Params:
    """Return the base, as it was stored while it was trained on, with an adapter added to its matrices."""
    from model.adapters import attach, mask_and_scale
    from model.quantize import quantize_layers
    from model.weights import LowRank, is_weight

    merge = lambda leaf: _merged(leaf) if isinstance(leaf, LowRank) else leaf
    base = base if kind is None else quantize_layers(base, kind)
    return jax.tree.map(merge, attach(base, tree, *mask_and_scale(adapter)), is_leaf=is_weight)


def _merged(weight: Any) -> np.ndarray:
    """Return the matrices that a `LowRank` stands for, to the same bits on every machine.

    A run that starts from them knows them by their hash, and the order in which a matrix product adds depends on the
    device: here it is that of the columns.
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
    """Return the parameters that a run started from. Raises InputError where they are not there, or are others.

    given: where they are now, or those that a run below them started from.
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
    """Return whether a run is there that holds only what it trained."""
    if place is None or not (Path(place) / "run.json").is_file():
        return False
    objective = read_record(place)["identity"].get("objective") or {}
    return bool(objective.get("adapter") or objective.get("trainable"))


def _over(base: Params, params: Params) -> Params:
    """Return the base with the leaves of `params` in place of its own, and beside them those that it does not have."""
    made = dict(base)
    for name, value in params.items():
        there = base.get(name)
        made[name] = _over(there, value) if isinstance(value, dict) and isinstance(there, dict) else value
    return made


def _as_phases_end(folder: str | Path, record: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what phases changed of the config, for a checkpoint of a version that did not note it.

    It is known at a run's end; before it, a warning says that it is not.
    """
    bases = [phase["rope_base"] for phase in record["identity"]["train_config"]["phases"] if phase.get("rope_base")]
    if not bases:
        return {}
    if record["status"] == "finished" and about["step"] == record["step"]:
        return {"rope_base": bases[-1]}
    logger.warning(
        "%s changes rope_base in its phases, and an older version did not note which one holds at step %d: the model's "
        "own is taken; train the run to its end with this version",
        folder,
        about["step"],
    )
    return {}


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


def weights_of(run: str | Path, record: Mapping[str, Any]) -> str | None:
    """Return where the weights are that a run started from, as `data_of` does; None where its `run.json` names none."""
    place = record.get("weights")
    return None if place is None else _found(place, record.get("weights_beside"), Path(run))


def data_folder(run: str | Path) -> Path | None:
    """Return the folder of a run's first data, whose tokenizer it used; it may be gone. None: the record names none.

    A warning says so where other data are there now, whose tokenizer may be another one.
    """
    record = read_record(run)
    if not record.get("data"):
        return None
    places, hashes = data_of(run, record), record.get("identity", {}).get("data")
    name, place = ("", places) if isinstance(places, str) else next(iter(places.items()))
    folder, trained_on = Path(place), hashes.get(name) if isinstance(hashes, Mapping) else hashes
    there = _manifest_hash(folder)
    if trained_on and there and there != trained_on:
        logger.warning(
            "%s holds other data now than %s was trained on, and maybe another tokenizer; put the former folder back, "
            "or give the tokenizer itself",
            folder,
            run,
        )
    return folder


def _manifest_hash(folder: Path) -> str | None:
    """Return the hash by which a data folder's manifest names it; None where there is no manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest.get("hash") if isinstance(manifest, dict) else None


def _found(place: str, beside: str | None, run: Path) -> str:
    if beside is None or Path(place).exists():
        return place
    other = os.path.normpath(run.resolve() / beside)
    return other if Path(other).exists() else place
