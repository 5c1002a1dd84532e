"""Implement `isoflop bench train`: the training speed of a model on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from experiments.commands.options import JsonFile, Overrides

if TYPE_CHECKING:
    from model import ModelConfig
    from train import TrainConfig

_LOADED = (
    "Other programs were running (load average {:.1f}). They slow PyTorch most, whose threads wait for one another at "
    "every operation: repeat it on a quiet machine."
)


def train(
    preset: tyro.conf.Positional[str],
    *,
    set: Overrides = (),
    batch_size: int = 8,
    seq_len: int = 128,
    lanes: tuple[int, ...] = (1,),
    seconds: float = 5.0,
    against: Literal["torch", "transformers", "trl"] | None = None,
    method: Literal["sft", "dpo"] = "sft",
    lora: int = 0,
    compile: bool = False,
    rounds: int = 7,
    json: JsonFile = None,
) -> None:
    """Measure tokens per second and FLOP/s of the training step, alone and with several lanes of one program.

    The machine's ceilings are measured before and after; the variation of its product rate is part of the interval.
    `isoflop bench compare` compares two documents.

    With --against torch: interleaved with the same step of a PyTorch model of the same shape, weights and data, run by
    the Python that ISOFLOP_TORCH_PYTHON names (default: this one). With --against transformers: the model, a preset or
    a stored one, is trained by both libraries, and with --lora an adapter of it by isoflop and by PEFT; every
    contender is a process of its own, so that its peak memory can be measured. With --against trl: the same for
    fine-tuning by --method, with the step of TRL's trainer, on rows without padding and with a reference that is given.

    Example: isoflop bench train study-128 --lanes 1 4 --json train.json

    Example: isoflop bench train SmolLM2.gguf --batch-size 4 --seq-len 256 --against transformers --lora 8 --rounds 5

    Example: isoflop bench train SmolLM2.gguf --batch-size 4 --seq-len 256 --against trl --method dpo --lora 16

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config; with --against transformers or trl
            also a run, a Hugging Face folder or a GGUF file.
        set: Fields to change, of the model or of how it runs, such as num_layers=4 remat=dots.
        batch_size: Rows per step and lane.
        seq_len: Tokens per row.
        lanes: Trials per program, each measured; with 1 among them, also as ratios to it.
        seconds: Measuring time per number of lanes; not read with --against.
        against: Library to compare with.
        method: With --against trl: "sft", the tokens of answers, or "dpo", pairs of answers (twice the tokens).
        lora: With --against transformers or trl: also train an adapter of this rank; 0: none.
        compile: With --against transformers: also measure torch.compile.
        rounds: With --against, turns that each contender gets: of about a second, or of two steps.
        json: Also write every number to this file.
    """
    from experiments.bench.ceilings import best_of, measure_ceilings
    from experiments.bench.decode.roofline import share_interval
    from experiments.bench.document import describe
    from experiments.bench.render import ceilings_in_words
    from experiments.commands.options import console, new_table, say_unused, write_document
    from experiments.inputs import read_changes
    from experiments.models import read_config
    from experiments.sweep.speed import measure_step
    from model.errors import InputError
    from train import TrainConfig
    from train.overlay import overlay_program

    if against is None:
        say_unused("without --against", train, rounds=rounds)
    if against != "trl":
        say_unused("without --against trl", train, method=method)
    if against != "transformers":
        say_unused("without --against transformers", train, compile=compile)
    if against not in ("transformers", "trl"):
        say_unused("without --against transformers or trl", train, lora=lora)
    else:
        if lanes != (1,):
            raise InputError("--against compares one lane with one model: leave --lanes out")
        _train_against_transformers(
            preset,
            set,
            TrainConfig(batch_size=batch_size, seq_len=seq_len),
            method if against == "trl" else None,
            lora,
            compile,
            rounds,
            json,
        )
        return
    config = read_config(preset)
    config = config.replace(max_seq_len=max(config.max_seq_len, seq_len))
    config, execution = overlay_program(read_changes(set), config)
    shape = TrainConfig(batch_size=batch_size, seq_len=seq_len)
    shape.check(execution)
    if against is not None:
        if lanes != (1,):
            raise InputError("--against compares one lane with one model: leave --lanes out")
        _train_against_torch(config, shape, rounds, json)
        return
    about = describe(config, preset, random_weights=True) | {"schema_version": 1, "execution": execution.to_dict()}
    ceilings = measure_ceilings(config.compute_dtype)
    rows = [measure_step(config, shape, count, seconds, execution) for count in lanes]
    ceilings = best_of(ceilings, measure_ceilings(config.compute_dtype))
    alone = [row["tokens_per_second"] for row in rows if row["lanes"] == 1]
    for row in rows:
        row["tokens_per_second_over_one_lane"] = row["tokens_per_second"] / alone[0] if alone else None
        work = row["flops_exact_per_second"] * row["step_seconds"]
        row["share_of_matmul_peak"] = row["flops_exact_per_second"] / ceilings.matmul_flops_per_second
        row["share_of_matmul_peak_interval_95"] = share_interval(
            work, row["samples"]["step_seconds"], ceilings.matmul_flops_per_second_measured
        )
    document = {"batch_size": batch_size, "seq_len": seq_len, "ceilings": ceilings.to_dict(), "rows": rows}
    write_document(json, about | document)
    names = ("lanes", "tokens/s", "over one lane", "slowest … fastest", "FLOP/s (6ND)", "FLOP/s (exact)")
    table = new_table(
        *names, "of peak (95%)", "ms per step", "compile s", title="medians; tokens and FLOPs of all lanes together"
    )
    for row in rows:
        table.add_row(
            str(row["lanes"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_over_one_lane']:.2f}" if alone else "",
            f"{row['tokens_per_second_slowest']:,.0f} … {row['tokens_per_second_fastest']:,.0f}",
            f"{row['flops_6nd_per_second']:.3g}",
            f"{row['flops_exact_per_second']:.3g}",
            "{:.0%} ({:.0f} … {:.0f})".format(
                row["share_of_matmul_peak"], *(100 * bound for bound in row["share_of_matmul_peak_interval_95"])
            ),
            f"{1e3 * row['step_seconds']:.1f}",
            f"{row['compile_seconds']:.1f}",
        )
    console().print(table)
    print(f"On {about['device']['host']}: {ceilings_in_words(ceilings.to_dict())}.")


def _train_against_torch(config: "ModelConfig", train_config: "TrainConfig", rounds: int, json: Path | None) -> None:
    import os

    from experiments.bench.train.against_torch import bench_against_torch
    from experiments.commands.options import console, new_table, origin, write_document

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU both must find memory
    result = bench_against_torch(config, train_config, rounds=rounds)
    about = origin()
    about["versions"] |= {"torch": result.torch_version}
    write_document(json, about | {"config": config.to_dict()} | result.to_dict())
    names = ("step of", "tokens/s", "slowest … fastest", "isoflop over this", "at best", "FLOP/s (exact)", "compile s")
    table = new_table(*names, title=f"medians of {rounds} interleaved rounds (slowest … fastest)")
    for row in result.contenders:
        table.add_row(
            row.name,
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_second_slowest:,.0f} … {row.tokens_per_second_fastest:,.0f}",
            row.ratio_in_words,
            "" if row.name == "isoflop" else f"{row.isoflop_over_this_at_best:.2f}",
            f"{row.flops_exact_per_second:.3g}",
            f"{row.compile_seconds:.1f}",
        )
    console().print(table)
    cores = f" on {result.torch_threads} threads" if about["device"]["platform"] == "cpu" else ""
    console().print(
        f"Compared: whole training steps (forward, backward, clipping, AdamW) in {config.compute_dtype} of "
        f"{result.parameters:,} parameters on {train_config.batch_size} × {train_config.seq_len} tokens, with "
        f"PyTorch {result.torch_version}{cores}; same weights, data and losses "
        f"(within {result.loss_difference:.0e})."
    )
    if result.load_average > 0.5:
        console().print(_LOADED.format(result.load_average))


def _train_against_transformers(
    model: str,
    changes: tuple[str, ...],
    train_config: "TrainConfig",
    method: Literal["sft", "dpo"] | None,
    lora: int,
    compiled: bool,
    rounds: int,
    json: Path | None,
) -> None:
    import jax

    from experiments.bench.train.against_transformers import bench_against_transformers
    from experiments.commands.options import console, new_table, origin, write_document
    from experiments.inputs import read_changes
    from experiments.models import is_stored, read_config
    from model import init
    from model.store import open_parameters
    from train.overlay import overlay_program

    if is_stored(model):
        config, params = open_parameters(model)
    else:
        config = read_config(model)
        params = init(config, jax.random.key(0))
    config, execution = overlay_program(read_changes(changes), config)
    modes = ("eager", "compile") if compiled else ("eager",)
    result = bench_against_transformers(
        config, params, train_config, rank=lora, rounds=rounds, modes=modes, method=method, execution=execution
    )
    about = origin()
    about["versions"] |= result.versions
    numbers = result.to_dict()
    del numbers["versions"]  # which stand with our own
    shape = {"batch_size": train_config.batch_size, "seq_len": train_config.seq_len, "method": method}
    write_document(json, about | {"schema_version": 1, "model": model, "config": config.to_dict()} | shape | numbers)
    names = ("trained", "step of", "tokens/s", "slowest … fastest", "isoflop over this", "peak memory", "compile s")
    table = new_table(*names, title=f"medians of {rounds} interleaved rounds (slowest … fastest)")
    for kind in result.kinds:
        for row in kind.contenders:
            table.add_row(
                kind.trained,
                row.name,
                f"{row.tokens_per_second:,.1f}",
                f"{row.tokens_per_second_slowest:,.1f} … {row.tokens_per_second_fastest:,.1f}",
                row.ratio_in_words,
                f"{row.peak_bytes / 1e9:.2f} GB",
                f"{row.compile_seconds:.1f}",
            )
    console().print(table)
    for kind in result.kinds:
        console().print(
            f"{kind.trained}: {kind.trained_parameters:,} of {kind.parameters:,} parameters are trained; the "
            f"first losses agree within {kind.loss_difference:.0e}."
        )
    if result.load_average > 0.5:
        console().print(_LOADED.format(result.load_average))
