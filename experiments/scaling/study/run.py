"""Run a scaling study: its runs as sweeps, their table, the prediction, and its test.

A study's folder holds design.json (what was requested), sweep/ (the runs of the fitted budgets: a sweep like any other,
which `isoflop sweep status`, `resume` and `report` read), runs.csv and curves.csv, prediction.json, held_out/ (the runs
that were predicted) and held_out.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.inputs import check_free
from experiments.scaling.rows.tables import write_csv
from experiments.scaling.study.design import Design
from experiments.scaling.study.held_out import compare, predict
from experiments.scaling.study.rungs import Rung, plan_rungs
from experiments.sweep.branches import Listed
from experiments.sweep.definition import define
from experiments.sweep.record import Sweep
from experiments.sweep.row import LedgerRow
from experiments.sweep.run import run_sweep
from experiments.words import counted
from model.ambient import pinned
from model.errors import InputError
from train.checksums import read_sealed, write_sealed
from train.data import Loader, load_manifest
from train.files import file_sha256
from train.run.metrics import read_metrics

SCHEMA_VERSION = 1
HELD_OUT = "held_out"
_TABLES = "checksums.json"  # schema version of runs.csv and curves.csv
_POINTS = 400  # points of a training curve: the smoothing is wider than their distance


@pinned()
def run_study(design: Design, data: str | Path, folder: str | Path, workers: int = 0) -> list[dict[str, Any]]:
    """Run a study, or resume the one in `folder`, and return the rows of its runs.csv.

    design: with budgets (`cost.plan_study` makes them of hours). workers: number of processes to start, instead of
    training in this one. Raises InputError if the folder holds another study or something else,
    `sweep.run.UnfinishedError` if runs failed, and KeyboardInterrupt after saving the current runs.
    """
    folder, rungs = Path(folder), rungs_of(design, data)
    _check_folder(folder, design)
    fitted, tested = ([rung for rung in rungs if rung.held_out is kind] for kind in (False, True))
    sweeps = [sweep_of(design, part, data, folder / name) for part, name in ((fitted, "sweep"), (tested, HELD_OUT))]
    write_sealed(folder / "design.json", {"schema_version": SCHEMA_VERSION, "design": design.to_dict()})
    _say(
        f"[1/{3 if tested else 1}] {counted(len(fitted), 'run')} of "
        f"{counted(len({rung.budget for rung in fitted}), 'budget')}"
    )
    rows = _train(sweeps[0], fitted, workers)
    _write_tables(folder, rows)
    if tested:
        predict(folder, tested, _say)
        _say(f"[3/3] {counted(len(tested), 'predicted run')}")
        rows += _train(sweeps[1], tested, workers)
        _write_tables(folder, rows)
        compare(folder, rows)
    return rows


def read_study(folder: Path) -> Design | None:
    """Return the design of the study that the folder holds, if it holds one."""
    path = folder / "design.json"
    if not path.exists():
        return None
    try:
        return Design.from_dict(read_sealed(path)["design"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged (missing or wrong: {error}); put back a copy of it") from None


def rungs_of(design: Design, data: str | Path) -> list[Rung]:
    """Return the runs of a design with budgets on these data."""
    loader = Loader(Path(data), batch_size=1, seq_len=design.seq_len, seed=0)
    return plan_rungs(design, load_manifest(data).vocab_size, loader.tokens_per_epoch)


def sweep_of(design: Design, rungs: Sequence[Rung], data: str | Path, folder: Path) -> Sweep | None:
    """Return the sweep that trains these rungs, by their names; None for no rungs. Writes nothing."""
    if not rungs:
        return None
    return define(
        design.base_config(load_manifest(data).vocab_size),
        data=data,
        folder=folder,
        listed=[Listed(r.name, r.point, r.trunk, r.leave_step) for r in rungs],
        # A rung's warm-up is given in steps; 0 steps mean none.
        base={"warmup_fraction": 0.0} | design.shared_fields,
        seq_len=design.seq_len,
        evaluate_tokens=design.evaluate_tokens,
    )


def _train(sweep: Sweep | None, rungs: Sequence[Rung], workers: int) -> list[dict[str, Any]]:
    """Train the rungs that are not trained yet; return a row of the table for every rung, in order."""
    if sweep is None:
        return []
    by_name = {row.trial.name: row for row in run_sweep(sweep, workers)}
    return [_row(rung, by_name[rung.name], sweep) for rung in rungs]


def _row(rung: Rung, row: LedgerRow, sweep: Sweep) -> dict[str, Any]:
    """Return a row of runs.csv: the rung and its results."""
    planned = rung.to_dict()
    del planned["seconds"]
    lost = row.state != "finished"
    return planned | {
        "loss": None if lost else row.facts.get("loss"),
        "training_loss": None if lost else row.facts.get("training_loss"),
        "status": row.state,
        "seconds": row.facts.get("seconds"),
        "run": str(sweep.run_folder(row.trial).relative_to(sweep.folder.parent)),
    }


def _write_tables(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write runs.csv, and curves.csv of the fitted runs that go from their own start to their end."""
    write_csv(folder / "runs.csv", rows)
    points = []
    for row in rows:
        if row["loss"] is None or row["trunk"] is not None or row["held_out"]:
            continue
        records = [record for record in read_metrics(folder / row["run"]) if record["loss"] is not None]
        chosen = np.unique(np.linspace(0, len(records) - 1, min(len(records), _POINTS)).round().astype(int))
        fixed = {"run": row["name"], "params": row["params"]}
        points += [fixed | {"tokens": records[i]["tokens"], "loss": records[i]["loss"]} for i in chosen]
    write_csv(folder / "curves.csv", points)
    write_sealed(folder / _TABLES, {name: file_sha256(folder / name) for name in ("runs.csv", "curves.csv")})


def table_troubles(folder: Path) -> list[str]:
    """Return a warning for every table of a study that was changed since it was written; [] for other folders."""
    path = folder / _TABLES
    if not path.exists():
        return []
    try:
        written = read_sealed(path)
    except InputError as error:
        return [str(error)]
    found = []
    for name, sha256 in written.items():
        if not (folder / name).is_file():
            found.append(f"{folder / name} is missing, which the study wrote")
        elif file_sha256(folder / name) != sha256:
            found.append(f"{folder / name} is not what the study wrote (its checksum differs)")
    return found


def _check_folder(folder: Path, design: Design) -> None:
    """Raise InputError unless the folder is empty, or holds this study; other data raise in its sweep."""
    there = read_study(folder)
    if there is not None:
        differences = design.differences(there)
        if differences:
            raise InputError(f"{folder} holds a study that differs: {differences}; choose another --out")
    else:
        check_free(folder, "study", "holds no study", "choose another --out")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
