"""`isoflop scaling plan|run|predict`: the runs of a scaling study, and what its law says of another one."""

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from experiments.commands.options import JsonFile
from model.errors import InputError

if TYPE_CHECKING:
    from experiments.scaling.plan import Recipe, Rung


def plan(
    *,
    data: Path,
    flops: tuple[float, ...],
    learning_rate: float = 1e-2,
    proxy_d_model: int = 32,
    batch_size: int = 8,
    seq_len: int = 128,
    json: JsonFile = None,
) -> None:
    """Lay out an IsoFLOP ladder: five sizes per budget around the expected optimum. Nothing is trained.

    Example: isoflop scaling plan --data data/sotu --flops 4e10 8e10 1.6e11 3.2e11

    Args:
        data: A folder made by `isoflop data prepare`.
        flops: Budgets C = 6·N·D, N with the embedding table.
        learning_rate: Best rate of the proxy (see `isoflop sweep run`); rungs take it times proxy / d_model.
        proxy_d_model: Width of that proxy.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        json: Also write the plan to this file.
    """
    from experiments.commands.options import write_document

    recipe, rungs, _ = _ladder(data, flops, learning_rate, proxy_d_model, batch_size, seq_len)
    write_document(json, {"rule": recipe.rule, "rungs": [rung.to_dict() for rung in rungs]})
    _show(recipe, rungs)


def run(
    *,
    data: Path,
    out: Path,
    flops: tuple[float, ...],
    learning_rate: float = 1e-2,
    proxy_d_model: int = 32,
    beta2: float = 0.95,
    seed: int = 0,
    batch_size: int = 8,
    seq_len: int = 128,
    json: JsonFile = None,
) -> None:
    """Train an IsoFLOP ladder, each run to its own horizon; the same command again resumes.

    Example: isoflop scaling run --data data/sotu --out ladder --flops 4e10 8e10 1.6e11 3.2e11

    OUT/runs.csv then goes into `isoflop scaling fit`.

    Args:
        data: A folder made by `isoflop data prepare`.
        out: The folder for the runs.
        flops: Budgets C = 6·N·D, N with the embedding table.
        learning_rate: Best rate of the proxy (see `isoflop sweep run`); rungs take it times proxy / d_model.
        proxy_d_model: Width of that proxy.
        beta2: Adam's second memory.
        seed: Of all runs.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        json: Also write the table to this file.
    """
    from experiments.commands.options import write_document
    from experiments.scaling.ladder import train_rungs, write_table
    from train import HParams, TrainConfig

    recipe, rungs, eos_id = _ladder(data, flops, learning_rate, proxy_d_model, batch_size, seq_len)
    _show(recipe, rungs)
    rows = train_rungs(
        recipe,
        rungs,
        HParams(beta2=beta2, seed=seed, final_fraction=0.0),
        TrainConfig(batch_size=batch_size, seq_len=seq_len),
        data=data,
        folder=out,
        eos_id=eos_id,
    )
    write_table(out / "runs.csv", rows)
    write_document(json, {"rule": recipe.rule, "runs": rows})
    print(f"{len(rows)} runs: {out / 'runs.csv'}; now: isoflop scaling fit {out / 'runs.csv'}")


def predict(
    table: tyro.conf.Positional[Path],
    *,
    flops: float | None = None,
    params: float | None = None,
    tokens: float | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    json: JsonFile = None,
) -> None:
    """What the parametric law of a table says of a run: its loss, or the best run of a budget.

    Example: isoflop scaling predict ladder/runs.csv --flops 1e12

    Args:
        table: Runs, one a row, with columns params, tokens, loss.
        flops: A budget C = 6·N·D: the optimal N and D are computed.
        params: N of a planned run; give tokens too.
        tokens: D of a planned run.
        bootstraps: Draws behind the interval.
        seed: Of the bootstrap.
        json: Also write the answer to this file.
    """
    from experiments.commands.options import write_document
    from experiments.scaling.parametric import fit_parametric
    from experiments.scaling.table import read_table

    if (flops is None) == (params is None) or (params is None) != (tokens is None):
        raise InputError("give either --flops, or --params and --tokens")
    runs = read_table(table)
    fit = fit_parametric(runs.params, runs.tokens, runs.loss, bootstraps=bootstraps, seed=seed)
    if flops is not None:
        best = fit.optimal(flops)
        params, tokens = float(best.params), float(best.tokens)
    assert params is not None
    assert tokens is not None
    low, high = fit.predict_interval(params, tokens, level=95)
    answer = {
        "params": params,
        "tokens": tokens,
        "flops": 6 * params * tokens,
        "loss": float(fit.predict(params, tokens)),
        "interval_95": [float(low), float(high)],
        "compute_over_largest_run": 6 * params * tokens / float((6 * runs.params * runs.tokens).max()),
    }
    write_document(json, answer)
    print(
        f"N {params:.4g}, D {tokens:.4g}, C {answer['flops']:.4g} FLOPs: loss {answer['loss']:.4f} nats per token "
        f"(95 %: {low:.4f} … {high:.4f}); {answer['compute_over_largest_run']:.2g} times the largest run of the table"
    )


def _ladder(
    data: Path, flops: tuple[float, ...], learning_rate: float, proxy: int, batch_size: int, seq_len: int
) -> "tuple[Recipe, list[Rung], int]":
    from experiments.scaling.plan import Recipe, plan_ladder
    from train.data import Loader, load_manifest

    for budget in flops:
        if not budget > 0:
            raise InputError(f"--flops {budget:g} must be positive")
    manifest = load_manifest(data)
    loader = Loader(data, batch_size=batch_size, seq_len=seq_len, seed=0)
    recipe = Recipe(
        vocab_size=manifest.vocab_size,
        batch_size=batch_size,
        seq_len=seq_len,
        tokens_per_epoch=loader.tokens_per_epoch,
        proxy_d_model=proxy,
        proxy_learning_rate=learning_rate,
    )
    return recipe, plan_ladder(recipe, sorted(flops)), manifest.eos_id


def _show(recipe: "Recipe", rungs: "list[Rung]") -> None:
    from rich.table import Table

    from experiments.commands.options import console

    table = Table(title=recipe.rule, title_justify="left")
    for name in ("budget", "d_model", "N", "D", "steps", "D / N", "epochs", "learning rate"):
        table.add_column(name, justify="right")
    for rung in rungs:
        table.add_row(
            f"{rung.budget:.3g}",
            str(rung.d_model),
            f"{rung.params:,}",
            f"{rung.tokens:,}",
            f"{rung.steps:,}",
            f"{rung.tokens / rung.params:.0f}",
            f"{rung.epochs:.2f}" + (" repeated" if rung.repeated else ""),
            f"{rung.learning_rate:.3g}",
        )
    console().print(table)
