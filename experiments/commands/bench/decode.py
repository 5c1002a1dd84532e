"""Implement `isoflop bench decode`: the generation speed of a model on this machine."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.commands.options import BasePath, JsonFile, PlotFile

if TYPE_CHECKING:
    from experiments.bench.decode.cells import Cell
    from experiments.bench.serve.measures import Limits
    from model import ModelConfig, Params

QUIET = 0.5  # load average above which other programs distort a measurement


def decode(
    model: tyro.conf.Positional[str],
    *,
    batch: tuple[int, ...] = (1, 8),
    prompt: tuple[int, ...] = (32,),
    context: tuple[int, ...] = (),
    base: BasePath = None,
    weights: tuple[str, ...] = ("float32",),
    cache: tuple[str, ...] = (),
    kv_heads: tuple[int, ...] = (),
    grid: JsonFile = None,
    steps: int = 32,
    repeats: int = 7,
    against: tuple[Literal["transformers", "torch", "llama.cpp"], ...] = (),
    rounds: int = 5,
    load: tuple[float, ...] = (),
    requests: int = 32,
    slots: int = 8,
    ttft_limit: float | None = None,
    tpot_limit: float | None = None,
    seed: int = 0,
    format: Literal["table", "json", "jsonl", "csv", "md"] = "table",
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Measure latency, throughput and roofline of prefill and decode over a grid; every axis takes several values.

    A cell that fails, out of memory or otherwise, becomes a row with its error. Seconds per step are measured in a loop
    on the device. The latency per token with the host waiting for each token is given as well. Compile time is
    separate. The machine's ceilings (bytes read per second, FLOP/s of a product) are measured several times before and
    after in the same run; their spread enters the interval of a step's share of its bound.

    Example: isoflop bench decode runs/first --batch 1 4 16 --prompt 32 96 --json decode.json --plot decode.svg

    Example: isoflop bench decode gpt2-small --kv-heads 1 4 12 --cache float32 int8 --context 512

    Example: isoflop bench decode smollm2.gguf --batch 1 --against transformers torch llama.cpp

    Example: isoflop bench decode smollm2.gguf --load 1 2 4 --requests 64 --ttft-limit 0.5 --tpot-limit 0.1

    Args:
        model: A run directory, a Hugging Face folder, a GGUF file, or a preset (random weights).
        batch: Rows decoded at a time.
        prompt: Tokens prefilled in each row.
        context: Tokens in the cache when decoding begins; by default the prompt.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
        weights: How weights are stored, such as float32 or bfloat16.
        cache: How the cache is stored: float32, bfloat16 or int8; by default the compute precision.
        kv_heads: Numbers of KV heads, for presets only.
        grid: A JSON file with a list of cells instead: [{"batch": 1, "prompt": 32, "weights": "bfloat16"}, …].
        steps: Tokens decoded in each repeat.
        repeats: Measurements of each cell.
        against: Programs to compare with, on the same weights, in interleaved rounds; ISOFLOP_TRANSFORMERS_PYTHON,
            ISOFLOP_TORCH_PYTHON and ISOFLOP_LLAMA_PYTHON name the Python that has them.
        rounds: With --against, turns that each contender gets.
        load: Rates in requests per second at which the serving engine is loaded, instead of the grid.
        requests: With --load, how many requests arrive at each rate.
        slots: With --load, rows that the engine decodes at a time.
        ttft_limit: With --load, seconds to the first token within which a request counts as good.
        tpot_limit: With --load, seconds per further token within which a request counts as good.
        seed: Of random weights, and of the load's arrivals and prompts.
        format: How the cells are printed.
        json: Also write every number, with the raw samples, to this file.
        plot: Also draw throughput against latency, and the roofline (.svg, .png or .pdf).
    """
    from experiments.bench.decode.cells import grid as combine
    from experiments.bench.decode.grid import check_grid, read_grid
    from experiments.bench.document import describe
    from experiments.bench.serve.measures import Limits
    from experiments.commands.options import check_plot, say_unused, write_document, write_plot
    from experiments.inputs import read_json
    from experiments.words import say
    from model.errors import InputError

    check_plot(plot)
    axes = {"batch": batch, "prompt": prompt, "context": context, "weights": weights, "cache": cache}
    if grid is not None:
        say_unused("with --grid, which gives all axes", decode, **axes, kv_heads=kv_heads)
    if not load:
        of_load = {"requests": requests, "slots": slots, "ttft_limit": ttft_limit, "tpot_limit": tpot_limit}
        say_unused("without --load", decode, **of_load)
    else:
        say_unused("with --load", decode, batch=batch, against=against, plot=plot)
        for name, values in {**axes, "kv_heads": kv_heads}.items():
            if name != "batch" and len(values) > 1:
                say(f"--load is of one kind of requests: of --{name.replace('_', '-')}, the first value {values[0]}")
    if not against:
        say_unused("without --against", decode, rounds=rounds)
    config, build, is_random = _open(model, base, seed)
    cells = (
        read_grid(read_json(grid), str(grid))
        if grid is not None
        else combine(batch=batch, prompt=prompt, context=context, weights=weights, cache=cache, kv_heads=kv_heads)
    )
    check_grid(config, cells, steps, repeats)
    if not is_random and any(cell.kv_heads is not None for cell in cells):
        raise InputError(f"kv_heads changes a preset with random weights; {model} has weights of its own")
    document = describe(config, model, is_random)
    if load:
        limits = Limits(ttft_limit, tpot_limit)
        _load(document, build, cells[0], load, requests, slots, steps, seed, limits, format, json)
        return
    interrupted = _measure(document, config, build, cells, steps, repeats)
    if against and not interrupted:
        write_document(json, document)  # keep what is measured even if the comparison fails
        from experiments.bench.decode.against_peers import CONVENTION, bench_against

        document["against"] = bench_against(build(None), cells, against, steps=steps, rounds=rounds)
        document["against_convention"] = CONVENTION
    write_document(json, document)
    _show(document, format)
    if plot is not None:
        from experiments.bench.decode.figures import draw

        write_plot(plot, draw(document), "throughput against speed, and the roofline of a decode step")
    if interrupted:
        print(f"isoflop: stopped after {len(document['cells'])} of {len(cells)} cells", file=sys.stderr)
        sys.exit(130)


