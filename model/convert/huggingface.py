"""Read and write Hugging Face folders: config.json and safetensors ↔ ModelConfig and parameters."""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array

from model.config import ModelConfig
from model.convert.builder import ParameterBuilder
from model.convert.canonical import differences
from model.convert.entries import Raw
from model.convert.families import FAMILIES
from model.convert.family import QUANTISED, Family
from model.convert.fold import fold
from model.convert.plan import Leaf, TensorPlan, plan_tensors, shapes_of
from model.convert.tensors import SHARD_BYTES, TensorFolder, read_json, write_tensors
from model.dtypes import FLOATS, DTypeLike, dtype_name
from model.errors import InputError, UnknownNameError
from model.records import check_output_folder
from model.weights import is_weight

_WRITTEN_BY = {"written_by": "isoflop"}
_TABLE, _HEAD = ("embedding", "tokens"), ("head", "weight")


def load_hf(folder: str | Path, *, dtype: DTypeLike = "float32", mesh: Mesh | None = None) -> tuple[ModelConfig, dict]:
    """Read a Hugging Face model: config.json with model.safetensors, or with shards and their index.

    dtype: of the parameters, float32 or bfloat16, independent of the files'; `config.compute_dtype` is float32. mesh:
    shards the parameters (`model.sharding.spec_for`). eos_token_ids come from generation_config.json, or else from
    config.json. Tensors are read one at a time: memory peaks at the model plus one tensor.

    If the files have a tied head that differs from the token table, the model becomes untied. The multi-token
    prediction layers of DeepSeek-V3 and the vision tower of a multimodal Gemma 3 are left out.

    Raises InputError for missing or damaged files, for architectures and features that isoflop does not have, and for
    tensors that are missing, unknown or of a wrong shape. Pickles are never read.
    """
    folder = Path(folder)
    dtype = dtype_name(dtype, FLOATS)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one with a Hugging Face model")
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, but {gguf[0].name}; give the path of that file")
    family, config = _read_config(folder)
    tensors = TensorFolder(folder)
    names = {family.base_name(name): name for name in tensors.shapes}
    config = _tie_as_the_tensors_are(family.adapt(config, names), family, tensors, names)
    shapes = shapes_of(config)
    plan = plan_tensors(family.rules, config, shapes, names)
    _check_tensors(folder, family, config, plan, tensors, names)
    builder = ParameterBuilder(shapes, dtype, mesh)
    for tensor in plan:
        builder.write(tensor, functools.partial(tensors.read, names[tensor.name]))
    return config, builder.tree()


