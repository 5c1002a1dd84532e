"""Read checkpoints: what one holds, which is the newest that is intact, the parameters without the rest.

`RUN/checkpoints/STEP` holds two items of Orbax, `params` and `state` (all the rest, mostly the optimizer), the
description `checkpoint.json` (step, score and its metric, the leaves of the whole state) and `checksums.json`. A state
without parameters of its own is one item, `state`, as were all states of former versions. `train.run.checkpoint` writes
them.
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
KEY = "rng"  # the leaf of a training state whose shape is that of a PRNG's key
logger = logging.getLogger("isoflop")


def steps_in(folder: Path) -> list[int]:
    """Steps with a checkpoint in the folder, intact or not, oldest first."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def newest_intact(
    folder: Path,
    trouble: Callable[[Path], str | None],
    set_aside: Callable[[Path, str], None],
    at_most: int | None = None,
) -> int | None:
    """Return the newest step whose checkpoint has no trouble, of at most that step; None if there is none.

    set_aside: is called with each checkpoint that has, and its trouble.
    """
    refused: set[int] = set()
    # Listed again each time: while one is verified here, a run that another process trains may replace them all.
    while steps := [step for step in steps_in(folder) if step not in refused and (at_most is None or step <= at_most)]:
        path = folder / str(steps[-1])
        reason = trouble(path)
        if reason is None:
            return steps[-1]
        if path.exists():
            refused.add(steps[-1])
            set_aside(path, reason)
    return None


def newest_params(run: Path, like: Any, *, partial: bool = False) -> tuple[dict[str, Any], Any] | None:
    """Return (what its checkpoint.json says, the parameters as arrays) of the newest checkpoint with intact parameters.

    None if there is none. like: a tree of the parameters' shapes and dtypes; partial: the run saved some of its leaves
    alone, which are then returned. No byte of the optimizer is read, but in a checkpoint of a former version, whose
    files hold both: those are verified whole. Raises InputError where the leaves are not those saved.
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
                raise  # else the process that trains the run has removed it: a newer one is there
    return None


def _only(tree: Any, names: set[str], prefix: str) -> Any:
    """Return the nested dict with the leaves of these names alone."""
    if not isinstance(tree, dict):
        return tree
    parts = {name: _only(value, names, f"{prefix}/{name}") for name, value in tree.items()}
    return {
        name: part for name, part in parts.items() if (part if isinstance(part, dict) else f"{prefix}/{name}" in names)
    }


def _restore_params(path: Path, like: Any) -> Any:
    if (path / PARAMS).is_dir():
        return _restore(path / PARAMS, like)
    return _restore(path / STATE, {PARAMS: like}, partial_restore=True)[PARAMS]


def restore(path: Path, like: Any) -> Any:
    """Return the whole state in a checkpoint; a leaf with a sharding as a jax.Array, any other as a NumPy array."""
    if not (path / PARAMS).is_dir():
        return _restore(path / STATE, like)
    items = {name: _restore(path / name, item) for name, item in items_of(like).items()}
    return dataclasses.replace(like, params=items[PARAMS], **items[STATE])


def items_of(state: Any) -> dict[str, Any]:
    """Return the items of Orbax in which a state is stored: the parameters apart where it has a field `params`."""
    if not hasattr(state, PARAMS):
        return {STATE: state}
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {PARAMS: fields.pop(PARAMS), STATE: fields}


def leaves_of(tree: Any, *prefix: str) -> dict[str, str]:
    """{"params/head/weight": "float32[64,1000]", …}, the same for a state and its shapes."""
    return {
        "/".join((*prefix, jax.tree_util.keystr(path, simple=True, separator="/"))): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def parameters_sha256(params: Any) -> str:
    """Hash names, dtypes, shapes and values of parameters, however they are stored."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda pair: names_of(pair[0])):
        value = np.asarray(leaf)
        digest.update(f"{'/'.join(names_of(path))} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def require_leaves(path: Path, leaves: dict[str, str], within: str = "") -> None:
    """Raise InputError where a checkpoint has other leaves than these, of those whose name starts with `within`."""
    there = (read_intact(path, ABOUT) or {"leaves": {}})["leaves"]
    saved = {name: leaf for name, leaf in there.items() if name.startswith(within)}
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
    """Say that a checkpoint is not used, and why."""
    logger.warning("checkpoint %s is not used: %s%s", path, reason, then)


def _trouble_of_params(path: Path) -> str | None:
    if not (path / PARAMS).is_dir() and (path / STATE).is_dir():
        return verify(path)
    return verify(path, (ABOUT, f"{PARAMS}/"))


def _restore(item: Path, like: Any, **options: bool) -> Any:
    import orbax.checkpoint as ocp

    def how(leaf: Any) -> ocp.RestoreArgs:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    arguments = ocp.args.PyTreeRestore(item=like, restore_args=jax.tree.map(how, like), **options)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(item.absolute(), args=arguments)  # Orbax takes no other path
