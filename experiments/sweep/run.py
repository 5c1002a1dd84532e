"""A sweep from its plan to its end, in this process or by workers of this machine."""

import logging

from experiments.sweep import launch, live
from experiments.sweep.ledger import Ledger
from experiments.sweep.record import Sweep
from experiments.sweep.row import ENDED, Row
from experiments.sweep.worker import plan, work
from experiments.words import counted

logger = logging.getLogger("isoflop")


class UnfinishedError(Exception):
    """Some trials did not end; the message says which command goes on."""


def begin(sweep: Sweep, interval: int = 15, grace: int = 90) -> Ledger:
    """Write the sweep down and plan its trials; its ledger, with `Ledger`'s seconds between signs of life."""
    if sweep.storage is None:
        sweep.write()
    ledger = Ledger(sweep, interval=interval, grace=grace)
    sweep.write()  # of a database elsewhere: only now, for there may be none
    plan(sweep, ledger)
    return ledger


def work_through(sweep: Sweep, ledger: Ledger, started: launch.Workers | None) -> list[str]:
    """Work here, or show how workers that were started get on, until the end; what became of those that ended badly."""
    if started is None:
        work(sweep, ledger)
        return []
    look = lambda: live.standing(sweep, ledger.rows(), ledger.asked())
    return launch.follow(started, lambda going: live.watch(look, going))


def run_sweep(sweep: Sweep, workers: int = 0) -> list[Row]:
    """Train what the sweep plans and has not trained yet; its ledger's rows, by number.

    workers: so many processes instead of this one. Raises UnfinishedError where trials failed, and KeyboardInterrupt
    once what runs is saved.
    """
    ledger = begin(sweep)
    for sentence in work_through(sweep, ledger, launch.LocalWorkers(sweep.folder, workers) if workers else None):
        logger.warning(sentence)
    rows = ledger.rows()
    left = [row for row in rows if row.state not in ENDED]
    if left:
        reason = next((f" ({row.facts['reason']})" for row in left if "reason" in row.facts), "")
        retry = f"`isoflop sweep resume {sweep.folder} --retry-failed` tries them again, then " if reason else ""
        raise UnfinishedError(
            f"{len(left)} of {counted(len(rows), 'run')} did not end{reason}; {retry}the same command goes on"
        )
    return rows
