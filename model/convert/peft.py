"""Low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors ↔ `model.adapters`.

PEFT has a pair lora_A [rank, in], lora_B [out, rank] for every matrix of the Hugging Face model, even if the matrix is
stored as [in, out]. In isoflop the pair is a [in, rank], b [rank, out]: the transposes. Some matrices of Transformers
fuse several of isoflop's (GPT-2's c_attn, Phi-3's qkv_proj). Such a pair is read as the same `a` for each fused matrix
and its columns of `b`. It is written with the `a`s concatenated and `b` block diagonal, of rank r times the number of
fused matrices, or of rank r if all `a` are equal. Both are exact.

The matrices of a model under muP or depth scaling are exported with their multipliers (`model.convert.fold`), and so
are the adapters.
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
from model.config import ModelConfig
from model.convert.entries import Raw
from model.convert.families import FAMILIES
from model.convert.family import Family
from model.convert.fold import folded, matrix_multiplier
from model.convert.huggingface import choose_family, save_hf
from model.convert.plan import Leaf, TensorPlan, plan_tensors, shapes_of
from model.convert.tensors import read_json, read_tensors
from model.errors import InputError, check_number
from model.records import check_output_folder
from model.store import open_parameters
from model.weights import is_weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TASKS = {"language-model": "CAUSAL_LM"}
Pair = tuple[np.ndarray, np.ndarray]
"""Two factors of one matrix: (a, b) in isoflop, (lora_A, lora_B) in PEFT."""
# Keys of adapter_config.json that isoflop does not support, with the values that have no effect.
_NEUTRAL: Raw = {
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "use_bdlora"), False),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"), None),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"), None),
    "monteclora_config": None,
    "bias": "none",
}
# Values of init_lora_weights that leave the base unchanged; others subtract the initial adapter from the base.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_peft(
    config: ModelConfig,
    adapter: Adapter,
    tree: dict,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    model_type: str | None = None,
) -> None:
    """Write an adapter for PEFT, to be loaded onto the folder that `save_hf` writes of the base.

    The folder is renamed into place when it is complete. For a lane of smaller rank, pass `first_columns(tree, rank)`
    and the Adapter of that rank and alpha. base: name or folder of the base, for PEFT to find it. model_type: of the
    base's folder; None: as `save_hf` chooses. Raises InputError if the folder has other files than an adapter's, if the
    adapter does not fit the config, and like `save_hf` for the architecture.
    """
    folder = Path(folder).absolute()
    check_output_folder(folder, "an adapter", f"has no {CONFIG}", replaceable=(folder / CONFIG).is_file())
    standard = folded(config)
    family, _ = choose_family(standard, model_type)
    leaves = _checked(config, adapter, tree)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    others: list[str] = []  # modules without an adapter
    transposed = set()
    written: set[Leaf] = set()
    for name, tensor in _modules(family, standard).items():
        pairs = [leaves.get(target.leaf) for target in tensor.slices]
        if not any(pairs):
            others.append(name)
            continue
        a, b = _fused(config, adapter, tensor, pairs)
        tensors |= {f"{_PREFIX}{name}{_A}": a.T, f"{_PREFIX}{name}{_B}": b.T}
        ranks[name] = a.shape[1]
        transposed.add(tensor.rule.transposed)
        written |= {target.leaf for target in tensor.slices}
    if missing := leaves.keys() - written:
        raise InputError(
            f"the adapter changes {'/'.join(min(missing))}, which {family.model_type} stores in no matrix of "
            "its own; write the merged model with `isoflop model merge`"
        )
    targets = _suffixes(ranks, others)
    wide = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
    # PEFT scales by alpha / rank, or by alpha / √rank if rank-stabilised: alpha grows so that the scale is the same.
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
    """Read a PEFT adapter for a model of this config.

    If modules have several ranks or scales (rank_pattern, alpha_pattern), the adapter has the largest rank, padded with
    zeros, and the common scale, with the ratio of each module's scale multiplied into `b`. Layers without an adapter
    have zeros. Raises InputError for damaged folders, for other methods than LoRA, for adapters on other parameters
    than the matrices of attention and feed-forward, and for an adapter of another model.
    """
    folder = Path(folder)
    raw = _read_record(folder)
    pairs = _read_pairs(folder)
    standard = folded(config)
    modules = _modules_named(folder, standard, pairs)
    default_alpha, default_rank = (_number(folder, raw, key, 8) for key in ("lora_alpha", "r"))
    stabilised = bool(raw.get("use_rslora"))

    def scale(alpha: float, rank: float) -> float:
        return alpha / (rank**0.5 if stabilised else rank)

    rank = max(a.shape[0] for a, _ in pairs.values())
    common_scale = scale(default_alpha, default_rank)
    shapes = shapes_of(standard)
    leaves: dict[Leaf, np.ndarray] = {}
    for name, (a, b) in pairs.items():
        module_rank = a.shape[0]
        alpha = _of_pattern(folder, raw, "alpha_pattern", name, default_alpha)
        recorded_rank = _of_pattern(folder, raw, "rank_pattern", name, default_rank)
        if recorded_rank != module_rank:
            raise InputError(
                f"{folder}: {name} has rank {module_rank} in {TENSORS} and {recorded_rank} by {CONFIG}; "
                "take both files from one save_pretrained"
            )
        scale_ratio = scale(alpha, module_rank) / common_scale
        for target in modules[name].slices:
            *stack, d_in, d_out = shapes[target.leaf]
            for factor, size in (("a", (*stack, d_in, rank)), ("b", (*stack, rank, d_out))):
                leaves.setdefault((*target.leaf, factor), np.zeros(size, np.float32))
            b_multiplier = scale_ratio / matrix_multiplier(config, target.leaf)
            leaves[(*target.leaf, "a")][target.index][:, :module_rank] = a.T
            leaves[(*target.leaf, "b")][target.index][:module_rank] = b[target.start : target.stop].T * b_multiplier
    targets = tuple(name for name in ALL_TARGETS if any(path[-3] == name for path in leaves))
    # The alpha that gives the common scale at the largest rank.
    alpha = default_alpha if rank == default_rank else common_scale * (rank**0.5 if stabilised else rank)
    adapter = Adapter(rank, alpha, stabilised, targets)
    return adapter, traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def merge_adapter(
    base: str | Path, adapter: str | Path, out: str | Path, base_of_run: str | Path | None = None
) -> None:
    """Write a Hugging Face folder of a model with an adapter merged into its float32 matrices.

    base: a path for `open_model`, with plain weights. adapter: a folder in PEFT's format. base_of_run: see
    `open_model`. Tokenizer files are left to the caller. Raises InputError like `load_peft` and `save_hf`, and for a
    base of quantized weights.
    """
    config, params = open_parameters(base, base_of_run)
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError(f"{base} has quantized weights; give the model from which it was made")
    description, tree = load_peft(adapter, config)
    file = Path(base) / "config.json"
    model_type = read_json(file).get("model_type") if file.is_file() else None
    merged = fold(attach(params, tree, *mask_and_scale(description)))
    save_hf(config, merged, out, model_type=model_type if model_type in FAMILIES else None)


def _modules(family: Family, config: ModelConfig) -> dict[str, TensorPlan]:
    """Return the weight tensor of every module, by the module's name in Transformers."""
    return {
        family.written_name(tensor.name, tensor.rule.outside, config).removesuffix(".weight"): tensor
        for tensor in plan_tensors(family.rules, config, shapes_of(config))
        if tensor.name.endswith(".weight")
    }


