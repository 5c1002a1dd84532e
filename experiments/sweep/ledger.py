"""Keep the ledger of a sweep: its trials, their claims and their results.

It is stored as an Optuna study, with one Optuna trial per attempt at a trial: planned is WAITING, running RUNNING,
finished COMPLETE, pruned and diverged PRUNED, failed FAIL. Optuna's atomic change from WAITING to RUNNING is the claim.

Every trial is finished exactly once, even if workers die. An attempt whose worker sends no heartbeat is ended by FAIL,
which is final and succeeds for one process only, and a new attempt replaces it. Of several attempts at one trial that
have not failed, only the first is claimed. Results come from the run directories, so that no training is lost with an
attempt. A worker that was only slow learns that its claim is gone when it reports.
"""

import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.sweep.address import file_of, with_file
from experiments.sweep.distributions import Known
from experiments.sweep.identity import study_name, take_place
from experiments.sweep.objectives import direction
from experiments.sweep.record import Sweep
from experiments.sweep.row import LedgerRow, State
from experiments.sweep.storage import Storage
from experiments.sweep.trial import Trial
from model.errors import InputError

logger = logging.getLogger("isoflop")
DEAD, DUPLICATE, REPEATED = "its worker died", "a duplicate", "drawn before"
_STATES: dict[str, State] = {"WAITING": "planned", "RUNNING": "running", "COMPLETE": "finished", "PRUNED": "pruned"}
_ASKED_SECONDS = 600.0
"""Time limit for drawing a point; a worker that needs longer has died."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial claimed by this worker. key: of its attempt in the storage. until: number of updates to train up to."""

    key: int
    trial: Trial
    until: int


