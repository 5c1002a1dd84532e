"""`isoflop bench`: how fast a model runs here."""

from pathlib import Path

import tyro

from experiments.commands.options import JsonFile


def decode(
    run: tyro.conf.Positional[Path],
    *,
    batch: tuple[int, ...] = (1, 8),
    context: tuple[int, ...] = (32, 96),
    steps: int = 16,
    repeats: int = 7,
    json: JsonFile = None,
) -> None:
    """Prefill and decode throughput over a grid of batch sizes and context lengths.

    Example: isoflop bench decode runs/first --batch 1 8 32 --context 32 96 --json decode.json

    Args:
        run: A run directory.
        batch: Batch sizes.
        context: Prompt lengths in tokens.
        steps: Tokens decoded after each prompt.
        repeats: Measurements per cell; medians are shown, the slowest and fastest stand in the JSON.
        json: Also write every number to this file.
    """
    from rich.table import Table

    from experiments.commands.options import console, write_document
    from experiments.decode.bench import bench_decode
    from train import load_run
    from train.run import describe_device, versions

    config, params = load_run(run)
    rows = bench_decode(config, params, batches=batch, contexts=context, steps=steps, repeats=repeats)
    write_document(
        json, {"device": describe_device(), "versions": versions(), "config": config.to_dict(), "cells": rows}
    )
    table = Table(title="medians; all rows of the batch together", title_justify="left")
    for name in ("batch", "context", "prefill tokens/s", "decode tokens/s", "slowest … fastest", "ms per step"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]),
            str(row["context"]),
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second_slowest']:,.0f} … {row['decode_tokens_per_second_fastest']:,.0f}",
            f"{1e3 * row['seconds_per_step']:.2f}",
        )
    console().print(table)
