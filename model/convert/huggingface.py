"""Hugging Face folders: config.json and safetensors ↔ ModelConfig and parameters."""

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
from model.convert.canonical import differences
from model.convert.families import FAMILIES
from model.convert.family import QUANTISED, Family
from model.convert.fields import Raw
from model.convert.fold import fold
from model.convert.place import Places
from model.convert.plan import Leaf, Step, shapes_of, steps
from model.convert.tensors import SHARD_BYTES, TensorFolder, read_json, write_tensors
from model.dtypes import FLOATS, DTypeLike, dtype_name
from model.errors import InputError, UnknownNameError
from model.weights import is_weight

_WRITTEN_BY = {"written_by": "isoflop"}
_TABLE, _HEAD = ("embedding", "tokens"), ("head", "weight")


def load_hf(folder: str | Path, *, dtype: DTypeLike = "float32", mesh: Mesh | None = None) -> tuple[ModelConfig, dict]:
    """Read a Hugging Face model: config.json with model.safetensors or shards and their index.

    dtype: of the parameters, float32 or bfloat16, whatever the files hold; `config.compute_dtype` stays float32.
    mesh: split them over it (`model.sharding.spec_for`). eos_token_ids come from generation_config.json, or
    else from config.json. Tensors are read one at a time: memory peaks at the model plus one tensor.

    A tied head that the files hold all the same must equal the token table; one that does not makes the model untied.
    Of DeepSeek-V3 the layers for multi-token prediction are left out, of a multimodal Gemma 3 the vision tower.

    Raises InputError on a folder or file that is missing or broken, on architectures and features that isoflop does
    not have, and on tensors that are missing, unknown or of a wrong shape. Pickles are never read.
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
    plan = steps(family.rows, config, shapes, names)
    _check_tensors(folder, family, config, plan, tensors, names)
    places = Places(shapes, dtype, mesh)
    for step in plan:
        places.write(step, functools.partial(tensors.read, names[step.name]))
    return config, places.tree()


def save_hf(
    config: ModelConfig,
    params: dict,
    folder: str | Path,
    *,
    model_type: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write what Transformers loads back: config.json, generation_config.json and safetensors, sharded at 2 GB.

    A model under muP or depth scaling is written as the same function in the standard parameterization
    (`model.convert.fold`). The tensors have the parameters' precision, float32 or bfloat16. model_type: as which; None:
    the first that can hold this architecture. The folder appears whole or not at all. One that has files in it is
    refused unless its model was written by this function too: then the model is replaced and other files, a tokenizer
    say, stay.

    Raises InputError on an architecture that no model type can hold, on parameters that are not the config's, and on
    what `fold` raises.
    """
    folder = Path(folder).absolute()
    _check_params(config, params)
    config, params = fold(config, params)
    family, raw = choose_family(config, model_type)
    leaves: dict[Leaf, Array] = traverse_util.flatten_dict(params)
    kept = _kept_files(folder)
    dtype = str(next(iter(leaves.values())).dtype)
    plan = {
        family.written_name(step.name, step.row.outside, config): step
        for step in steps(family.rows, config, {path: leaf.shape for path, leaf in leaves.items()})
    }
    sizes = [(name, int(np.prod(step.shape)) * jnp.dtype(dtype).itemsize) for name, step in plan.items()]
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        write_tensors(partial, sizes, lambda name: _gather(plan[name], leaves), shard_bytes)
        _write_json(partial / "config.json", {**raw, "dtype": dtype, "torch_dtype": dtype, **_WRITTEN_BY})
        _write_json(partial / "generation_config.json", _generation_config(raw))
        for file in partial.glob("model*.safetensors"):
            shutil.copymode(partial / "config.json", file)  # safetensors lets only the owner read
        for file in kept:
            shutil.copy2(file, partial / file.name) if file.is_file() else shutil.copytree(file, partial / file.name)
        _swap(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        shapes_of(config)  # raises where there can be no such model
        return family, config
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def _tie_as_the_tensors_are(
    config: ModelConfig, family: Family, tensors: TensorFolder, names: dict[str, str]
) -> ModelConfig:
    """A file may hold a head that its configuration says is tied: then the values decide, and only a tied T5 scales."""
    shapes = shapes_of(config)
    if not config.tie_embeddings or config.head == "none" or _HEAD in shapes:
        return config
    untied = config.replace(tie_embeddings=False, scale_logits=False)
    with_head = {**shapes, _HEAD: shapes[_TABLE][::-1]}
    found = {part.leaf: step.name for step in steps(family.rows, untied, with_head) for part in step.parts}
    table, head = names.get(found[_TABLE]), names.get(found.get(_HEAD, ""))
    if head is None or table is None:
        return config
    same = tensors.shapes[table] == tensors.shapes[head] and np.array_equal(tensors.read(table), tensors.read(head))
    return config if same else untied


def _check_tensors(
    folder: Path,
    family: Family,
    config: ModelConfig,
    plan: list[Step],
    tensors: TensorFolder,
    names: dict[str, str],
) -> None:
    wanted = {step.name: step for step in plan}
    missing = [family.written_name(n, step.row.outside, config) for n, step in wanted.items() if n not in names]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder} lacks the tensor {missing[0]}{more}, which its config.json asks for")
    for base, step in wanted.items():
        name, expected = names[base], list(step.shape)
        if (got := list(tensors.shapes[name])) != expected:
            raise InputError(f"the tensor {name} in {folder} has shape {got}; its config.json asks for {expected}")
    for base, name in names.items():
        empty = 0 in tensors.shapes[name]  # a shared expert of width 0, say
        if base not in wanted and not empty and not _is_superfluous(base, family, config):
            raise InputError(f"{folder} holds the tensor {name}, which model_type {family.model_type!r} does not have")