class Ledger:
    """A worker's view of a sweep's ledger.

    interval, grace: of heartbeats, in seconds (`storage.Storage`). worker: a name that no other worker has. read_only:
    nothing is written, and a storage that does not exist yet has no trials. Raises InputError if the storage cannot be
    opened, or unless read_only if the folder is a copy of another one with the same storage.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        interval: int = 15,
        grace: int = 90,
        worker: str | None = None,
        read_only: bool = False,
    ):
        if read_only or sweep.id:
            _check_storage(sweep)
        self.storage = Storage(sweep.address, interval=interval, grace=grace, read_only=read_only)
        self.storage.use(study_name(sweep, self.storage), [direction(name) for name in sweep.objectives])
        if not read_only and sweep.shares_storage:
            take_place(sweep, self.storage)
        self.worker = worker or f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"
        self._execution = sweep.base.execution  # which may have changed since the trials were planned
        self._trials: dict[int, Trial] = {}  # by key: they never change
        self._unnamed: dict[int, float] = {}  # when a point was first seen as being drawn

    def add(self, trials: Sequence[Trial]) -> int:
        """Plan the trials that are not in the ledger yet; return their number."""
        there, known = self._attempts(), Known(self.storage.trials(), [trial.point for trial in trials])
        new = {trial.id: trial for trial in trials if trial.id not in there}
        for trial in new.values():
            params, distributions = known.describe(trial.point)
            self.storage.create(_planned(trial, params, distributions))
        return len(new)

    def rows(self) -> list[LedgerRow]:
        """Return all trials, in the order in which they were planned."""
        rows = []
        for attempts in self._attempts().values():
            now = _current(attempts)
            trial, attributes = self._trial(now), now.user_attrs
            state: State = _STATES.get(now.state.name) or "failed"
            if state == "failed" and attributes.get("reason") == DEAD:
                state = "planned"  # until a worker recovers it
            if attributes.get("status") == "diverged":
                state = "diverged"
            values = None if now.values is None else tuple(now.values)
            facts = attributes.get("facts", {}) | ({"reason": attributes["reason"]} if state == "failed" else {})
            rows.append(LedgerRow(attempts[0].number, trial, state, _rungs(attempts), values, facts))
        return sorted(rows, key=lambda row: row.number)

    def claim(self, until: Mapping[str, int], limit: int) -> list[Claim]:
        """Claim at most `limit` of these planned trials. ready: ids, each with the update up to which it may train."""
        claims: list[Claim] = []
        there = self._attempts()
        for name, updates in until.items():
            if len(claims) == limit:
                break
            now = _current(there[name]) if name in there else None
            if now is None or now.state.name != "WAITING":
                continue
            # The heartbeat comes first, so that a worker that dies right after its claim is noticed.
            self.storage.call(self.storage.beat, now._trial_id)
            if self.storage.move(now._trial_id, "RUNNING"):
                self.storage.set(now._trial_id, worker=self.worker)
                claims.append(Claim(now._trial_id, self._trial(now), updates))
        return claims

    @contextmanager
    def beat(self, claims: Sequence[Claim]) -> Iterator[None]:
        """Send heartbeats for the claimed trials until the block ends."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(self.storage.interval):
                for claim in claims:
                    with suppress(Exception):  # the database may be down or the claim gone; the next heartbeat shows
                        self.storage.beat(claim.key)
            self.storage.forget_session()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def report(self, claim: Claim, step: int, loss: float) -> bool:
        """Record the validation loss after a number of updates; return False if the claim is gone."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            self.storage.call(self.storage.optuna.set_trial_intermediate_value, claim.key, step, loss)
        except UpdateFinishedTrialError:
            return False
        return True

    def hand_back(self, claim: Claim, facts: Mapping[str, Any] | None = None) -> bool:
        """Plan the trial again, to continue from its state; return False if the claim is gone."""
        if facts is not None:
            self.storage.set(claim.key, facts=dict(facts))
        mine = self.storage.call(self.storage.optuna.get_trial, claim.key).user_attrs.get("worker") == self.worker
        return mine and self.storage.move(claim.key, "WAITING")

    def finish(self, claim: Claim, values: Sequence[float], facts: Mapping[str, Any]) -> bool:
        """Record the trial's result; return False if the claim is gone."""
        return self.storage.set(claim.key, facts=dict(facts)) and self.storage.move(
            claim.key, "COMPLETE", [float(value) for value in values]
        )

    def diverge(self, claim: Claim, facts: Mapping[str, Any]) -> bool:
        """Record that the trial diverged; return False if the claim is gone."""
        return self.storage.set(claim.key, facts=dict(facts), status="diverged") and self.storage.move(
            claim.key, "PRUNED"
        )

    def fail(self, claim: Claim, reason: str) -> bool:
        """Record that an exception ended the trial; return False if the claim is gone."""
        return self.storage.set(claim.key, reason=reason) and self.storage.move(claim.key, "FAIL")

    def prune(self, name: str) -> bool:
        """End a planned trial early; return False if it is not planned (any more)."""
        return any(self.storage.move(claim.key, "PRUNED") for claim in self.claim({name: 0}, 1))

    def recover(self) -> int:
        """Plan the trials of dead workers again, end superfluous attempts, and return the number planned."""
        for key in self.storage.stale():
            if self.storage.set(key, reason=DEAD):
                self.storage.move(key, "FAIL")
        self._end_abandoned()
        planned = 0
        for attempts in self._attempts().values():
            now = _current(attempts)
            if now.state.name == "FAIL" and now.user_attrs.get("reason") == DEAD:
                self._plan_again(now, _rungs(attempts))
                planned += 1
            for other in attempts:
                if (
                    other.state.name == "WAITING"
                    and other is not now
                    and self.storage.set(other._trial_id, reason=DUPLICATE)
                ):
                    self.storage.move(other._trial_id, "FAIL")
        return planned

    def retry(self) -> int:
        """Plan the failed trials again; return their number."""
        failed = [attempts for attempts in self._attempts().values() if _current(attempts).state.name == "FAIL"]
        for attempts in failed:
            self._plan_again(_current(attempts), _rungs(attempts))
        return len(failed)

    def asked(self) -> int:
        """Return the number of points that the sampler has drawn."""
        return len(self._asked())

    def ask(self, count: int, total: int, sampler: Callable[[int], Any], draw: Callable[[Any], list[Trial]]) -> int:
        """Let the sampler draw `count` points, at most `total` over all workers; return the number drawn.

        sampler: of the number of points drawn before, an Optuna sampler. draw: of an Optuna trial, the replicates of
        the point that it suggests. The sampler knows the other points of a batch. An impossible or repeated point
        counts as drawn.
        """
        import optuna
        from optuna.trial import TrialState, create_trial

        drawn: list[tuple[int, list[Trial]]] = []
        while len(drawn) < count and self.asked() < total:
            key = self.storage.create(create_trial(state=TrialState.RUNNING, user_attrs={"asked": True}))
            place = [trial._trial_id for trial in self._asked()].index(key)
            if place >= total:  # several workers called this at once
                self._end(key, "one too many", asked=False)
                break
            study = self.storage.call(
                optuna.load_study, study_name=self.storage.name, storage=self.storage.optuna, sampler=sampler(place)
            )
            try:
                drawn.append((key, self.storage.call(draw, optuna.trial.Trial(study, key))))
            except InputError as error:
                logger.warning("a drawn point is impossible: %s", error)
                self._end(key, str(error))
            except ValueError as error:  # Optuna's: an axis that has become another
                self._end(key, str(error), asked=False)
                raise InputError(
                    f"the sweep's trials have an axis of another kind or other choices ({error}); "
                    "choose another folder for this search"
                ) from None
        for key, trials in drawn:
            self._plan_asked(key, trials)
        return len(drawn)

    def _plan_asked(self, key: int, trials: list[Trial]) -> None:
        """Make the drawn attempt the first replicate, and add the others with its parameters."""
        frozen = self.storage.call(self.storage.optuna.get_trial, key)
        there = self._attempts()
        for trial in trials[1:]:
            if trial.id not in there:
                self.storage.create(_planned(trial, frozen.params, frozen.distributions))
        first = trials[0]
        if first.id in there:
            self._end(key, REPEATED)
        elif self.storage.set(key, trial=first.to_dict(), cohort=first.cohort, id=first.id):
            self.storage.move(key, "WAITING")

    def _asked(self) -> list[Any]:
        return [trial for trial in self.storage.trials() if trial.user_attrs.get("asked")]

    def _end_abandoned(self) -> None:
        """End points that a worker was drawing when it died, so that others are drawn instead."""
        unnamed = [t for t in self._asked() if t.state.name == "RUNNING" and "id" not in t.user_attrs]
        self._unnamed = {t._trial_id: self._unnamed.get(t._trial_id, time.monotonic()) for t in unnamed}
        for key, since in self._unnamed.items():
            if time.monotonic() - since > _ASKED_SECONDS:
                self._end(key, DEAD, asked=False)

    def _end(self, key: int, reason: str, **attributes: Any) -> None:
        if self.storage.set(key, reason=reason, **attributes):
            self.storage.move(key, "FAIL")

    def _plan_again(self, failed: Any, rungs: dict[int, float]) -> None:
        again = _planned(self._trial(failed), failed.params, failed.distributions, rungs)
        self.storage.create(again)

    def _attempts(self) -> dict[str, list[Any]]:
        """Return the attempts at every trial, by its id and in their order; those that never counted are left out."""
        attempts: dict[str, list[Any]] = {}
        for frozen in self.storage.trials():
            name = frozen.user_attrs.get("id")
            if name is not None and frozen.user_attrs.get("reason") != DUPLICATE:
                attempts.setdefault(name, []).append(frozen)
        return attempts

    def _trial(self, frozen: Any) -> Trial:
        if frozen._trial_id not in self._trials:
            trial, stored = Trial.from_dict(frozen.user_attrs["trial"]), frozen.user_attrs["id"]
            if trial.id != stored:  # a trial claimed under one id and trained under another would never end
                raise InputError(
                    f"{self.storage.name} holds a trial {stored} that this version would call {trial.id}: another "
                    "version wrote it; continue with that version, or choose another folder"
                )
            self._trials[frozen._trial_id] = trial.under(self._execution)
        return self._trials[frozen._trial_id]


