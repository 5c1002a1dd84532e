"""Open the start of a run that does not start fresh: a checkpoint of another run, or parameters alone."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import ModelConfig, Params, init
from model.checkpoint import parameters_sha256
from model.errors import InputError
from model.parameterization import names_of
from model.store import open_parameters
from model.weights import is_weight
from train.hosts import agree
from train.recipe import Branch, Weights
from train.run.checkpoint import Checkpoints


def check_branch(branch: Branch) -> None:
    """Raise InputError if the base run has no checkpoint of the step, or if its folder is not known."""
    folder = folder_of(branch)
    there = agree(Checkpoints(folder, read_only=True).steps)
    if branch.step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise InputError(f"{folder} has no checkpoint of step {branch.step}; the steps there are: {steps}")


def folder_of(branch: Branch) -> Path:
    """Return the folder of the run that a branch starts from. Raises InputError if it is not known."""
    if branch.folder is None:
        raise InputError(f"the run starts from step {branch.step} of run {branch.run_id}; give its Branch the folder")
    return branch.folder


def weights(path: str | Path) -> Weights:
    """Return a start from the parameters of anything that `model.store.open_model` opens. Raises InputError."""
    path = Path(path).resolve()
    return Weights(parameters_sha256(_plain(path)), path)


def open_weights(start: Weights) -> Params:
    """Return all parameters of a start. Raises InputError if its path is not known or holds other weights."""
    if start.path is None:
        raise InputError(f"the run starts from weights {start.sha256[:16]}…; give its Weights the path")
    params = _plain(start.path)
    if parameters_sha256(params) != start.sha256:
        raise InputError(f"{start.path} holds other weights than the recipe names; give the path of those")
    return params


def fit(params: Params, config: ModelConfig, path: Path | None, fresh: Sequence[str] = ()) -> tuple[Params, list[str]]:
    """Return parameters of the config's shapes, those of the model at `path`, and the names of those that it lacks.

    fresh: top-level names, such as "head", of which the model may have others or none: they are zeros then, and the
    model's own are left out. Raises InputError on any other difference.
    """
    like = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    lacking = [name for name in fresh if _shapes({name: params.get(name)}) != _shapes({name: like.get(name)})]
    params = {name: value for name, value in params.items() if name not in lacking}
    for name in lacking:
        if name in like:
            params[name] = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like[name])
    check_fits(params, config, path)
    return params, [name for name in lacking if name in like]


def check_fits(params: Params, config: ModelConfig, path: Path | None) -> None:
    """Raise InputError unless the parameters, loaded from `path`, have the shapes that the config gives."""
    like = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    there, here = (_shapes(tree) for tree in (params, like))
    wrong = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if wrong:
        name = wrong[0]
        raise InputError(
            f"the weights of {path} do not fit the model: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} in the recipe; give the model's own config, or another model"
        )


class Bases:
    """Open the parameters that runs of one model start from, each once.

    fresh: names of `Objective.FRESH`, which a start may lack.
    """

    def __init__(self, config: ModelConfig, fresh: Sequence[str] = ()):
        self._config, self._fresh = config, tuple(fresh)
        self._opened = dict[Weights, tuple[Params, list[str]]]()

    def of(self, start: Weights) -> Params:
        """Return all parameters of a start, NumPy arrays on the host; zeros where it lacks those that are drawn.

        Raises InputError if they are not those of the recipe, or do not fit its model.
        """
        return self._open(start)[0]

    def lacking(self, start: Weights) -> list[str]:
        """Return the top-level names of the parameters that a start lacks, which are drawn."""
        return self._open(start)[1]

    def _open(self, start: Weights) -> tuple[Params, list[str]]:
        if start not in self._opened:
            self._opened[start] = fit(open_weights(start), self._config, start.path, self._fresh)
        return self._opened[start]

    def close(self) -> None:
        """Release all of them."""
        self._opened.clear()


def lay_out(params: Params, like: Params) -> Params:
    """Return parameters with the dtypes and shardings of the leaves of `like`."""
    return jax.tree.map(lambda value, leaf: jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding), params, like)


def _plain(path: Path) -> Params:
    """Return the parameters at a path. Raises InputError if they are rounded, which cannot be trained."""
    params = open_parameters(path)[1]
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError(f"{path} holds rounded weights, which cannot be trained; give the model that it was made of")
    return params


def _shapes(tree: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(names_of(path)): list(getattr(leaf, "shape", ())) for path, leaf in leaves}