def _is_superfluous(base: str, family: Family, config: ModelConfig) -> bool:
    """Whether it is ignored, or the head of a model whose head is tied and was found equal."""
    heads = {row.theirs for row in family.rows if row.ours == ("/".join(_HEAD),) and row.when(config)}
    return family.is_ignored(base, config) or base in heads


def choose_family(config: ModelConfig, model_type: str | None) -> tuple[Family, Raw]:
    """The family and its config.json whose reading gives the same function again."""
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
    name = "no model_type that isoflop writes can" if model_type is None else f"model_type {model_type!r} cannot"
    hint = f"; the closest, {closest[0]!r}, lacks" if model_type is None else ":"
    raise InputError(f"{name} hold this architecture{hint} {', '.join(dict.fromkeys(closest[1]))}")


def _check_params(config: ModelConfig, params: dict) -> None:
    """Raise InputError unless the parameters are the config's, in one precision."""
    if not isinstance(params, dict) or not isinstance(params.get("layers"), dict):
        raise InputError("save_hf takes the parameters that init or training gives, not those of infer.prepare")
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError("save_hf takes plain matrices; fold adapters and rounded weights (model.adapters.fold)")
    leaves: dict[Leaf, Any] = traverse_util.flatten_dict(params)
    shapes = shapes_of(config)
    for path in {*shapes, *leaves}:
        got = tuple(leaves[path].shape) if path in leaves and hasattr(leaves[path], "shape") else None
        if got != shapes.get(path):
            raise InputError(f"the parameter {'/'.join(path)} has shape {got}; the config asks for {shapes.get(path)}")
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise InputError(f"the parameters are {', '.join(sorted(dtypes))}; save_hf takes all float32 or all bfloat16")


def _kept_files(folder: Path) -> list[Path]:
    """What stays in a folder whose model is replaced. Raises InputError on one whose model is not ours."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to write")
    files = sorted(folder.iterdir()) if folder.exists() else []
    if not files:
        return []
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("written_by") != _WRITTEN_BY["written_by"]:
        raise InputError(f"{folder} is not empty and its model was not written by isoflop; give another folder")
    replaced = {"config.json", "generation_config.json"}
    return [file for file in files if file.name not in replaced and not file.name.startswith("model")]


def _gather(step: Step, leaves: dict[Leaf, Array]) -> np.ndarray:
    pieces = [np.asarray(leaves[part.leaf][part.index]) for part in step.parts]
    pieces = [np.swapaxes(piece, -1, -2) if step.row.transposed else piece for piece in pieces]
    return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=step.axis))


def _generation_config(raw: Raw) -> Raw:
    return {key: raw[key] for key in ("eos_token_id", "decoder_start_token_id") if raw.get(key) is not None}


def _write_json(file: Path, value: Raw) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(partial: Path, folder: Path) -> None:
    """Put the finished folder in place of the old one, if there is one."""
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
