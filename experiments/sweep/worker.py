"""Run a worker of a sweep: claim trials, train them as lanes of one program, and report, until none is left.

All workers, on any machine, run the same loop over the same ledger. The policy decides from the ledger alone which
trials continue, and how far; a rung is a run that stops early and is continued later.
"""

import logging
import math
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.evaluate.loss import bits_per_byte
from experiments.process import interrupt_on_sigterm
from experiments.sweep.branches import branch_points
from experiments.sweep.ledger import Claim, Ledger
from experiments.sweep.objectives import (
    FORGETTING,
    TRAINING_SPEED,
    check_speed,
    direction,
    training_speed,
    validated,
    values,
)
from experiments.sweep.record import Sweep
from experiments.sweep.row import ENDED, LedgerRow
from experiments.sweep.search.policies import make_policy
from experiments.sweep.space.kinds import describe
from experiments.sweep.trial import Trial
from experiments.sweep.trials import plan_trials, trials_at
from model.ambient import pinned
from train import Result, RunOptions, population
from train.files import is_full
from train.recipe import Branch, Recipe
from train.run import BusyError, is_held, read_record

logger = logging.getLogger("isoflop")
_COOLING_SECONDS = 5.0


def plan(sweep: Sweep, ledger: Ledger) -> int:
    """Add the trials that the sweep enumerates to its ledger; return the number of new ones."""
    return ledger.add(plan_trials(sweep))


@pinned()
def work(sweep: Sweep, ledger: Ledger) -> None:
    """Work until the sweep is done, by this or other workers.

    If a cohort raises, its trials fail, with the reason in the ledger, and the worker continues with other cohorts.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, after the claimed trials are saved and released.
    """
    with interrupt_on_sigterm():
        _Worker(sweep, ledger).run()


class _Worker:
    """The state of one worker."""

    def __init__(self, sweep: Sweep, ledger: Ledger):
        self.sweep, self.ledger, self.policy = sweep, ledger, make_policy(sweep)
        self.tasks = sweep.task_sets()
        self.lanes: dict[str, int] = {}  # of the cohorts whose program is compiled
        self.last: str | None = None
        self.cooling: dict[str, float] = {}  # runs that another process still writes: time of the next attempt

    def run(self) -> None:
        wait = 1.0
        while True:
            self.ledger.recover()
            rows = self.ledger.rows()
            decision = self.policy.decide(rows)
            # Pruning comes first: a kill between the two must not change the decision.
            changed = sum([self.ledger.prune(name) for name in decision.prune])
            changed += self.ledger.add(decision.add)
            if changed:
                continue
            now = time.monotonic()
            ready = {n: until for n, until in decision.ready.items() if self.cooling.get(n, 0) <= now}
            if self._train(rows, ready) or self._ask():
                wait = 1.0
                continue
            states = Counter(row.state for row in rows)
            if not states["planned"] and not states["running"]:
                return
            if not states["running"] and not decision.ready:
                if states["failed"]:  # trials that depend on them wait until they are retried
                    return
                raise RuntimeError(f"{states['planned']} planned trials wait for nothing: the policy forgot them")
            time.sleep(wait)
            wait = min(1.5 * wait, 5.0)

    def _train(self, rows: list[LedgerRow], ready: Mapping[str, int]) -> bool:
        """Claim trials of one cohort and train them; return whether there were any."""
        trials = {row.trial.id: row.trial for row in rows if row.trial.id in ready}
        sizes = Counter(trial.cohort for trial in trials.values())
        if not sizes:
            return False
        cohort = self.last if self.last and self.last in sizes else sizes.most_common(1)[0][0]
        members = {name: ready[name] for name, trial in trials.items() if trial.cohort == cohort}
        limit = self._lanes(cohort, rows)
        claims = self.ledger.claim(members, limit)
        if not claims:
            return False
        self.last = cohort
        ended = sum(row.state in ENDED for row in rows)
        standing = f"{ended} of {len(rows)} done" if len(rows) > len(claims) else ""
        with self.ledger.beat(claims):
            _Cohort(self, claims, limit, branch_points([row.trial for row in rows], list(members)), standing).run()
        return True

    def _lanes(self, cohort: str, rows: list[LedgerRow]) -> int:
        """Return how many lanes a cohort's program has: the same for all its batches, so that it is compiled once."""
        from experiments.sweep.cohort import lanes_for

        if cohort not in self.lanes:
            members = [row.trial for row in rows if row.trial.cohort == cohort]
            drawn = self.sweep.trials * len(self.sweep.seeds) if self.sweep.sampler != "all" else 0
            self.lanes[cohort] = lanes_for(members[0], max(len(members), drawn), self.sweep.lanes)
        return self.lanes[cohort]

    def _ask(self) -> bool:
        """Let the sampler draw enough points to fill the lanes; return whether it did."""
        from experiments.sweep.search.samplers import make_sampler, suggester

        sweep = self.sweep
        if sweep.sampler == "all" or self.ledger.asked() >= sweep.trials:
            return False
        directions, space = [direction(name) for name in sweep.objectives], sweep.space()
        lanes = self.lanes.get(self.last or "") or sweep.lanes or 8
        return bool(
            self.ledger.ask(
                max(1, math.ceil(lanes / len(sweep.seeds))),
                sweep.trials,
                lambda drawn: make_sampler(sweep.sampler, sweep.sampler_seed, directions, drawn),
                lambda trial: trials_at(sweep, space.draw(suggester(trial))),
            )
        )

    def cool(self, claim: Claim) -> None:
        """Skip a trial for a while."""
        self.cooling[claim.trial.id] = time.monotonic() + _COOLING_SECONDS


