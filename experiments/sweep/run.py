"""A sweep from its plan to its end, in this process or by workers of this machine."""

import logging

from experiments.sweep import launch, live
from experiments.sweep.ledger import Ledger
from experiments.sweep.record import Sweep
from experiments.sweep.row import ENDED, Row
from experiments.sweep.worker import plan, work

logger = logging.getLogger("isoflop")


class UnfinishedError(Exception):
    """Some trials did not end; the message says which command goes on."""


def run_sweep(sweep: Sweep, workers: int = 0) -> list[Row]:
    """Train what the sweep plans and has not trained yet; its ledger's rows, by number.

    workers: so many processes instead of this one. Raises UnfinishedError where trials failed, and KeyboardInterrupt
    once what runs is saved.
    """
    sweep.write()
    ledger = Ledger(sweep)
    plan(sweep, ledger)
    if workers:
        look = lambda: live.standing(sweep, ledger.rows(), ledger.asked())
        started = launch.LocalWorkers(sweep.folder, workers)
        for sentence in launch.follow(started, lambda going: live.watch(look, going)):
            logger.warning(sentence)
    else:
        work(sweep, ledger)
    rows = ledger.rows()
    left = [row for row in rows if row.state not in ENDED]
    if left:
        reason = next((f" ({row.facts['reason']})" for row in left if "reason" in row.facts), "")
        retry = f"`isoflop sweep resume {sweep.folder} --retry-failed` tries them again, then " if reason else ""
        raise UnfinishedError(f"{len(left)} of {len(rows)} runs did not end{reason}; {retry}the same command goes on")
    return rows
