"""Read checkpoints, which `train.run.checkpoint` writes: find the newest intact one, restore parameters or the state.

`RUN/checkpoints/STEP` holds two Orbax items, `params` and `state` (all the rest, mostly the optimizer state), the
description `checkpoint.json` (step, score and its metric, the leaves of the whole state) and `checksums.json`. A state
without a field `params` is one item, `state`, as were all states in earlier versions.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model.errors import InputError
from model.parameterization import names_of
from model.records import read_intact, verify

FOLDER = "checkpoints"  # of a run directory
ABOUT = "checkpoint.json"
PARAMS, STATE = "params", "state"
KEY = "rng"  # the leaf of a training state that holds a PRNG key
logger = logging.getLogger("isoflop")


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint in the folder, intact or not, oldest first."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def newest_intact(
    folder: Path,
    trouble: Callable[[Path], str | None],
    set_aside: Callable[[Path, str], None],
    at_most: int | None = None,
) -> int | None:
    """Return the newest step whose checkpoint is intact, or None.

    trouble(path): why the checkpoint is not intact, or None. set_aside(path, reason): called for each one that is not.
    at_most: the newest step to consider.
    """
    damaged: set[int] = set()
    while True:
        # Listed again each time: during verification another process that trains the run may replace all checkpoints.
        steps = [step for step in steps_in(folder) if step not in damaged and (at_most is None or step <= at_most)]
        if not steps:
            return None
        path = folder / str(steps[-1])
        reason = trouble(path)
        if reason is None:
            return steps[-1]
        if path.exists():
            damaged.add(steps[-1])
            set_aside(path, reason)


def newest_params(run: Path, like: Any, *, partial: bool = False) -> tuple[dict[str, Any], Any] | None:
    """Return (content of checkpoint.json, parameters) of the newest checkpoint with intact parameters, or None.

    like: a tree of the parameters' shapes and dtypes. partial: the run saved only some of its leaves, which are
    returned. The optimizer state is not read, except in a checkpoint of an earlier version, whose files hold both and
    are verified as a whole. Raises InputError if the leaves are not those saved.
    """
    while (step := newest_intact(run / FOLDER, _trouble_of_params, warn)) is not None:
        path = run / FOLDER / str(step)
        try:
            about = read_intact(path, ABOUT) or {}
            saved = like
            if partial:
                saved = _only(like, set(about.get("leaves", ())), PARAMS)
            require_leaves(path, leaves_of(saved, PARAMS), within=f"{PARAMS}/")
            return about, jax.tree.map(jax.numpy.asarray, _restore_params(path, saved))
        except Exception:
            if path.exists():
                raise  # otherwise the process that trains the run has replaced it by a newer one
    return None


def _only(tree: dict[str, Any], names: set[str], prefix: str) -> dict[str, Any]:
    """Return the nested dict with only the leaves of these names, such as "params/head/weight"."""
    kept = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}"
        if isinstance(value, dict):
            if below := _only(value, names, path):
                kept[name] = below
        elif path in names:
            kept[name] = value
    return kept


def _restore_params(path: Path, like: Any) -> Any:
    if (path / PARAMS).is_dir():
        return _restore(path / PARAMS, like)
    return _restore(path / STATE, {PARAMS: like}, partial_restore=True)[PARAMS]


def restore(path: Path, like: Any) -> Any:
    """Return the whole state of a checkpoint.

    like: a state of shapes; leaves with a sharding are restored as JAX arrays, all others as NumPy arrays.
    """
    if not (path / PARAMS).is_dir():
        return _restore(path / STATE, like)
    items = {name: _restore(path / name, item) for name, item in items_of(like).items()}
    return dataclasses.replace(like, params=items[PARAMS], **items[STATE])


def items_of(state: Any) -> dict[str, Any]:
    """Split a state into the Orbax items in which it is stored: "params", if it has that field, and "state"."""
    if not hasattr(state, PARAMS):
        return {STATE: state}
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {PARAMS: fields.pop(PARAMS), STATE: fields}


def leaves_of(tree: Any, *prefix: str) -> dict[str, str]:
    """Return {"params/head/weight": "float32[64,1000]", …} for a state or its shapes."""
    return {
        "/".join((*prefix, jax.tree_util.keystr(path, simple=True, separator="/"))): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def parameters_sha256(params: Any) -> str:
    """Return a hash of the names, dtypes, shapes and values of parameters, independent of device and sharding."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda pair: names_of(pair[0])):
        value = np.asarray(leaf)
        digest.update(f"{'/'.join(names_of(path))} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def require_leaves(path: Path, leaves: dict[str, str], within: str = "") -> None:
    """Raise InputError unless the checkpoint's leaves whose names start with `within` are exactly these."""
    all_saved = (read_intact(path, ABOUT) or {"leaves": {}})["leaves"]
    saved = {name: leaf for name, leaf in all_saved.items() if name.startswith(within)}
    wrong = [
        f"{name} is {saved.get(name, 'absent')} there and {leaves.get(name, 'absent')} here"
        for name in sorted(saved.keys() | leaves.keys())
        if saved.get(name) != leaves.get(name)
    ]
    if len(wrong) == 1 and wrong[0].startswith(f"{KEY} is uint32"):
        raise InputError(
            f"checkpoint {path} was written under another PRNG of JAX: {wrong[0]}; runs are trained "
            "with threefry2x32 whatever JAX_DEFAULT_PRNG_IMPL says, so train into another folder"
        )
    if wrong:
        more = f", and {len(wrong) - 3} more leaves differ" if len(wrong) > 3 else ""
        raise InputError(
            f"checkpoint {path} is of another version or configuration: {'; '.join(wrong[:3])}{more}; "
            "open it with what wrote it, or train into another folder"
        )


def warn(path: Path, reason: str, then: str = "") -> None:
    """Log that a checkpoint is not used, and why."""
    logger.warning("checkpoint %s is not used: %s%s", path, reason, then)


def _trouble_of_params(path: Path) -> str | None:
    if not (path / PARAMS).is_dir() and (path / STATE).is_dir():
        return verify(path)
    return verify(path, (ABOUT, f"{PARAMS}/"))


def _restore(item: Path, like: Any, **options: bool) -> Any:
    import orbax.checkpoint as ocp

    def restore_args(leaf: Any) -> ocp.RestoreArgs:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    arguments = ocp.args.PyTreeRestore(item=like, restore_args=jax.tree.map(restore_args, like), **options)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(item.absolute(), args=arguments)  # Orbax takes absolute paths only
