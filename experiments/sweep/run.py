"""Run a sweep from its plan to its end, in this process or by workers."""

import dataclasses
import logging
from pathlib import Path

from experiments.locks import locked
from experiments.sweep import launch, live
from experiments.sweep.address import check_given, file_of, kept, without_password
from experiments.sweep.identity import copy_trials, keep_id, study_name, with_id, with_storage
from experiments.sweep.ledger import Ledger
from experiments.sweep.record import Sweep, id_in, new_id
from experiments.sweep.row import ENDED, LedgerRow
from experiments.sweep.storage import Storage
from experiments.sweep.worker import plan, work
from experiments.words import counted
from model.errors import InputError

logger = logging.getLogger("isoflop")


class UnfinishedError(Exception):
    """Raised if some trials did not finish; the message names the command that resumes."""


def begin(sweep: Sweep, interval: int = 15, grace: int = 90) -> Ledger:
    """Write the sweep, plan its trials and return its ledger; interval, grace: see `Ledger`."""
    if not (sweep.folder / "sweep.json").exists():
        if sweep.shares_storage:
            Storage(sweep.address)  # if the storage cannot be reached, nothing is written
        elif (file := file_of(sweep.address)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        sweep = sweep.write_first()
    else:  # perhaps written by another process after this sweep was defined
        sweep = dataclasses.replace(sweep, id=id_in(sweep.folder) or sweep.id)
    ledger = Ledger(sweep, interval=interval, grace=grace)  # which raises for a copied folder before changing it
    with locked(sweep.folder):
        sweep.write()
    if sweep.id is None:
        keep_id(sweep.folder, str(ledger.storage.name))
    plan(sweep, ledger)
    return ledger


def with_places(
    sweep: Sweep, data: Path | None = None, storage: str | None = None, weights: Path | None = None
) -> Sweep:
    """Return the sweep with new paths of its data, storage or starting weights; None: unchanged.

    Raises InputError if the storage does not hold the sweep's trials, and on weights for one that starts fresh.
    """
    if weights is not None:
        if sweep.weights is None:
            raise InputError(f"the trials of {sweep.folder} start from fresh parameters; leave --base out")
        sweep = dataclasses.replace(sweep, weights=weights.resolve())
    if storage is not None:
        check_given(storage)
        sweep = with_storage(sweep, kept(without_password(storage), sweep.folder))
    return sweep if data is None else dataclasses.replace(sweep, data=data.resolve())


def separate(sweep: Sweep) -> Sweep:
    """Make a copied folder an independent sweep: write it with a new id and a new study.

    Raises InputError if its storage is in its folder, so that the copy already has its own.
    """
    if not sweep.shares_storage:
        raise InputError(f"{sweep.folder} has a storage of its own in its folder; leave --new-id out")
    before = study_name(sweep, Storage(sweep.address, read_only=True))
    sweep = with_id(sweep, new_id(sweep.folder))
    copy_trials(sweep, Ledger(sweep).storage, before)
    sweep.write()
    return sweep


def useful_workers(sweep: Sweep, ledger: Ledger, asked: int) -> int:
    """Return the requested number of workers, or with a warning the number of trials left if that is smaller."""
    left = sum(row.state not in ENDED for row in ledger.rows())
    if sweep.sampler != "all":
        left += max(0, sweep.trials - ledger.asked()) * len(sweep.seeds)
    most = max(1, left)
    if asked > most:
        logger.warning(
            "isoflop: %d workers are more than the %d trials that are left; %d are started", asked, left, most
        )
    return min(asked, most)


def work_through(sweep: Sweep, ledger: Ledger, started: launch.Workers | None) -> list[str]:
    """Train here, or follow the started workers, until the end; return the workers' failures."""
    if started is None:
        work(sweep, ledger)
        return []

    def look() -> live.Standing:
        return live.standing(sweep, ledger.rows(), ledger.asked())

    return launch.follow(started, lambda going: live.watch(look, going))


def run_sweep(sweep: Sweep, workers: int = 0) -> list[LedgerRow]:
    """Train the trials that are not trained yet, and return the ledger's rows by number.

    workers: number of processes to start, instead of training in this one. Raises UnfinishedError if trials failed, and
    KeyboardInterrupt after saving the current runs.
    """
    ledger = begin(sweep)
    workers = useful_workers(sweep, ledger, workers)
    for sentence in work_through(sweep, ledger, launch.LocalWorkers(sweep.folder, workers) if workers else None):
        logger.warning(sentence)
    rows = ledger.rows()
    left = [row for row in rows if row.state not in ENDED]
    if left:
        reason = next((f" ({row.facts['reason']})" for row in left if "reason" in row.facts), "")
        retry = f"`isoflop sweep resume {sweep.folder} --retry-failed` tries them again, then " if reason else ""
        raise UnfinishedError(
            f"{len(left)} of {counted(len(rows), 'run')} did not end{reason}; {retry}the same command continues"
        )
    return rows
