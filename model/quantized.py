"""Save and load quantized models in the layout for decoding, so that loading never dequantizes.

A folder holds quantized.json, with the type of the weights and the config, and model.safetensors, with the arrays named
by their path in the tree of `infer.prepare`, such as `['layers'][0]['attention']['query']['weight'].packed`.
"""

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model.ambient import pinned
from model.config import ModelConfig
from model.errors import InputError
from model.layout import places
from model.records import check_output_folder, json_text
from model.stack import Params
from model.weights import Bits, Int4, Int8, Int8Dynamic, Int8Experts, LowRank, Transposed, is_weight

RECORD, TENSORS = "quantized.json", "model.safetensors"
ROUNDED = ("int8", "int8-dynamic", "int4")


def save_quantized(config: ModelConfig, params: Params, folder: str | Path, weights: str) -> None:
    """Write parameters that `infer.prepare` stored as `weights`, atomically.

    Raises InputError if the folder holds anything but a quantized model, and for low-rank adapters.
    """
    from safetensors.flax import save_file

    if any(isinstance(leaf, LowRank) for leaf in jax.tree.leaves(params, is_leaf=is_weight)):
        raise InputError("the parameters have low-rank adapters; fold these (model.adapters.fold) and round the result")
    folder = Path(folder).absolute()
    check_output_folder(folder, "a quantized model", f"has no {RECORD}", replaceable=(folder / RECORD).is_file())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        save_file({jax.tree_util.keystr(path): jax.numpy.asarray(leaf) for path, leaf in leaves}, partial / TENSORS)
        record = {"schema_version": 1, "weights": weights, "config": config.to_dict()}
        (partial / RECORD).write_text(json_text(record), encoding="utf-8")
        shutil.copymode(partial / RECORD, partial / TENSORS)  # safetensors makes it readable by the owner only
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@pinned()
def load_quantized(folder: str | Path) -> tuple[ModelConfig, Params]:
    """Read a folder that `save_quantized` wrote, for `apply`, `prefill`, `decode_step` and `generate`.

    Raises InputError if the folder is damaged or its weights do not fit its config.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    from model.transformer import init

    folder = Path(folder)
    config, weights = _read_record(folder)
    try:
        arrays = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read as a quantized model: {error}") from None
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    fields: dict[str, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        place, _, field = name.partition(".")
        fields.setdefault(place, {})[field] = array
    tree: dict[str, Any] = {}
    try:
        for place, parts in fields.items():
            path = _path(place)
            _put(tree, path, _weight(parts, weights, functools.partial(_d_in, config, shapes, path)))
        params = _with_tuples(tree)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise InputError(f"{folder} has {place} not as this version stores it; compress the model again") from None
    found, expected = _count_weights(params), sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    if found != expected:
        raise InputError(
            f"{folder} holds {found:,} weights and a model of its config has {expected:,}; compress the model again"
        )
    return config, params


def read_quantized_config(folder: str | Path) -> ModelConfig:
    """Return the config of a folder that `save_quantized` wrote, without its weights. Raises InputError if damaged."""
    return _read_record(Path(folder))[0]


def _read_record(folder: Path) -> tuple[ModelConfig, str]:
    """Return the config and the type of the weights."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return ModelConfig.from_dict(record["config"]), record["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} cannot be read as a quantized model: {error}") from None


def _weight(parts: dict[str, jax.Array], weights: str, d_in: Callable[[], int]) -> Any:
    """Return the weight that was stored as these arrays, by their names and dtypes; d_in: is read for int4."""
    match sorted(parts):
        case [""]:
            return parts[""]
        case ["weight"]:
            return (Bits if parts["weight"].dtype == np.uint16 else Transposed)(**parts)
        case ["scale", "weight"] if parts["weight"].ndim == 3:
            return Int8Experts(**parts)
        case ["scale", "weight"]:
            return (Int8Dynamic if weights == "int8-dynamic" else Int8)(**parts)
        case ["packed", "scale"]:
            return Int4(**parts, d_in=d_in())
    raise ValueError(f"no form of a weight has the arrays {', '.join(sorted(parts))}")


def _d_in(config: ModelConfig, shapes: Params, path: tuple[str | int, ...]) -> int:
    """Return d_in of the matrix at a path of the prepared tree, in which layers are numbered.

    shapes: of the tree of `init`, in which they are stacked by kind: ("layers", 3, …) is read at ("layers", "dense", …)
    if layer 3 is of that kind.
    """
    tree: Any = shapes
    for name in path:
        if isinstance(name, int):
            name, _ = places(config, encoder=path[0] == "encoder")[name]
        tree = tree[name]
    return tree.shape[-2]


def _path(place: str) -> tuple[str | int, ...]:
    """Return ("layers", 0, "attention") for "['layers'][0]['attention']"."""
    return tuple(key or int(number) for key, number in re.findall(r"\['([^']+)'\]|\[(\d+)\]", place))


def _put(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    *above, last = path
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _with_tuples(tree: Any) -> Any:
    """Return the tree with every mapping from 0, 1, 2 … turned into a tuple."""
    if not isinstance(tree, Mapping):
        return tree
    children = {name: _with_tuples(child) for name, child in tree.items()}
    if not any(isinstance(name, int) for name in children):
        return children
    return tuple(children[index] for index in range(len(children)))


def _count_weights(params: Params) -> int:
    """Return the number of weights, without scales and padding."""
    total = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_weight):
        if isinstance(leaf, Int4):
            total += leaf.scale.shape[0] * leaf.d_in
        else:
            total += leaf.weight.size if is_weight(leaf) else leaf.size
    return total
