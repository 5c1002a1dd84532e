"""Implement `isoflop bench score`: the speed of scoring continuations on this machine."""

from typing import Annotated

import tyro

from experiments.commands.bench.decode import QUIET
from experiments.commands.options import JsonFile


def score(
    model: tyro.conf.Positional[str],
    *,
    prefix: tuple[int, ...] = (100, 200, 400, 1000),
    continuation: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None,
    continuations: int = 4,
    contexts: int = 32,
    batch_size: int = 16,
    rounds: int = 5,
    seed: int = 0,
    json: JsonFile = None,
) -> None:
    """Measure `infer.score` with and without shared prefixes, against a plain forward pass with all logits.

    All contenders take turns on the same random requests: several continuations of each prefix, as in a multiple-choice
    benchmark. With four continuations, each a tenth as long as the prefix of 10 units, sharing reads 10 + 4 = 14 units
    of tokens instead of 4 · 11 = 44: it is at most about 3.1 times as fast. The plain pass is a jitted `apply` and a
    log-softmax on the batches of the unshared scores; it is left out if its logits would take over a GiB. Ratios are of
    speeds in the same round, above 1 if the first one is faster.

    Example: isoflop bench score study-256 --prefix 100 200 400 --json score.json

    Example: isoflop bench score runs/first --prefix 64 --continuation 8 --continuations 5 --contexts 200

    Args:
        model: A run directory, a Hugging Face folder, a GGUF file, or a preset (random weights).
        prefix: Tokens of a prefix; each length is a row of the table.
        continuation: Tokens of a continuation; by default a tenth of its prefix.
        continuations: Continuations of each prefix.
        contexts: Prefixes of each length.
        batch_size: Rows of a pass.
        rounds: Turns of each contender at each length.
        seed: Of random weights and of the tokens.
        json: Also write every number, with the raw samples, to this file.
    """
    import jax

    from experiments.bench.document import describe
    from experiments.bench.score import bench_score
    from experiments.commands.options import console, new_table, write_document
    from experiments.models import is_stored, read_config
    from model import init
    from model.store import open_parameters

    if is_stored(model):
        config, params = open_parameters(model)
    else:
        config = read_config(model)
        longest = max(length + (continuation or max(1, length // 10)) for length in prefix)
        config = config.replace(max_seq_len=max(config.max_seq_len, longest))
        params = init(config, jax.random.key(seed))
    document = describe(config, model, not is_stored(model)) | {"schema_version": 1, "batch_size": batch_size}
    document["rounds"] = rounds
    document["lengths"] = bench_score(
        config,
        params,
        prefixes=prefix,
        continuation=continuation,
        continuations=continuations,
        contexts=contexts,
        batch_size=batch_size,
        rounds=rounds,
        seed=seed,
    )
    write_document(json, document)
    names = ("prefix + continuation", "requests/s: shared", "unshared", "apply", "shared over unshared")
    table = new_table(
        *names, "unshared over apply", title=f"medians of {rounds} interleaved rounds (lowest … highest ratio)"
    )
    for row in document["lengths"]:
        speeds = [
            f"{row['requests'] / row[f'{name}_seconds']:,.1f}" if f"{name}_seconds" in row else "–"
            for name in ("shared", "unshared", "apply")
        ]
        ratios = [
            f"{row[name]:.2f} ({row[f'{name}_lowest']:.2f} … {row[f'{name}_highest']:.2f})" if name in row else "–"
            for name in ("shared_over_unshared", "unshared_over_apply")
        ]
        table.add_row(f"{row['prefix']:,} + {row['continuation']:,}", *speeds, *ratios)
    console().print(table)
    largest = max(row["largest_difference"] for row in document["lengths"])
    print(f"{continuations} continuations of each prefix; summed log-probabilities agree within {largest:.0e}.")
    if document["load_average"] > QUIET:
        print(f"Other programs were running (load average {document['load_average']:.1f}): better measure without.")
