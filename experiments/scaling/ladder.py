"""Training the rungs of a ladder: the runs of one shape are lanes of one program."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.scaling.plan import Recipe, Rung
from experiments.scaling.rows.table import Table, clean
from train import HParams, Result, Shell, TrainConfig, population
from train.files import write_atomically
from train.progress import progress_bar


def train_rungs(
    recipe: Recipe,
    rungs: Sequence[Rung],
    base: HParams,
    train_config: TrainConfig,
    *,
    data: Path,
    folder: Path,
    eos_id: int,
) -> list[dict[str, Any]]:
    """Train every rung to its own horizon; one row per rung, in the order of `rungs`.

    Resumable: a rung that is finished is not trained again. A row has the rung's fields and loss (validation, null
    if it diverged), status, seconds, run.
    """
    rows: dict[Rung, dict[str, Any]] = {}
    by_width = sorted(rungs, key=lambda rung: rung.d_model)
    with progress_bar("ladder", sum(rung.flops for rung in rungs)) as advance:
        for width, group in itertools.groupby(by_width, key=lambda rung: rung.d_model):
            members = list(group)
            results = train_shape(recipe, width, members, base, train_config, data=data, folder=folder, eos_id=eos_id)
            for rung, result in zip(members, results, strict=True):
                rows[rung] = row(rung, result)
            advance(sum(rung.flops for rung in members), f"d_model {width}")
    return [rows[rung] for rung in rungs]


def train_shape(
    recipe: Recipe,
    width: int,
    rungs: Sequence[Rung],
    base: HParams,
    train_config: TrainConfig,
    *,
    data: Path,
    folder: Path,
    eos_id: int,
) -> list[Result]:
    """All rungs of one width in one program."""
    hparams = [
        base.replace(learning_rate=rung.learning_rate, warmup_steps=rung.warmup_steps, total_steps=rung.steps)
        for rung in rungs
    ]
    return population(
        recipe.config(width).replace(eos_token_ids=(eos_id,)),
        train_config,
        hparams,
        data=data,
        runs=[folder / f"d{rung.d_model}-steps{rung.steps}" for rung in rungs],
        shell=Shell(description=f"d_model {width}, {len(rungs)} runs"),
    )


def row(rung: Rung, result: Result) -> dict[str, Any]:
    """One line of the ladder's table."""
    return rung.to_dict() | {
        "loss": result.validation_loss,
        "train_loss": result.loss,
        "status": result.status,
        "run": result.run.name,
        "flops_exact": result.flops_exact,
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
    }


def ladder_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of a ladder as a table to fit: runs that diverged or repeated their data are dropped, and listed."""
    nan = float("nan")
    return clean(
        [row["params"] for row in rows],
        [row["tokens"] for row in rows],
        [nan if row["loss"] is None else row["loss"] for row in rows],
        repeated=[row["repeated"] for row in rows],
    )


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV, as `isoflop scaling fit` reads them; a diverged run's loss is nan, which it drops by name."""
    names = (
        "params",
        "tokens",
        "loss",
        "flops",
        "budget",
        "d_model",
        "steps",
        "epochs",
        "repeated",
        "learning_rate",
        "status",
    )
    lines = [",".join(names)]
    for row in rows:
        lines.append(",".join("nan" if row[name] is None else str(row[name]) for name in names))
    write_atomically(path, "\n".join(lines) + "\n")
