"""Implement `isoflop model compress`: fewer bits, nonzero entries or layers, and the loss that this costs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.commands.options import BasePath, JsonFile

if TYPE_CHECKING:
    from model import ModelConfig, Params
    from model.store import Model

Method = Literal["float32", "bfloat16", "int8", "int8-dynamic", "int4", "magnitude", "wanda"]


def compress(
    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]],
    target: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]],
    *,
    method: Method = "int8",
    sparsity: float = 0.5,
    pattern: Literal["2:4"] | None = None,
    drop_layers: int = 0,
    data: Path | None = None,
    tokenizer: Path | None = None,
    base: BasePath = None,
    json: JsonFile = None,
    seq_len: int = 256,
    evaluate_tokens: int = 8192,
    batch_size: int = 8,
) -> None:
    """Write a compressed model, which every command opens like the original.

    Rounded weights (int8, int4) stay as they are stored, in a folder that isoflop alone reads; all other forms are
    Hugging Face folders, where zeros take as much room as any number.

    Example: isoflop model compress runs/first small --method int4 --data data/sotu --json compress.json

    Args:
        source: A run directory, a Hugging Face folder or a GGUF file.
        target: The folder to make; it appears when it is complete. A model written by isoflop before is replaced.
        method: The precision of the weights, or the score by which matrices are pruned.
        sparsity: Share of each output's inputs that pruning sets to zero.
        pattern: Prune two of every four neighbouring inputs instead.
        drop_layers: First remove this many layers: those that change the residual stream least.
        data: A folder made by `isoflop data prepare`: wanda, --drop-layers and --json read its text.
        tokenizer: The model's tokenizer, if its folder has none.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
        json: Compare every form on validation text, and write the numbers to this file too.
        seq_len: Tokens per row of the text.
        evaluate_tokens: Validation tokens that the comparison reads.
        batch_size: Rows per step of the comparison.
    """
    from experiments.commands.options import origin, output, say_fewer_tokens, say_unused, write_document
    from experiments.compress import INTERRUPTED
    from experiments.compress import report as measure
    from experiments.models import export_tokenizer, need_tokenizer
    from experiments.runs.started import check_target
    from infer import prepare
    from model.convert import save_hf
    from model.errors import InputError
    from model.quantized import RECORD, ROUNDED, save_quantized
    from model.store import open_model
    from model.tokenizer.files import save_tokenizer
    from model.weights import bytes_of
    from train.data import load_manifest

    if (source / RECORD).is_file():
        raise InputError(f"{source} is rounded already; give the model that it was made of")
    if data is None and (json is not None or drop_layers or method == "wanda"):
        raise InputError("wanda, --drop-layers and --json read text; give a data folder with --data")
    if method not in ("magnitude", "wanda"):
        say_unused(f"with --method {method}", compress, sparsity=sparsity, pattern=pattern)
    if json is None:
        say_unused("without --json", compress, evaluate_tokens=evaluate_tokens, batch_size=batch_size)
    elif data is not None:
        say_fewer_tokens(evaluate_tokens, load_manifest(data))
    check_target(source, target, base)
    opened = open_model(source, tokenizer, base)
    if data is not None:
        need_tokenizer(opened.tokenizer, source)
    config, params = _smaller(opened, method, sparsity, pattern, drop_layers, data, seq_len)
    with output(target):
        if method in ROUNDED:
            params = prepare(config, params, method)
            save_quantized(config, params, target, method)
        else:
            save_hf(config, params, target)
        if opened.tokenizer is not None:
            (save_tokenizer if method in ROUNDED else export_tokenizer)(opened.tokenizer, target)
    before = f"{opened.config.num_layers} layers, {bytes_of(opened.params):,} bytes as opened"
    print(f"{target}: {config.num_layers} layers, {bytes_of(params):,} bytes of weights (of {before})")
    if json is None:
        return
    assert data is not None
    rows = measure(
        opened.config,
        opened.params,
        data,
        tokenizer=opened.tokenizer,
        batch_size=batch_size,
        seq_len=seq_len,
        max_tokens=evaluate_tokens,
    )
    read = {"seq_len": seq_len, "max_tokens": evaluate_tokens}
    write_document(json, {"model": str(source)} | origin() | read | {"rows": rows})
    _print(rows)
    if rows[-1].get("reason") == INTERRUPTED:
        sys.exit(130)


def _smaller(
    opened: "Model",
    method: str,
    sparsity: float,
    pattern: str | None,
    drop: int,
    data: Path | None,
    seq_len: int,
) -> "tuple[ModelConfig, Params]":
    """Return the model without the dropped layers and pruned entries, in a plain precision."""
    import jax

    from experiments.compress import calibration_tokens
    from infer.compress import drop_layers, prune
    from model.convert import fold
    from model.quantized import ROUNDED

    config, params, calibration = opened.config, opened.params, None
    if drop or method not in ROUNDED:  # multipliers cannot be stored, and depend on the number of layers
        config, params = fold(config, params)
    if data is not None:
        seq_len = min(seq_len, config.max_seq_len)
        calibration = calibration_tokens(config, data, opened.tokenizer, rows=16, seq_len=seq_len)
    if drop:
        config, params = drop_layers(config, params, drop, calibration)
    if method in ("magnitude", "wanda"):
        params = prune(config, params, method, sparsity, pattern=pattern, calibration=calibration)
    dtype = "bfloat16" if method == "bfloat16" else "float32"
    return config, jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _print(rows: list[dict[str, Any]]) -> None:
    from experiments.commands.options import console, new_table

    batches = next((list(row["tokens_per_second"]) for row in rows if "reason" not in row), [])
    names = ("form", "bits/byte", "change", "agreement", *(f"tokens/s ({batch})" for batch in batches), "MB")
    table = new_table(*names, title="forms of the model; agreement: same likeliest token as the first row")
    for row in rows:
        if "reason" in row:
            table.add_row(row["form"], row["reason"])
            continue
        table.add_row(
            row["form"],
            f"{row['bits_per_byte']:.4f}",
            f"{row['change_percent']:+.2f} %",
            f"{100 * row['agreement']:.1f} %",
            *(f"{speed:,.1f}" for speed in row["tokens_per_second"].values()),
            f"{row['weight_bytes'] / 1e6:,.1f}",
        )
    console().print(table)
