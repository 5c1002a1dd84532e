"""Open where a run starts that does not start fresh: at a checkpoint of another run, or from parameters alone."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import ModelConfig, Params, init
from model.errors import InputError
from model.parameterization import names_of
from model.store import open_parameters
from model.weights import is_weight
from train.hosts import agree
from train.recipe import Branch, Weights
from train.run.checkpoint import Checkpoints


def check_branch(branch: Branch) -> None:
    """Raise InputError where the base run has no checkpoint of the step, or nothing says where it lies."""
    folder = folder_of(branch)
    there = agree(Checkpoints(folder, read_only=True).steps)
    if branch.step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise InputError(f"{folder} has no checkpoint of step {branch.step}; the steps there are: {steps}")


def folder_of(branch: Branch) -> Path:
    """The folder of the run that a branch starts from. Raises InputError where nothing says where it lies."""
    if branch.folder is None:
        raise InputError(f"the run starts from step {branch.step} of run {branch.run_id}; give its Branch the folder")
    return branch.folder


def weights(path: str | Path) -> Weights:
    """A start from the parameters of whatever `model.store.open_model` opens. Raises InputError."""
    path = Path(path).resolve()
    return Weights(_sha256(_plain(path)), path)


def check_weights(start: Weights, config: ModelConfig) -> None:
    """Raise InputError where the weights are not those of the recipe, or not of its model."""
    _opened(start, jax.eval_shape(functools.partial(init, config), jax.random.key(0)))


def params_of(start: Weights, like: Params) -> Params:
    """The parameters that a run starts from, laid out as `like`, whose leaves have shapes, dtypes and shardings.

    Raises InputError as `check_weights` does.
    """
    lay_out = lambda value, leaf: jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
    return jax.tree.map(lay_out, _opened(start, like), like)


def _opened(start: Weights, like: Params) -> Params:
    if start.path is None:
        raise InputError(f"the run starts from weights {start.sha256[:16]}…; give its Weights the path")
    params = _plain(start.path)
    if _sha256(params) != start.sha256:
        raise InputError(f"{start.path} holds other weights than the recipe names")
    there, here = (_shapes(tree) for tree in (params, like))
    wrong = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if wrong:
        name = wrong[0]
        raise InputError(
            f"the weights of {start.path} do not fit the model: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} in the recipe"
        )
    return params


def _plain(path: Path) -> Params:
    """Return the parameters at a path. Raises InputError where they are rounded ones, which cannot be trained."""
    params = open_parameters(path)[1]
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError(f"{path} holds rounded weights, which cannot be trained; give the model that it was made of")
    return params


def _sha256(params: Params) -> str:
    """Hash names, dtypes, shapes and values, however they are stored."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda pair: names_of(pair[0])):
        value = np.asarray(leaf)
        digest.update(f"{'/'.join(names_of(path))} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _shapes(tree: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(names_of(path)): list(getattr(leaf, "shape", ())) for path, leaf in leaves}