def _open(
    model: str, base: Path | None, seed: int
) -> "tuple[ModelConfig, Callable[[int | None], tuple[ModelConfig, Params]], bool]":
    """Return (config, function that builds the model with a number of KV heads, whether its weights are random)."""
    import jax

    from experiments.models import is_stored, read_config
    from model import init
    from model.errors import InputError
    from model.store import open_parameters

    if is_stored(model):
        config, params = open_parameters(model, base)
        return config, lambda _: (config, params), False
    if base is not None:
        raise InputError(f"{model} is not a run and has no base weights; leave --base out")
    config = read_config(model)

    def build(count: int | None) -> "tuple[ModelConfig, Params]":
        shape = config if count is None else config.replace(num_kv_heads=count)
        return shape, init(shape, jax.random.key(seed))

    return config, build, True


def _measure(
    document: dict[str, Any], config: "ModelConfig", build: Any, cells: "list[Cell]", steps: int, repeats: int
) -> bool:
    """Add ceilings and cells to the document, and return whether Ctrl-C ended the measurement early."""
    from experiments.bench.ceilings import best_of, measure_ceilings
    from experiments.bench.decode.grid import run_grid
    from experiments.bench.decode.roofline import NOTE, add_shares

    interrupted: list[bool] = []
    ceilings = measure_ceilings(config.compute_dtype)
    rows = run_grid(
        build,
        config,
        cells,
        steps=steps,
        repeats=repeats,
        stopped=lambda: interrupted.append(True),
    )
    if not interrupted:
        ceilings = best_of(ceilings, measure_ceilings(config.compute_dtype))
    add_shares(rows, ceilings)
    document |= {"ceilings": ceilings.to_dict(), "bytes_convention": NOTE, "cells": rows}
    return bool(interrupted)


def _load(
    document: dict[str, Any],
    build: Any,
    cell: "Cell",
    rates: tuple[float, ...],
    requests: int,
    slots: int,
    steps: int,
    seed: int,
    limits: "Limits",
    form: str,
    json: Path | None,
) -> None:
    from experiments.bench.serve.in_process import bench_load
    from experiments.commands.options import write_document
    from infer import prepare
    from infer.engine import Engine

    config, params = build(cell.kv_heads)
    prepared = prepare(config, params, cell.weights)
    capacity = min(2 * cell.prompt + steps, config.max_seq_len)
    document["load"] = bench_load(
        lambda: Engine(config, prepared, slots=slots, capacity=capacity),
        config.vocab_size,
        rates,
        requests=requests,
        prompt=cell.prompt,
        max_new_tokens=steps,
        seed=seed,
        limits=limits,
    )
    document |= {"cells": [], "slots": slots, "seed": seed}
    write_document(json, document)
    _show(document, form)


def _show(document: dict[str, Any], form: str) -> None:
    from experiments.bench.render import against_table, cell_tables, load_table, render, words_of
    from experiments.commands.options import console, new_table

    if form != "table":
        print(render(document, form))  # type: ignore[arg-type]
        return
    tables = cell_tables(document["cells"]) if document["cells"] else []
    if document.get("against"):
        tables.append(("medians of interleaved rounds; slowest … fastest", *against_table(document["against"])))
    if document.get("load"):
        tables.append(("requests that arrive at random; medians (p99)", *load_table(document["load"])))
    out = console()
    for title, header, lines in tables:
        table = new_table(*("\n".join(name.rsplit(" ", 1)) for name in header), title=title)  # narrow: many columns
        for line in lines:
            table.add_row(*line)
        out.print(table)
        out.print()
    for row in document["cells"] + document.get("against", []) + document.get("load", []):
        if words := row.get("error") or row.get("note"):
            print(f"{words_of(row)}: {words}")
    _say_how(document)


def _say_how(document: dict[str, Any]) -> None:
    from experiments.bench.render import ceilings_in_words

    if "ceilings" in document:
        own = "random" if document["random_weights"] else "its own"
        print(
            f"{document['model']} ({own} weights, config {document['config_hash']}) on {document['device']['host']}: "
            f"{ceilings_in_words(document['ceilings'])}. Bytes: {document['bytes_convention']}."
        )
    if "against" in document:
        print(f"Compared: {document['against_convention']}.")
    if any(row.get("share_of_read_bandwidth", 0.0) > 1 for row in document["cells"]):
        print(
            "Over 100 % of the memory bound: the weights fit a cache, which is faster than the memory that the ceiling "
            "is of, or the machine sped up between the two."
        )
    if document["load_average"] > QUIET:
        print(
            f"Other programs were running (load average {document['load_average']:.1f}): these numbers are of what "
            "they left; repeat it on a quiet machine."
        )
