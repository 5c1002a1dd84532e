"""Collect the results of a sweep as a flat table: one row per trial, from the ledger and the runs' records."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.sweep.analysis.executions import execution_names, execution_value, recipe_id
from experiments.sweep.analysis.scales import MANY, distinct, is_number
from experiments.sweep.objectives import TRAINING_SPEED, has_error, training_speed
from experiments.sweep.row import ENDED, LedgerRow
from model.errors import InputError
from train.files import write_atomically
from train.objectives import LanguageModeling
from train.run import read_record
from train.run.metrics import troubles
from train.task_sets import ERROR

TRIAL = ("id", "number", "state", "cohort", "recipe", "seed", "run", "rungs", "planned_steps", "planned_tokens")
BRANCH = ("parent", "parent_steps", "member")  # empty except for trials that branched off another run
FACTS = ("steps", "tokens", "flops_6nd", "flops_exact", "seconds", "compile_seconds")
CLAIM = ("worker", "claimed_at", "ended_at")  # of the last claim, in seconds since 1970


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a sweep so far.

    rows: flat, by number: id, number, state, cohort, recipe (the id of the recipe, the same for all executions), seed,
    every field of the points (None if a trial lacks it), loss (of finished trials alone), last_loss (of any that
    reported one), training_tokens_per_second, the other objectives (metrics of tasks with their standard errors),
    FACTS, planned_steps, planned_tokens, run (below `folder`), CLAIM and rungs (losses by updates). A fact whose name
    is an axis too is called NAME_done. parent: the id of the trial from which it branched off, after parent_steps
    updates; steps, tokens and FLOPs include these. member: its own id if it branched off with other settings, as in a
    population, so that its fields apply only to the updates after parent_steps. axes: fields that vary, by the values
    tried. followers: fields that vary only together with an axis, by that axis. executions: fields of Execution that
    vary and change no recipe, by the values tried; they are not axes (`experiments.sweep.analysis.executions`). unit:
    of the losses; "nats" where trials of several objectives have different ones.
    """

    folder: Path
    rows: list[dict[str, Any]]
    axes: dict[str, list[Any]]
    followers: dict[str, str]
    objectives: tuple[str, ...] = ("loss",)
    policy: str = "all"
    sampler: str = "all"
    executions: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    unit: str = LanguageModeling.UNIT

    def fact(self, row: Mapping[str, Any], name: str) -> Any:
        """Return one of FACTS of a row, None if it is not known."""
        return row[_column(name, row)]

    def spent(self, row: Mapping[str, Any], name: str) -> float:
        """Return tokens, flops_6nd or flops_exact of the updates that this trial trained itself; 0 if unknown."""
        total, steps = self.fact(row, name), self.fact(row, "steps")
        if not total or not steps:
            return 0
        own = max(0, steps - row["parent_steps"])
        return total * own // steps if isinstance(total, int) else total * own / steps


def read_results(folder: str | Path) -> Results:
    """Return the results of the sweep in a folder.

    Raises InputError if it holds no sweep or its storage cannot be reached.
    """
    from experiments.sweep.ledger import Ledger
    from experiments.sweep.record import Sweep

    sweep = Sweep.read(folder)
    rows = Ledger(sweep, read_only=True).rows()
    results = collect(sweep.folder, rows, objectives=sweep.objectives, policy=sweep.policy, sampler=sweep.sampler)
    if results.executions:
        for row in results.rows:  # older versions did not record the speed
            if row[TRAINING_SPEED] is None and row["state"] in ENDED:
                row[TRAINING_SPEED] = training_speed(results.folder / row["run"])
    return results


def collect(
    folder: Path,
    rows: Iterable[LedgerRow],
    *,
    objectives: tuple[str, ...] = ("loss",),
    policy: str = "all",
    sampler: str = "all",
) -> Results:
    """Return the results from the ledger's rows."""
    rows = sorted(rows, key=lambda row: row.number)
    names = list(dict.fromkeys(name for row in rows for name in row.trial.point if name != "seed"))
    how = execution_names(names, (row.trial for row in rows))
    flat = [_flat(row, names, how, objectives, population=policy == "population") for row in rows]
    axes, followers = _axes([name for name in names if name not in how], flat, searched=sampler != "all")
    tried = {name: list(dict.fromkeys(row[name] for row in flat)) for name in how}
    executions = {name: values for name, values in tried.items() if len(values) > 1}
    units = {row.trial.recipe.objective.UNIT for row in rows} or {Results.unit}
    unit = units.pop() if len(units) == 1 else "nats"
    return Results(folder, flat, axes, followers, objectives, policy, sampler, executions, unit)


