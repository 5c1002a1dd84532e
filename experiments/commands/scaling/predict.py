"""Implement `isoflop scaling predict`: predictions of scaling laws for runs that were not trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.commands.options import JsonFile
from experiments.commands.scaling.options import BY_NAME, Columns

if TYPE_CHECKING:
    from experiments.scaling.fit import Fits
    from experiments.scaling.questions import Answers
    from experiments.scaling.rows.table import Table
    from experiments.scaling.serving import ServingCost

Flops = Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOPS")]
Losses = Annotated[tuple[float, ...], tyro.conf.arg(metavar="NATS")]
Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


def predict(
    table: tyro.conf.Positional[Path],
    *,
    flops: Flops = (),
    target_loss: Losses = (),
    params: float | None = None,
    tokens: float | None = None,
    serve_tokens: float | None = None,
    decode: Files = (),
    batch: int | None = None,
    train: OptionalFile = None,
    train_rate: float | None = None,
    level: float = 95,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    screen: bool = False,
    all_runs: bool = False,
    columns: Columns = BY_NAME,
    json: JsonFile = None,
) -> None:
    """Predict from a table of runs: the best run of a budget, the compute of a target, the loss of a planned run.

    Every answer comes with its interval and its distance from the runs. A planned run's loss is predicted by every form
    of law, with its held-out error; everything else by the three-term law. With --serve-tokens also the model that
    costs least to train and to serve at a loss, a smaller one trained for longer (Sardana & Frankle 2023).

    A question without an answer, such as a loss below the floor, is refused with the reason (in --json: null, with the
    reason next to it under "refused"); the others are answered. Exit code 0 if any was answered, else 2.

    Example: isoflop scaling predict runs.csv --flops 1e21 1e22 --target-loss 2.1

    Example: isoflop scaling predict study --params 1e9 --tokens 2e10

    Example: isoflop scaling predict runs.csv --flops 1e21 --serve-tokens 1e12 --decode 1b.json 8b.json --train t.json

    Args:
        table: Runs, one a row (.csv, .tsv, .jsonl or .parquet), or the folder of a study.
        flops: Budgets C = 6·N·D (IsoFLOP: as --columns.flops counts): optimal N, D and loss by each estimator.
        target_loss: Losses in nats per token: the least compute that reaches each.
        params: N of a planned run; give tokens too.
        tokens: D of a planned run.
        serve_tokens: Tokens that the model will generate in total once deployed, with --flops or --target-loss.
        decode: What a served token costs: files of `isoflop bench decode --json`, one per model size. By default 2·N.
        batch: The batch size whose cells are used; by default the largest.
        train: What training costs: a file of `isoflop bench train --json`.
        train_rate: Instead of --train: training FLOPs (6·N·D) per second.
        level: Of the intervals, in per cent.
        delta: Where Huber's loss turns from quadratic to linear, in natural-log loss.
        bootstraps: Draws behind the intervals.
        seed: Of the bootstrap.
        screen: Leave out runs that the noise of the table does not explain; by default every run is fitted.
        all_runs: Also fit the runs whose column `held_out` is true.
        columns: Which column of the table is which.
        json: Also write every number to this file.
    """
    from experiments.commands.options import console, write_document
    from experiments.commands.scaling.answers import show
    from experiments.scaling.fit import parametric_warnings, table_warnings
    from experiments.scaling.questions import Questions, answer

    _check(flops, target_loss, params, tokens, serve_tokens, level)
    cost = _cost(serve_tokens, decode, batch, train, train_rate)
    runs = columns.read(table, keep_held_out=all_runs)
    fits = _fit(table, runs, bool(flops), delta, bootstraps, seed, screen)
    planned = ((params, tokens),) if params is not None and tokens is not None else ()
    serving = None if serve_tokens is None or cost is None else (serve_tokens, cost)
    answers = answer(fits, Questions(flops, target_loss, planned, serving, level))
    document = answers.to_dict()
    document |= {"rows": len(runs), "level": level, "refused": fits.refused}
    document["dropped"] = [row.to_dict() for row in runs.dropped]
    document["parametric_outliers"] = [run.to_dict() for run in fits.parametric_outliers]
    warnings = table_warnings(runs)
    if fits.parametric is not None:
        warnings += parametric_warnings(fits.parametric, fits.parametric_outliers)
    document["warnings"] = warnings = [*warnings, *_own_interval_warnings(answers)]
    write_document(json, document)
    show(console(), answers, fits, cost, level=level, warnings=warnings)


def _own_interval_warnings(answers: "Answers") -> list[str]:
    """Return the warnings of single answers, each with its question."""
    from experiments.scaling.analysis import NAMES
    from experiments.scaling.questions import Refused

    found = []
    for by_estimator in answers.optimal:
        for name, best in by_estimator.items():
            if not isinstance(best, Refused):
                found += [f"at {best.flops:.4g} FLOPs, {NAMES[name]}: {text}" for text in best.warnings]
    for needed in answers.compute_for_loss:
        if not isinstance(needed, Refused):
            found += [f"for a loss of {needed.target:g}: {text}" for text in needed.warnings]
    for planned in answers.planned:
        if not isinstance(planned, Refused):
            told = planned.by_law
            found += [f"for N {told.params:.4g} on D {told.tokens:.4g}: {text}" for text in told.warnings]
    return found


def _check(
    flops: tuple[float, ...],
    target_loss: tuple[float, ...],
    params: float | None,
    tokens: float | None,
    serve_tokens: float | None,
    level: float,
) -> None:
    from model.errors import InputError, check_number

    if not flops and not target_loss and params is None and tokens is None:
        raise InputError("there is no question: give --flops, --target-loss, or --params with --tokens")
    if (params is None) != (tokens is None):
        raise InputError("a planned run takes both --params and --tokens")
    if serve_tokens is not None:
        if not flops and not target_loss:
            raise InputError("--serve-tokens asks for a model at a loss: add --flops or --target-loss")
        check_number("--serve-tokens", serve_tokens, least=0)
    check_number("--level", level, above=0, below=100, hint="it is in per cent")


def _cost(
    serve_tokens: float | None,
    decode: tuple[Path, ...],
    batch: int | None,
    train: Path | None,
    train_rate: float | None,
) -> "ServingCost | None":
    """Return what serving costs; None if nothing is served."""
    from experiments.scaling.serving import ServingCost, training_rate
    from model.errors import InputError, check_number

    if serve_tokens is None:
        if decode or train is not None or train_rate is not None or batch is not None:
            raise InputError("--decode, --batch, --train and --train-rate price a served model: add --serve-tokens")
        return None
    if train is not None and train_rate is not None:
        raise InputError("give either --train or --train-rate, not both")
    rate = training_rate(train) if train is not None else train_rate
    if not decode:
        if rate is not None or batch is not None:
            raise InputError(
                "--train, --train-rate and --batch go with --decode: seconds of training need seconds of serving"
            )
        return ServingCost()
    if rate is None:
        raise InputError("--decode gives seconds of serving: add --train or --train-rate for those of training")
    check_number("--train-rate", rate, above=0)
    return ServingCost.measured(decode, rate, batch=batch)


def _fit(path: Path, runs: "Table", budgets: bool, delta: float, bootstraps: int, seed: int, screen: bool) -> "Fits":
    """Return all estimators if a budget is given, else only the one that predicts losses."""
    from experiments.scaling.fit import Fits, fit_both
    from experiments.scaling.law.parametric import fit_parametric
    from model.errors import InputError
    from train.progress import progress_bar

    settings: dict[str, Any] = {"delta": delta, "bootstraps": bootstraps, "seed": seed, "screen": screen}
    with progress_bar("fit", 2 if budgets else 1) as advance:
        if budgets:
            fits = fit_both(runs, **settings, advance=advance)
        else:
            try:
                law = fit_parametric(runs.params, runs.tokens, runs.loss, **settings)
            except InputError as error:
                raise InputError(f"{path} determines no scaling law: {error}") from error
            law.bootstrap(lambda draws: advance(draws / bootstraps))
            fits = Fits(runs, law, None, {})
    if fits.parametric is None and fits.isoflop is None:
        raise InputError(f"{path} determines no scaling law: {fits.refused['parametric']}")
    return fits