def _checked(config: ModelConfig, adapter: Adapter, tree: dict) -> dict[Leaf, Pair]:
    """Return (a, b) by path. Raises InputError unless their paths and shapes fit the config and the adapter."""
    shapes, leaves = adapted(config, adapter), traverse_util.flatten_dict(tree)
    pairs = {}
    for path in dict.fromkeys(path[:-1] for path in leaves):
        if path not in shapes or not {(*path, "a"), (*path, "b")} <= leaves.keys():
            raise InputError(
                f"the adapter changes {'/'.join(path)}, which is not among its targets in a model of this config"
            )
        a, b = (np.asarray(leaves[(*path, name)], np.float32) for name in ("a", "b"))
        *stack, d_in, d_out = shapes[path]
        if a.shape != (*stack, d_in, adapter.rank) or b.shape != (*stack, adapter.rank, d_out):
            raise InputError(
                f"the adapter has a {list(a.shape)} and b {list(b.shape)} at {'/'.join(path)}, not those of rank "
                f"{adapter.rank} for {list(shapes[path])}; give first_columns(tree, rank) and the Adapter of that rank"
            )
        pairs[path] = (a, b)
    return pairs


def _fused(config: ModelConfig, adapter: Adapter, tensor: TensorPlan, pairs: list[Pair | None]) -> Pair:
    """Return (a, b) of a tensor that fuses several matrices, of which some may have no adapter.

    For query, key and value fused, a is [a_q a_k a_v], of shape [in, 3 rank], and b is block diagonal, of shape
    [3 rank, out]. If all a are equal, they are one a [in, rank], and b is [b_q b_k b_v], of shape [rank, out].
    """
    width = tensor.slices[-1].stop
    a_blocks, b_blocks = [], []
    for target, pair in zip(tensor.slices, pairs, strict=True):
        if pair is None:
            continue
        a, b = pair
        block = np.zeros((adapter.rank, width), np.float32)
        block[:, target.start : target.stop] = b[target.index] * np.float32(matrix_multiplier(config, target.leaf))
        a_blocks.append(a[target.index])
        b_blocks.append(block)
    if all(np.array_equal(a, a_blocks[0]) for a in a_blocks):
        return a_blocks[0], np.sum(b_blocks, axis=0)
    return np.concatenate(a_blocks, axis=1), np.concatenate(b_blocks)