class _Cohort:
    """One training of the claims of one cohort. standing: the sweep's progress as text."""

    def __init__(self, worker: _Worker, claims: list[Claim], limit: int, left_at: set[int], standing: str):
        self.worker, self.sweep, self.ledger, self.left_at = worker, worker.sweep, worker.ledger, left_at
        self.standing = standing
        self.claims, self.limit, self.claimed_at = claims, limit, time.time()

    def run(self) -> None:
        """Train the claimed trials; every claim is ended or released, also after an exception."""
        try:
            self._skip_held_runs()
            if self.claims:
                check_speed(self.claims[0].trial, self.sweep.objectives)
                results = self._train()
                for claim, result in zip(self.claims, results, strict=True):
                    self._report(claim, result, _concurrent_lanes(result, results))
        except KeyboardInterrupt:
            self._hand_back(self.claims)
            raise
        except BusyError:  # a worker that was taken for dead is still writing
            self._cool(self.claims)
        except Exception as error:
            if is_full(error):  # not a fault of the trial: the same command resumes once there is space
                self._hand_back(self.claims)
                raise
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            logger.warning("%d trials failed: %s", len(self.claims), words)
            for claim in self.claims:
                self.ledger.fail(claim, words)

    def _train(self) -> list[Result]:
        first = self.claims[0].trial
        steps = self.left_at
        if self.sweep.policy == "population":
            steps = steps.union(*(self.worker.policy.rungs(claim.trial) for claim in self.claims))
        shell = RunOptions(
            evaluate_tokens=self.sweep.evaluate_tokens,
            tasks=self.worker.tasks,
            keep_checkpoints=1,
            checkpoint_start=first.recipe.train.spike_sigma > 0,  # else it starts again from the seed
            keep_steps=tuple(sorted(steps)),
            description=": ".join(filter(None, (self.sweep.name, self.standing, self._words()))),
        )
        # Vmapped lanes that are idle still cost work, but another number of lanes costs a compilation.
        few = 1 << (len(self.claims) - 1).bit_length()
        return population(
            [self._recipe(claim.trial) for claim in self.claims],
            data=self.sweep.data,
            runs=[self.sweep.run_folder(claim.trial) for claim in self.claims],
            steps=[claim.until for claim in self.claims],
            shell=shell,
            lanes=min(few, self.limit),
            execution=first.execution,
        )

    def _words(self) -> str:
        if len(self.claims) > 1:
            return f"{len(self.claims)} trials"
        first = self.claims[0].trial
        return first.name or textwrap.shorten(describe(first.point), 60, placeholder=" …")

    def _recipe(self, trial: Trial) -> Recipe:
        """Return the trial's recipe, with the path of its weights, or for a branch the start from its parent's run."""
        if trial.parent is None:
            return self.sweep.placed(trial.recipe)
        name, step = trial.parent
        parent = (self.sweep.folder / "runs" / name).resolve()
        return trial.recipe.replace(start=Branch(read_record(parent)["run_id"], step, parent))

    def _report(self, claim: Claim, result: Result, lanes: int) -> None:
        """Write a run's result to the ledger: diverged, stopped at a rung, to be continued, or finished."""
        facts = _facts(result, lanes) | {
            "worker": self.ledger.worker,
            "claimed_at": self.claimed_at,
            "ended_at": time.time(),
        }
        loss = result.validation_loss
        if result.status == "diverged" or loss is None or not math.isfinite(loss):
            self.ledger.diverge(claim, facts | {"status": "diverged"})
        elif not self.ledger.report(claim, claim.until, loss):
            return
        elif claim.until < claim.trial.steps:
            self.ledger.hand_back(claim, facts)
        else:
            facts |= self._outcomes(claim.trial, result)
            found = values(claim.trial, self.sweep.objectives, facts, self.sweep.folder)
            self.ledger.finish(claim, list(found.values()), facts | found)

    def _outcomes(self, trial: Trial, result: Result) -> dict[str, float]:
        """Return the measurements of a trained model: means of its last validation, forgetting, capacity."""
        outcomes = validated(result.run, self.sweep.objectives)
        if FORGETTING in self.sweep.objectives:
            assert self.sweep.forgetting is not None
            outcomes[FORGETTING] = bits_per_byte(result.run, self.sweep.forgetting)
        if self.sweep.service is not None:
            file = self.sweep.folder / "capacity" / f"{trial.id}.json"
            outcomes |= self.sweep.service.measure(trial, result.run, file)
        return outcomes

    def _skip_held_runs(self) -> None:
        busy = [claim for claim in self.claims if is_held(self.sweep.run_folder(claim.trial))]
        self.claims = [claim for claim in self.claims if claim not in busy]
        self._cool(busy)

    def _cool(self, claims: list[Claim]) -> None:
        for claim in claims:
            self.worker.cool(claim)
        self._hand_back(claims)

    def _hand_back(self, claims: list[Claim]) -> None:
        for claim in claims:
            self.ledger.hand_back(claim)


def _concurrent_lanes(result: Result, results: Sequence[Result]) -> int:
    """Return how many of these runs, this one included, were running at the middle of this one."""
    return sum(2 * other.steps >= result.steps for other in results)


def _facts(result: Result, lanes: int) -> dict[str, Any]:
    return {
        "run": f"runs/{result.run.name}",
        "status": result.status,
        "steps": result.steps,
        "tokens": result.tokens,
        "flops_6nd": result.flops_6nd,
        "flops_exact": result.flops_exact,
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        TRAINING_SPEED: training_speed(result.run, lanes),
        "loss": result.validation_loss,
        "training_loss": result.loss,
        "skipped": result.skipped,
        "branch_step": result.branch_step,
    }