def _check_storage(sweep: Sweep) -> None:
    """Raise InputError if the sweep has runs, but the file of its trials is gone."""
    file = file_of(sweep.address)
    if sweep.storage is not None and file is not None and not file.exists() and (sweep.folder / "runs").is_dir():
        raise InputError(
            f"the storage {sweep.address} of {sweep.folder} does not exist; if it was moved, give its new path: "
            f"`isoflop sweep resume {sweep.folder} --storage {with_file(sweep.storage, Path('FILE'))}`"
        )


def _planned(trial: Trial, params: dict, distributions: dict, rungs: Mapping[int, float] | None = None) -> Any:
    from optuna.trial import TrialState, create_trial

    return create_trial(
        state=TrialState.WAITING,
        params=params,
        distributions=distributions,
        user_attrs={"id": trial.id, "trial": trial.to_dict(), "cohort": trial.cohort},
        intermediate_values=dict(rungs or {}),
    )


def _current(attempts: list[Any]) -> Any:
    """Return the attempt that counts: the first that has not failed, or else the last."""
    return next((attempt for attempt in attempts if attempt.state.name != "FAIL"), attempts[-1])


def _rungs(attempts: list[Any]) -> dict[int, float]:
    """Return the losses that any attempt has reported: all attempts are at the same run."""
    return {step: loss for attempt in attempts for step, loss in sorted(attempt.intermediate_values.items())}
