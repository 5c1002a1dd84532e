"""Implement `isoflop model list` and `show`: architectures and their accounting."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.commands.models import holdings, tables
from experiments.commands.options import JsonFile, Overrides

if TYPE_CHECKING:
    from model import Execution, ModelConfig


def list_presets(*, json: JsonFile = None) -> None:
    """List all presets in a table: first isoflop's own, then released models.

    Example: isoflop model list

    Args:
        json: Also write the table to this file, with exact numbers and the published counts.
    """
    from experiments.commands.options import console, write_document
    from model import presets

    rows = [_summary(name) for name in presets.names()]
    write_document(json, {"presets": rows})
    out = console()
    out.print(tables.preset_table(rows))
    out.print(tables.PRESET_NOTE, highlight=False, style="dim")


def _summary(name: str) -> dict[str, Any]:
    from model import accounting, presets

    preset = presets.lookup(name)
    config, counts = preset.config, accounting.parameters(preset.config)
    return {
        "name": name,
        "layers": config.num_layers,
        "encoder_layers": config.num_encoder_layers if config.stack == "encoder-decoder" else 0,
        "d_model": config.d_model,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "context": config.max_seq_len,
        "vocabulary": config.vocab_size,
        "parameters": counts.total,
        "active": counts.active,
        "cache_bytes_per_token": accounting.kv_cache_bytes(config, 1, 1, "bfloat16"),
        "cache_bytes_of_context": accounting.kv_cache_bytes(config, 1, config.max_seq_len, "bfloat16"),
        "released_parameters": preset.released_parameters,
        "source": preset.source,
    }


def show(
    preset: tyro.conf.Positional[str],
    *,
    set: Overrides = (),
    seq_len: int | None = None,
    batch: int = 1,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    mesh: str | None = None,
    json: JsonFile = None,
) -> None:
    """Show parameters by group, FLOPs per token and memory of one architecture; for a preset no array is made.

    Example: isoflop model show llama3-8b --set num_layers=24 --seq-len 4096 --batch 8

    Example: isoflop model show runs/first

    Args:
        preset: A preset (see `isoflop model list`), a JSON file of a model config, or what holds a model: a run
            directory, a Hugging Face folder or a GGUF file.
        set: Fields to change, such as num_layers=4.
        seq_len: Length of the rows that FLOPs and memory are counted for; the context by default.
        batch: Rows that the cache is counted for.
        dtype: Precision of weights and cache in serving.
        mesh: Also show what each device of such a mesh holds in training, e.g. data=2,fsdp=4; it need not exist.
        json: Also write the numbers to this file.
    """
    from experiments.commands.options import console, write_document
    from experiments.inputs import read_changes
    from experiments.models import is_stored, read_config
    from experiments.runs.started import in_words, started_from_weights
    from model.errors import InputError, check_whole
    from model.runs import load_config, read_record
    from model.sharding import parse_mesh
    from model.store import open_parameters
    from train.overlay import overlay_program

    started = None
    if (Path(preset) / "run.json").is_file():
        own, started = load_config(preset), started_from_weights(Path(preset), read_record(preset))
    else:
        own = open_parameters(preset)[0] if is_stored(preset) else read_config(preset)
    config, execution = overlay_program(read_changes(set), own)
    started = started if config == own else None  # training does not change the shape
    seq_len = config.max_seq_len if seq_len is None else seq_len
    check_whole("--batch", batch, 1)
    check_whole("--seq-len", seq_len, 1)
    if seq_len > config.max_seq_len:
        raise InputError(
            f"--seq-len {seq_len} exceeds the context; give at most {config.max_seq_len}, "
            f"or --set max_seq_len={seq_len} too"
        )
    held = None if mesh is None else holdings.holdings(config, parse_mesh(mesh))
    document = _accounting(config, seq_len, batch, dtype, started) | {"started": started}
    document |= {"published": _published(preset, config), "mesh": held}
    document["attention_kernels"] = _kernels(config, seq_len, execution)
    write_document(json, document)
    out = console()
    out.print(f"{preset}: {tables.describe(config)}", highlight=False, markup=False, style="bold")
    out.print(tables.fields(config), highlight=False, markup=False, style="dim")
    if started is not None:
        out.print(f"{in_words(started)}.", highlight=False, markup=False, soft_wrap=True)
    out.print()
    out.print(tables.parameter_table(document))
    if document["published"] is not None:
        out.print(f"Published: {document['published']['source']}.", highlight=False, style="dim")
    out.print()
    out.print(tables.flops_table(document))
    for note in tables.flops_notes(config):
        out.print(note, highlight=False, style="dim")
    out.print()
    out.print(tables.memory_table(document))
    for layers, (kernel, reason) in document["attention_kernels"].items():
        said = f"Attention of {layers} layers is trained by {kernel} on this machine: {reason}."
        out.print(said, highlight=False, markup=False, style="dim")
    if held is not None:
        out.print()
        out.print(holdings.mesh_table(held))
        out.print(holdings.MESH_NOTE, highlight=False, style="dim")


def _accounting(
    config: "ModelConfig", seq_len: int, batch: int, dtype: str, started: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the accounting of a model. started: for a run that started from weights, which of them are trained."""
    from model import accounting
    from model.products import ALL, Trained

    trained, held = ALL, {}
    if started is not None:
        trained = Trained(tuple(started["trainable"])) if started["trainable"] else ALL
        if (adapter := started["adapter"]) is not None:
            trained = Trained.factors(adapter["rank"], tuple(adapter["targets"]))
        held = {name: started[name]["bytes"] for name in ("trained", "frozen")}
    counts = accounting.parameters(config)
    flops: dict[str, float] = {
        f"{mode} FLOPs per token ({convention})": accounting.flops_per_token(
            config, seq_len, convention, training, trained=trained
        )
        for mode, training in (("training", True), ("forward", False))
        for convention in ("6N", "exact")
    }
    return {
        "config": config.to_dict(),
        "parameters": {
            "total": counts.total,
            "embedding": counts.embedding,
            "non_embedding": counts.non_embedding,
            "active": counts.active,
            "by_group": counts.by_group,
        },
        "seq_len": seq_len,
        "batch": batch,
        "dtype": dtype,
        "flops_per_token": flops,
        "forward_flops_exact_by_product": accounting.forward_flops_by_product(config, seq_len),
        "training_flops_exact_by_product": accounting.training_flops_by_product(config, seq_len, trained=trained),
        "kv_cache_bytes": accounting.kv_cache_bytes(config, batch, seq_len, dtype),
        "training_bytes": accounting.training_bytes(config, **held),
        "serving_bytes": accounting.serving_bytes(config, batch, seq_len, dtype),
    }


def _kernels(config: "ModelConfig", seq_len: int, execution: "Execution") -> dict[str, tuple[str, str]]:
    """Return the kernel of each kind of layer on this machine, and why; "none" if the requested one is unsupported."""
    from model.errors import InputError
    from model.kernels import kernels_of

    try:
        return kernels_of(config, seq_len, execution)
    except InputError as error:
        return {"all": ("none", str(error))}


def _published(name: str, config: "ModelConfig") -> dict[str, Any] | None:
    """Return the released model's parameter count if `config` is still its architecture; None for our own presets."""
    from model import presets

    if name not in presets.names() or presets.get(name) != config:
        return None
    preset = presets.lookup(name)
    if preset.released_parameters is None:
        return {"parameters": None, "source": "nowhere: an architecture of our own, not a released model"}
    return {"parameters": preset.released_parameters, "source": preset.source}