def record_troubles(results: Results) -> list[str]:
    """Return a warning for every damaged run record, and for every loss that differs from the ledger's."""
    found = troubles(results.folder / row["run"] for row in results.rows)
    for row in results.rows:
        folder = results.folder / row["run"]
        if row["state"] != "finished" or not (folder / "run.json").exists():
            continue
        try:
            ended = read_record(folder).get("result") or {}
        except InputError:
            continue  # reported above
        if ended.get("validation_loss") not in (None, row["loss"]):
            found.append(f"{folder}: the ledger has loss {row['loss']}, the run itself {ended['validation_loss']}")
    return found


def _flat(
    row: LedgerRow, names: Sequence[str], how: Sequence[str], objectives: Sequence[str], *, population: bool
) -> dict[str, Any]:
    """Return the trial as a flat row.

    how: names of execution fields; a trial without a value for one has its default.
    """
    trial, facts = row.trial, row.facts
    point = row.trial.point
    last = row.rungs[row.steps_done] if row.rungs else None
    finished = row.state == "finished"
    values = dict(zip(objectives, row.values or (), strict=False))
    loss = values.get("loss", facts.get("loss", last)) if finished else None
    flat: dict[str, Any] = {
        "id": row.trial.id,
        "number": row.number,
        "state": row.state,
        "cohort": trial.cohort,
        "recipe": recipe_id(trial),
        "seed": point.get("seed", trial.recipe.hparams.seed),
    }
    flat |= {name: execution_value(trial, name) if name in how else point.get(name) for name in names}
    flat |= {"loss": loss, "last_loss": loss if finished else last}
    flat |= {TRAINING_SPEED: facts.get(TRAINING_SPEED)}
    flat |= {name: values.get(name) for name in objectives if name != "loss"}
    flat |= {f"{name}{ERROR}": facts.get(f"{name}{ERROR}") for name in objectives if has_error(name)}
    tokens_per_step = trial.recipe.train.tokens_per_step
    parent, parent_steps = row.trial.parent or (None, 0)
    reached = {"steps": row.steps_done, "tokens": row.steps_done * tokens_per_step}
    for name in FACTS:
        flat[f"{name}_done" if name in names else name] = facts.get(name, reached.get(name))
    return flat | {
        "planned_steps": trial.steps,
        "planned_tokens": trial.steps * tokens_per_step,
        "parent": parent,
        "parent_steps": parent_steps,
        "member": row.trial.id if population and parent else None,
        "run": facts.get("run", f"runs/{row.trial.id}"),
        **{name: facts.get(name) for name in CLAIM},
        "rungs": dict(row.rungs),
    }


def _column(name: str, row: Mapping[str, Any]) -> str:
    done = f"{name}_done"
    return done if done in row else name


def _axes(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], *, searched: bool
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Return the fields that vary, without those that are determined by an earlier one (width → heads)."""
    axes: dict[str, list[Any]] = {}
    followers: dict[str, str] = {}
    points = len({tuple(row[name] for name in names) for row in rows})
    for name in names:
        column = [row[name] for row in rows]
        kinds = len(set(column))
        if kinds < 2:
            continue

        def same(other: str) -> bool:
            return len({(row[other], row[name]) for row in rows}) == kinds == len({r[other] for r in rows})  # noqa: B023

        leader = next((other for other in axes if same(other)), None)
        # Drawn values may each occur only once: then any two fields would seem to vary together.
        most = points // 2 if searched else max(MANY, points // 2)
        if leader is not None and kinds <= most:
            followers[name] = leader
        else:
            axes[name] = distinct(column)
    return axes, followers


@dataclasses.dataclass(frozen=True)
class Tables:
    """The outcome of `write_tables`. no_parquet: why there is no Parquet file, or None."""

    no_parquet: str | None


def write_tables(results: Results) -> Tables:
    """Return `results.csv` and, where pyarrow is installed, `results.parquet` in the sweep's folder."""
    rows = [{name: value for name, value in row.items() if name != "rungs"} for row in results.rows]
    columns = list(rows[0]) if rows else ["id"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(results.folder / "results.csv", text.getvalue())
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return Tables("pyarrow is not installed: pip install 'isoflop[parquet]'")
    table = pyarrow.table({name: _common_type([row[name] for row in rows]) for name in columns})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    write_atomically(results.folder / "results.parquet", buffer.getvalue())
    return Tables(None)


def _common_type(values: list[Any]) -> list[Any]:
    """Return the common type of a column: integer, number, boolean or text."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known) or all(isinstance(value, str) for value in known):
        return values
    if all(map(is_number, known)):
        whole = all(isinstance(value, int) for value in known)
        return [value if value is None or whole else float(value) for value in values]
    return [None if value is None else str(value) for value in values]