def _suffixes(names: Mapping[str, Any], others: list[str]) -> list[str]:
    """Return the shortest suffixes of module names that match all of `names` and none of the others.

    model.layers.0.self_attn.q_proj has the suffix q_proj, unless another module ends in it.
    """
    suffixes = set()
    for name in names:
        words = name.split(".")
        for length in range(1, len(words) + 1):
            suffix = ".".join(words[-length:])
            if not any(f".{other}".endswith(f".{suffix}") for other in others):
                suffixes.add(suffix)
                break
    return sorted(suffixes)


def _modules_named(folder: Path, config: ModelConfig, pairs: Mapping[str, Any]) -> dict[str, TensorPlan]:
    """Return the tensor of every adapted module, by the first family that has all of them, else raise InputError."""
    unknown: list[str] = []
    for family in FAMILIES.values():
        try:
            modules = {tensor.name: tensor for tensor in _modules(family, config).values()}
        except InputError:  # a family that cannot represent this architecture
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
        f"{folder} adapts {name}, which is not a matrix with an adapter in a model of this config; give an "
        "adapter of this model, without tables and routers"
    )


def _has_target(tensor: TensorPlan | None) -> bool:
    return tensor is not None and all(target_of(target.leaf) is not None for target in tensor.slices)


def _check_shapes(folder: Path, modules: Mapping[str, TensorPlan], pairs: Mapping[str, Pair]) -> None:
    for name, (a, b) in pairs.items():
        module = modules[name]
        shape = module.shape if module.rule.transposed else module.shape[::-1]  # [out, in]
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
    if raw.get("init_lora_weights") not in _INITS:
        raise InputError(
            f"{folder / CONFIG}: init_lora_weights={raw['init_lora_weights']!r} changes the base too; convert the "
            "adapter to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    return raw


def _read_pairs(folder: Path) -> dict[str, Pair]:
    """Return lora_A and lora_B of every module, by the module's name."""
    if not (folder / TENSORS).is_file():
        pickle = (
            "; adapter_model.bin is a pickle, which is not read" if (folder / "adapter_model.bin").is_file() else ""
        )
        raise InputError(f"{folder} has no {TENSORS}{pickle}; save the adapter with PEFT's save_pretrained")
    tensors = read_tensors(folder / TENSORS)
    names = {name[: -len(_A)] for name in tensors if name.endswith(_A)}
    wanted = {f"{name}{end}" for name in names for end in (_A, _B)}
    for name in sorted(tensors.keys() ^ wanted):
        state = "lacks" if name in wanted else "has"
        raise InputError(f"{folder / TENSORS} {state} the tensor {name}; isoflop reads pairs of lora_A and lora_B")
    if not names:
        raise InputError(f"{folder / TENSORS} has no tensors; give an adapter that was trained")
    if odd := [name for name in sorted(names) if not name.startswith(_PREFIX)]:
        raise InputError(f"{folder / TENSORS} has {odd[0]}{_A}, whose name does not start with {_PREFIX}")
    pairs = {}
    for name in sorted(names):
        lora_a, lora_b = tensors[f"{name}{_A}"], tensors[f"{name}{_B}"]
        pairs[name.removeprefix(_PREFIX)] = np.asarray(lora_a, np.float32), np.asarray(lora_b, np.float32)
    return pairs


def _number(folder: Path, raw: Raw, key: str, default: float) -> float:
    value = raw.get(key, default)
    check_number(f"{folder / CONFIG}: {key}", value, above=0)
    return value


def _of_pattern(folder: Path, raw: Raw, key: str, name: str, default: float) -> float:
    """Return the number of the first pattern that matches a suffix of the module's name, else the default."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{folder / CONFIG}: {key}={patterns!r} must be an object of module names and numbers")
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return _number(folder, patterns, pattern, default)
        except re.error:
            raise InputError(f"{folder / CONFIG}: {key} has {pattern!r}, which is not a regular expression") from None
    return default


def _write(folder: Path, record: Raw, tensors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        whole = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
        save_file(whole, partial / TENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(partial / CONFIG, partial / TENSORS)  # safetensors makes files readable by the owner only
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
