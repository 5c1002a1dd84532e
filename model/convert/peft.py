"""Low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors ↔ `model.adapters`.

PEFT has a pair of matrices for every matrix of the Hugging Face model: lora_A [rank, in] and lora_B [out, rank], also
where the matrix is stored (in, out). Most are ours, transposed. Some of their matrices hold several of ours, one after
the other (GPT-2's c_attn, Phi-3's qkv_proj). Their pair is then read as the same `a` for each of ours and its part of
`b`. Ours are written with the `a` side by side and `b` block by block, at that many times the rank, or at the rank
itself where all `a` are equal. Both are exact.

A model under muP or depth scaling is exported with its multipliers inside its matrices (`model.convert.fold`), and so
are the changes of these.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from model.adapters import ALL_TARGETS, Adapter, adapted, attach, fold, mask_and_scale, target_of
from model.ambient import pinned
from model.checks import check_number
from model.config import ModelConfig
from model.convert.families import FAMILIES
from model.convert.family import Family
from model.convert.fields import Raw
from model.convert.fold import folded, matrix_multiplier
from model.convert.huggingface import choose_family, save_hf
from model.convert.plan import Leaf, Step, shapes_of, steps
from model.convert.tensors import read_json, read_tensors
from model.errors import InputError
from model.store import open_parameters
from model.weights import is_weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TASKS = {"language-model": "CAUSAL_LM"}
Pair = tuple[np.ndarray, np.ndarray]
"""Two factors of one matrix: our a and b, or their lora_A and lora_B."""
# What else an adapter_config.json may say, where it changes what is computed: the value that changes nothing.
_NEUTRAL: Raw = {
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "use_bdlora"), False),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"), None),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"), None),
    "monteclora_config": None,
    "bias": "none",
}
# Starts that leave the base as it is; others take from it what they start with.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_peft(
    config: ModelConfig,
    adapter: Adapter,
    tree: dict,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    model_type: str | None = None,
) -> None:
    """Write an adapter that PEFT loads onto the model that `save_hf` writes of the base, whole or not at all.

    Of a lane with a smaller rank give `first_columns(tree, rank)` and the Adapter of that rank and alpha. base: name or
    folder of the base, for PEFT to find it. model_type: as which the base is written; None: as `save_hf` chooses.
    Raises InputError where something else than an adapter stands, on an adapter that is not the config's, and what
    `save_hf` raises on the architecture.
    """
    folder = Path(folder).absolute()
    _check_target_folder(folder)
    standard = folded(config)
    family, _ = choose_family(standard, model_type)
    leaves = _checked(config, adapter, tree)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    others: list[str] = []
    transposed = set()
    written: set[Leaf] = set()
    for name, step in _modules(family, standard).items():
        pairs = [leaves.get(part.leaf) for part in step.parts]
        if not any(pairs):
            others.append(name)
            continue
        a, b = _fused(config, adapter, step, pairs)
        tensors |= {f"{_PREFIX}{name}{_A}": a.T, f"{_PREFIX}{name}{_B}": b.T}
        ranks[name] = a.shape[1]
        transposed.add(step.row.transposed)
        written |= {part.leaf for part in step.parts}
    if missing := leaves.keys() - written:
        raise InputError(
            f"the adapter changes {'/'.join(min(missing))}, which {family.model_type} stores in no matrix of "
            "its own; write the merged model with `isoflop model merge`"
        )
    targets = _suffixes(ranks, others)
    wide = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
    power = 0.5 if adapter.rank_stabilised else 1
    alphas = {name: adapter.alpha * (rank / adapter.rank) ** power for name, rank in wide.items()}
    record = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if config.stack == "encoder-decoder" else _TASKS.get(config.head),
        "base_model_name_or_path": None if base is None else str(base),
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "use_rslora": adapter.rank_stabilised,
        "rank_pattern": wide,
        "alpha_pattern": alphas,
        "target_modules": targets,
        "fan_in_fan_out": transposed == {False},
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }
    _write(folder, record, tensors)


@pinned()
def load_peft(folder: str | Path, config: ModelConfig) -> tuple[Adapter, dict]:
    """Read an adapter of PEFT's for a model of this config.

    Modules of several ranks or scales (rank_pattern, alpha_pattern) get the largest rank, filled up with zeros, and
    their scale's ratio to the common one goes into b; layers without an adapter get zeros.
    Raises InputError on a folder that is broken, on another method than LoRA, on what goes beyond the matrices of
    attention and feed-forward, and on an adapter of another model.
    """
    folder = Path(folder)
    raw = _read_record(folder)
    pairs = _read_pairs(folder)
    standard = folded(config)
    modules = _modules_named(folder, standard, pairs)
    usual_alpha, usual_rank = (_number(folder, raw, key, 8) for key in ("lora_alpha", "r"))
    stabilised = bool(raw.get("use_rslora"))
    divisor = lambda rank: rank**0.5 if stabilised else rank
    rank = max(a.shape[0] for a, _ in pairs.values())
    common = usual_alpha / divisor(usual_rank)
    shapes = shapes_of(standard)
    leaves: dict[Leaf, np.ndarray] = {}
    for name, (a, b) in pairs.items():
        alpha = _of_pattern(folder, raw, "alpha_pattern", name, usual_alpha)
        named_rank = _of_pattern(folder, raw, "rank_pattern", name, usual_rank)
        if named_rank != a.shape[0]:
            raise InputError(
                f"{folder}: {name} has rank {a.shape[0]} in {TENSORS} and {named_rank} by {CONFIG}; "
                "take both files from one save_pretrained"
            )
        ratio = alpha / divisor(a.shape[0]) / common
        for part in modules[name].parts:
            *stack, d_in, d_out = shapes[part.leaf]
            for factor, size in (("a", (*stack, d_in, rank)), ("b", (*stack, rank, d_out))):
                leaves.setdefault((*part.leaf, factor), np.zeros(size, np.float32))
            of_b = ratio / matrix_multiplier(config, part.leaf)
            leaves[(*part.leaf, "a")][part.index][:, : a.shape[0]] = a.T
            leaves[(*part.leaf, "b")][part.index][: a.shape[0]] = b[part.start : part.stop].T * of_b
    targets = tuple(name for name in ALL_TARGETS if any(path[-3] == name for path in leaves))
    usual = usual_alpha if rank == usual_rank else common * divisor(rank)
    adapter = Adapter(rank, usual, stabilised, targets)
    return adapter, traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def merge_adapter(
    base: str | Path, adapter: str | Path, out: str | Path, base_of_run: str | Path | None = None
) -> None:
    """Write a Hugging Face folder of a model with the change of an adapter in its float32 matrices.

    base: what `open_model` opens, with plain weights. adapter: a folder in PEFT's format. Tokenizer files are left to
    the caller. base_of_run: what `open_model` takes as the base of a run. Raises InputError as `load_peft` and
    `save_hf` do, and on a base of rounded weights.
    """
    config, params = open_parameters(base, base_of_run)
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError(f"{base} holds rounded weights; give the model that it was made of")
    described, tree = load_peft(adapter, config)
    file = Path(base) / "config.json"
    given = read_json(file).get("model_type") if file.is_file() else None
    folded_in = fold(attach(params, tree, *mask_and_scale(described)))
    save_hf(config, folded_in, out, model_type=given if given in FAMILIES else None)


def _modules(family: Family, config: ModelConfig) -> dict[str, Step]:
    """Return the tensor of every module with a weight, by the module's name in Transformers' model."""
    return {
        family.written_name(step.name, step.row.outside, config).removesuffix(".weight"): step
        for step in steps(family.rows, config, shapes_of(config))
        if step.name.endswith(".weight")
    }


def _checked(config: ModelConfig, adapter: Adapter, tree: dict) -> dict[Leaf, Pair]:
    """Return both factors by path. Raises InputError unless they are those of the config and the adapter."""
    shapes, leaves = adapted(config, adapter), traverse_util.flatten_dict(tree)
    pairs = {}
    for path in dict.fromkeys(path[:-1] for path in leaves):
        if path not in shapes or not {(*path, "a"), (*path, "b")} <= leaves.keys():
            raise InputError(f"the adapter changes {'/'.join(path)}, no target of it in a model of this config")
        a, b = (np.asarray(leaves[(*path, name)], np.float32) for name in ("a", "b"))
        *stack, d_in, d_out = shapes[path]
        if a.shape != (*stack, d_in, adapter.rank) or b.shape != (*stack, adapter.rank, d_out):
            raise InputError(
                f"the adapter has a {list(a.shape)} and b {list(b.shape)} at {'/'.join(path)}, not those of rank "
                f"{adapter.rank} for {list(shapes[path])}; give first_columns(tree, rank) and the Adapter of that rank"
            )
        pairs[path] = (a, b)
    return pairs


def _fused(config: ModelConfig, adapter: Adapter, step: Step, pairs: list[Pair | None]) -> Pair:
    """Return a [in, rank] and b [rank, out] of one tensor of theirs, from those of its parts that have an adapter."""
    width = step.parts[-1].stop
    there = [(part, *pair) for part, pair in zip(step.parts, pairs, strict=True) if pair is not None]
    blocks = []
    for part, a, b in there:
        block = np.zeros((adapter.rank, width), np.float32)
        block[:, part.start : part.stop] = b[part.index] * np.float32(matrix_multiplier(config, part.leaf))
        blocks.append((a[part.index], block))
    first = blocks[0][0]
    if all(np.array_equal(a, first) for a, _ in blocks):
        return first, np.sum([block for _, block in blocks], axis=0)
    return np.concatenate([a for a, _ in blocks], axis=1), np.concatenate([block for _, block in blocks])


def _suffixes(names: Mapping[str, Any], others: list[str]) -> list[str]:
    """Return the shortest ends of module names that fit all of `names` and none of the others."""
    found = set()
    for name in names:
        words = name.split(".")
        ends = (".".join(words[-length:]) for length in range(1, len(words) + 1))
        found.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(found)


def _modules_named(folder: Path, config: ModelConfig, pairs: Mapping[str, Any]) -> dict[str, Step]:
    """Return the step of every adapted module, of the first family that has them all. Raises InputError."""
    unknown: list[str] = []
    for family in FAMILIES.values():
        try:
            modules = {step.name: step for step in _modules(family, config).values()}
        except InputError:  # a family that cannot hold this architecture
            continue
        names = {name: family.base_name(f"{name}.weight") for name in pairs}
        missing = [name for name, base in names.items() if not _has_target(modules.get(base))]
        if not missing:
            found = {name: modules[base] for name, base in names.items()}
            _check_shapes(folder, found, pairs)
            return found
        unknown = missing if not unknown or len(missing) < len(unknown) else unknown
    name = (unknown or list(pairs))[0]
    raise InputError(
        f"{folder} adapts {name}, which is no matrix that takes an adapter in a model of this config; give an "
        "adapter of this model, without tables and routers"
    )


def _has_target(step: Step | None) -> bool:
    return step is not None and all(target_of(part.leaf) is not None for part in step.parts)


def _check_shapes(folder: Path, modules: Mapping[str, Step], pairs: Mapping[str, Pair]) -> None:
    for name, (a, b) in pairs.items():
        shape = modules[name].shape if modules[name].row.transposed else modules[name].shape[::-1]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape or not a.size:
            raise InputError(
                f"{folder} changes {name} by lora_A {list(a.shape)} and lora_B {list(b.shape)}, but the model's is "
                f"{shape[0]} × {shape[1]}; give an adapter of this model"
            )


def _read_record(folder: Path) -> Raw:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one with {CONFIG} and {TENSORS}")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}; give a folder that PEFT's save_pretrained wrote")
    raw = read_json(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG}: peft_type={raw.get('peft_type')!r} is not supported; isoflop reads LORA")
    for key, neutral in _NEUTRAL.items():
        if raw.get(key) and raw[key] != neutral:
            raise InputError(
                f"{folder / CONFIG}: {key}={raw[key]!r} is not supported; isoflop reads adapters that change matrices "
                "of attention and feed-forward and nothing else"
            )
    if raw.get("init_lora_weights") not in _STARTS:
        raise InputError(
            f"{folder / CONFIG}: init_lora_weights={raw['init_lora_weights']!r} changes the base too; convert the "
            "adapter to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    return raw


def _read_pairs(folder: Path) -> dict[str, Pair]:
    """Return lora_A and lora_B of every module, by the module's name."""
    if not (folder / TENSORS).is_file():
        pickle = "; adapter_model.bin is a pickle and not read" if (folder / "adapter_model.bin").is_file() else ""
        raise InputError(f"{folder} has no {TENSORS}{pickle}; save the adapter with PEFT's save_pretrained")
    tensors = read_tensors(folder / TENSORS)
    names = {name[: -len(_A)] for name in tensors if name.endswith(_A)}
    wanted = {f"{name}{end}" for name in names for end in (_A, _B)}
    for name in sorted(tensors.keys() ^ wanted):
        state = "lacks" if name in wanted else "holds"
        raise InputError(f"{folder / TENSORS} {state} the tensor {name}; isoflop reads pairs of lora_A and lora_B")
    if not names:
        raise InputError(f"{folder / TENSORS} holds no tensors; give an adapter that was trained")
    if odd := [name for name in sorted(names) if not name.startswith(_PREFIX)]:
        raise InputError(f"{folder / TENSORS} holds {odd[0]}{_A}, whose name does not start with {_PREFIX}")
    pair = lambda name: tuple(np.asarray(tensors[f"{name}{end}"], np.float32) for end in (_A, _B))
    return {name.removeprefix(_PREFIX): pair(name) for name in sorted(names)}  # type: ignore[misc]


def _number(folder: Path, raw: Raw, key: str, default: float) -> float:
    value = raw.get(key, default)
    check_number(f"{folder / CONFIG}: {key}", value, above=0)
    return value


def _of_pattern(folder: Path, raw: Raw, key: str, name: str, default: float) -> float:
    """Return a module's own number: that of the first pattern that the end of its name matches."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{folder / CONFIG}: {key}={patterns!r} must be an object of module names and numbers")
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return _number(folder, patterns, pattern, default)
        except re.error:
            raise InputError(f"{folder / CONFIG}: {key} has {pattern!r}, which is no regular expression") from None
    return default


def _check_target_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise InputError(f"{folder} exists and holds no adapter; give another folder")


def _write(folder: Path, record: Raw, tensors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        whole = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
        save_file(whole, partial / TENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(partial / CONFIG, partial / TENSORS)  # safetensors lets only the owner read
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
