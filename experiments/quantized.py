"""A folder that holds weights in fewer bits as `infer.prepare` stores them, so that loading it makes nothing wider.

quantized.json says how they are stored and of what config they are; model.safetensors has the arrays by their place.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infer import prepare
from model import ModelConfig, Params, init
from model.errors import InputError
from train.files import write_json

RECORD, TENSORS = "quantized.json", "model.safetensors"
ROUNDED = ("int8", "int8-dynamic", "int4")


def save_quantized(config: ModelConfig, params: Params, folder: str | Path, weights: str) -> None:
    """Write parameters prepared as `weights`, whole or not at all. Raises InputError where something else stands."""
    from safetensors.flax import save_file

    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / RECORD).is_file())):
        raise InputError(f"{folder} exists and holds no quantized model; give another folder")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        save_file({jax.tree_util.keystr(path): jax.numpy.asarray(leaf) for path, leaf in leaves}, partial / TENSORS)
        write_json(partial / RECORD, {"schema_version": 1, "weights": weights, "config": config.to_dict()})
        shutil.copymode(partial / RECORD, partial / TENSORS)  # safetensors lets only the owner read
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_quantized(folder: str | Path) -> tuple[ModelConfig, Params]:
    """What `save_quantized` wrote: `apply`, `prefill`, `decode_step` and `generate` take it as it is.

    Raises InputError on a damaged folder and on one whose layout this version does not make.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        arrays = load_file(folder / TENSORS)
        config, weights = ModelConfig.from_dict(record["config"]), record["weights"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read as a quantized model: {error}") from None
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    wanted = jax.eval_shape(functools.partial(prepare, config, weights=weights), shapes)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        array = arrays.get(jax.tree_util.keystr(path))
        if array is None or array.shape != shape.shape or array.dtype != np.dtype(shape.dtype):
            raise InputError(
                f"{folder} has {jax.tree_util.keystr(path)} not as this version stores it; compress the model again"
            )
        return array

    return config, jax.tree_util.tree_map_with_path(leaf, wanted)