def save_hf(
    config: ModelConfig,
    params: dict,
    folder: str | Path,
    *,
    model_type: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder for Transformers: config.json, generation_config.json and safetensors in shards of 2 GB.

    A model under muP or depth scaling is written as the same function in the standard parameterization
    (`model.convert.fold`). The tensors have the dtype of the parameters, float32 or bfloat16. model_type: None is the
    first that can represent the architecture. The folder is renamed into place when it is complete. In a folder whose
    model was written by this function, the model is replaced and other files, such as a tokenizer, are kept.

    Raises InputError for any other folder that is not empty, for an architecture that the model type cannot represent,
    for parameters that do not fit the config, and like `fold`.
    """
    folder = Path(folder).absolute()
    _check_params(config, params)
    config, params = fold(config, params)
    family, raw = choose_family(config, model_type)
    leaves: dict[Leaf, Array] = traverse_util.flatten_dict(params)
    kept = _kept_files(folder)
    dtype = str(next(iter(leaves.values())).dtype)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    plan = {
        family.written_name(tensor.name, tensor.rule.outside, config): tensor
        for tensor in plan_tensors(family.rules, config, shapes)
    }
    itemsize = jnp.dtype(dtype).itemsize
    sizes = [(name, int(np.prod(tensor.shape)) * itemsize) for name, tensor in plan.items()]
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        write_tensors(partial, sizes, lambda name: _gather(plan[name], leaves), shard_bytes)
        _write_json(partial / "config.json", {**raw, "dtype": dtype, "torch_dtype": dtype, **_WRITTEN_BY})
        _write_json(partial / "generation_config.json", _generation_config(raw))
        for file in partial.glob("model*.safetensors"):
            shutil.copymode(partial / "config.json", file)  # safetensors makes files readable by the owner only
        for file in kept:
            shutil.copy2(file, partial / file.name) if file.is_file() else shutil.copytree(file, partial / file.name)
        _swap(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_hf_config(folder: str | Path) -> ModelConfig:
    """Return the config of a Hugging Face folder without opening its tensors. Raises InputError as `load_hf` does."""
    return _read_config(Path(folder))[1]


def _read_config(folder: Path) -> tuple[Family, ModelConfig]:
    raw = read_json(folder / "config.json")
    if isinstance(raw.get("text_config"), dict) and raw.get("model_type") == "gemma3":
        outer = {key: raw[key] for key in ("architectures", "eos_token_id", *QUANTISED) if key in raw}
        raw = {**raw["text_config"], **outer, "model_type": "gemma3_text"}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        raw |= {key: generation[key] for key in ("eos_token_id", "decoder_start_token_id") if key in generation}
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{folder / 'config.json'} has no model_type; isoflop reads {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        raise UnknownNameError(f"model_type in {folder / 'config.json'}", model_type, FAMILIES, guess=False)
    try:
        family, config = FAMILIES[model_type], FAMILIES[model_type].read(raw)
        shapes_of(config)  # raises for impossible sizes
        return family, config
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def _tie_as_the_tensors_are(
    config: ModelConfig, family: Family, tensors: TensorFolder, names: dict[str, str]
) -> ModelConfig:
    """Return the config untied, without T5's output scale, if it is tied and the files have a head of other values."""
    shapes = shapes_of(config)
    if not config.tie_embeddings or config.head == "none" or _HEAD in shapes:
        return config
    untied = config.replace(tie_embeddings=False, scale_logits=False)
    with_head = {**shapes, _HEAD: shapes[_TABLE][::-1]}
    tensor_of_leaf = {
        target.leaf: tensor.name for tensor in plan_tensors(family.rules, untied, with_head) for target in tensor.slices
    }
    table, head = names.get(tensor_of_leaf[_TABLE]), names.get(tensor_of_leaf.get(_HEAD, ""))
    if head is None or table is None:
        return config
    same = tensors.shapes[table] == tensors.shapes[head] and np.array_equal(tensors.read(table), tensors.read(head))
    return config if same else untied


def _check_tensors(
    folder: Path,
    family: Family,
    config: ModelConfig,
    plan: list[TensorPlan],
    tensors: TensorFolder,
    names: dict[str, str],
) -> None:
    wanted = {tensor.name: tensor for tensor in plan}
    missing = [
        family.written_name(base, tensor.rule.outside, config) for base, tensor in wanted.items() if base not in names
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder} lacks the tensor {missing[0]}{more}, which its config.json requires")
    for base, tensor in wanted.items():
        name, expected = names[base], list(tensor.shape)
        if (got := list(tensors.shapes[name])) != expected:
            raise InputError(f"the tensor {name} in {folder} has shape {got}; its config.json requires {expected}")
    for base, name in names.items():
        empty = 0 in tensors.shapes[name]  # such as a shared expert of width 0
        if base not in wanted and not empty and not _is_unneeded(base, family, config):
            raise InputError(f"{folder} has the tensor {name}, which model_type {family.model_type!r} does not have")


def _is_unneeded(base: str, family: Family, config: ModelConfig) -> bool:
    """Return whether a tensor is ignored by the family, or is a tied head, whose values were compared already."""
    heads = {rule.tensor for rule in family.rules if rule.leaves == ("/".join(_HEAD),) and rule.when(config)}
    return family.is_ignored(base, config) or base in heads


def choose_family(config: ModelConfig, model_type: str | None) -> tuple[Family, Raw]:
    """Return the first family, or the named one, that represents the config, with its config.json.

    A family represents a config if reading the config.json that it writes gives the same function. Raises InputError if
    none does.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise UnknownNameError("model_type", model_type, FAMILIES, guess=False)
    closest: tuple[str, list[str]] | None = None
    for family in FAMILIES.values() if model_type is None else (FAMILIES[model_type],):
        raw = family.write(config)
        try:
            different = differences(config, family.read(raw))
        except InputError as error:
            different = [str(error)] * 99
        if not different:
            return family, raw
        if closest is None or len(different) < len(closest[1]):
            closest = (family.model_type, different)
    assert closest is not None
    name, lacking = closest[0], ", ".join(dict.fromkeys(closest[1]))
    if model_type is not None:
        raise InputError(f"model_type {model_type!r} cannot hold this architecture: {lacking}")
    raise InputError(
        f"no model_type that isoflop writes can hold this architecture; the closest, {name!r}, lacks {lacking}"
    )


def _check_params(config: ModelConfig, params: dict) -> None:
    """Raise InputError unless the parameters have the config's shapes and one dtype."""
    if not isinstance(params, dict) or not isinstance(params.get("layers"), dict):
        raise InputError("save_hf takes parameters from init or training, not those of infer.prepare")
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError("save_hf takes plain matrices; fold adapters and quantized weights (model.adapters.fold)")
    leaves: dict[Leaf, Any] = traverse_util.flatten_dict(params)
    shapes = shapes_of(config)
    for path in {*shapes, *leaves}:
        got = tuple(leaves[path].shape) if path in leaves and hasattr(leaves[path], "shape") else None
        if got != shapes.get(path):
            raise InputError(f"the parameter {'/'.join(path)} has shape {got}; the config requires {shapes.get(path)}")
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise InputError(f"the parameters are {', '.join(sorted(dtypes))}; save_hf takes all float32 or all bfloat16")


def _kept_files(folder: Path) -> list[Path]:
    """Return the files to keep in a folder whose model is replaced.

    Raises InputError if the folder is not empty and its model was not written by isoflop.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    written_here = config.get("written_by") == _WRITTEN_BY["written_by"]
    check_output_folder(folder, "a model", "its model was not written by isoflop", replaceable=written_here)
    files = sorted(folder.iterdir()) if folder.exists() else []
    replaced = {"config.json", "generation_config.json"}
    return [file for file in files if file.name not in replaced and not file.name.startswith("model")]


def _gather(tensor: TensorPlan, leaves: dict[Leaf, Array]) -> np.ndarray:
    """Return a tensor of the file, from its leaves."""
    values = [np.asarray(leaves[target.leaf][target.index]) for target in tensor.slices]
    if tensor.rule.transposed:
        values = [np.swapaxes(value, -1, -2) for value in values]
    return np.ascontiguousarray(values[0] if len(values) == 1 else np.concatenate(values, axis=tensor.axis))


def _generation_config(raw: Raw) -> Raw:
    return {key: raw[key] for key in ("eos_token_id", "decoder_start_token_id") if raw.get(key) is not None}


def _write_json(file: Path, value: Raw) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(partial: Path, folder: Path) -> None:
    """Replace the folder by the finished one, and restore it if that fails."""
    if not folder.exists():
        partial.rename(folder)
        return
    old = partial.with_suffix(".old")
    folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)
