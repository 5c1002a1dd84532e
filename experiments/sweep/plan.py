"""Plan a sweep: its cohorts, and their cost in FLOPs, hours and bytes. Only a probe is trained."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from experiments.sweep.cohort import Cohort, group, lanes_for, memory_bytes, state_bytes
from experiments.sweep.record import Sweep
from experiments.sweep.search.policies import hash_fraction, make_policy, play, tokens_used
from experiments.sweep.speed import Speed, time_steps
from experiments.sweep.trial import Trial
from experiments.sweep.trials import expected_trials
from model import accounting
from model.ambient import pinned
from train.lanes.build import prefers_vmap
from train.run import read_record
from train.task_sets import TaskSet, pack


@dataclasses.dataclass(frozen=True)
class CohortPlan:
    """The cost of all trials of one static shape."""

    cohort: str
    label: str
    trials: int
    lanes: int
    compiles: int
    params: int
    params_non_embedding: int
    steps: list[int]
    """The fewest and the most steps of a trial."""
    tokens: int
    expected_tokens: int
    """The tokens that the sweep's policy is expected to spend."""
    flops_6nd: float
    flops_exact: float
    state_bytes: int
    """The bytes of one trial."""
    checkpoint_bytes: int
    memory_bytes: int
    """The memory of a device that training is predicted to take."""
    step_seconds: float | None
    """None, like hours, without a probe."""
    hours: float | None


@dataclasses.dataclass(frozen=True)
class PlanTotal:
    """Sums over the cohorts; for the memory, the maximum."""

    trials: int
    compiles: int
    tokens: int
    flops_6nd: float
    flops_exact: float
    checkpoint_bytes: int
    hours: float | None
    """The hours of one worker on this machine for the expected tokens, with validation and compilation; None without a
    probe."""
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class ExpectedSpending:
    """The expected cost under the policy, if no trial diverges and the order of losses is random."""

    tokens: int
    share: float
    """The share of the tokens of all trials to their end."""
    flops_6nd: float


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """The cohorts of a sweep, and what they cost."""

    folder: str
    sampler: str
    policy: str
    estimated: bool
    """True if the sampler has not drawn its points yet; random points are used in the estimate."""
    done: int
    """The number of trials whose runs have ended already."""
    cohorts: list[CohortPlan]
    total: PlanTotal
    expected: ExpectedSpending
    probe: Speed | None
    """The real step, timed in the cohorts that have the smallest and the largest one."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


@pinned()
def plan_sweep(sweep: Sweep, probe: bool = True) -> SweepPlan:
    """Return the plan of a sweep. probe: time the step."""
    trials = expected_trials(sweep, sweep.trials)
    cohorts = group(trials)
    used = _expected(sweep, trials)
    shapes = [(cohort.trials[0], len(cohort.trials)) for cohort in cohorts]
    speed = time_steps(shapes) if probe else None
    tasks = sweep.task_sets()
    rows = [_row(sweep, cohort, used, speed, tasks) for cohort in cohorts]
    total = PlanTotal(
        trials=sum(row.trials for row in rows),
        compiles=sum(row.compiles for row in rows),
        tokens=sum(row.tokens for row in rows),
        flops_6nd=sum(row.flops_6nd for row in rows),
        flops_exact=sum(row.flops_exact for row in rows),
        checkpoint_bytes=sum(row.checkpoint_bytes for row in rows),
        hours=None if speed is None else sum(row.hours for row in rows if row.hours is not None),
        memory_bytes=max(row.memory_bytes for row in rows),
    )
    tokens = sum(row.expected_tokens for row in rows)
    return SweepPlan(
        folder=str(sweep.folder),
        sampler=sweep.sampler,
        policy=sweep.policy,
        estimated=sweep.sampler != "all",
        done=sum(_is_done(sweep, trial) for trial in trials),
        cohorts=rows,
        total=total,
        expected=ExpectedSpending(
            tokens=tokens,
            share=tokens / total.tokens,
            flops_6nd=sum(row.expected_tokens / row.tokens * row.flops_6nd for row in rows),
        ),
        probe=speed,
    )


def _row(
    sweep: Sweep,
    cohort: Cohort,
    used: dict[str, tuple[int, int]],
    speed: Speed | None,
    tasks: Sequence[TaskSet],
) -> CohortPlan:
    first, config, train_config = cohort.trials[0], cohort.config, cohort.train_config
    objective = first.recipe.objective
    lanes = lanes_for(first, len(cohort.trials), sweep.lanes)
    steps = [trial.steps for trial in cohort.trials]
    shared = sum(trial.parent[1] for trial in cohort.trials if trial.parent is not None)  # trained by a base run
    tokens = (sum(steps) - shared) * train_config.tokens_per_step
    params = accounting.parameters(config)
    # Where lanes run vmapped, fewer of them are a smaller program; halving their number each time.
    smaller = int(math.log2(lanes)) if prefers_vmap() and sweep.policy != "all" else 0
    expected, validations = (sum(column) for column in zip(*(used[trial.id] for trial in cohort.trials), strict=True))
    scored = pack(tasks, config, train_config.batch_size, train_config.seq_len).tokens
    validated = validations * (sweep.evaluate_tokens + scored)
    return CohortPlan(
        cohort=cohort.name,
        label=cohort.label,
        trials=len(cohort.trials),
        lanes=lanes,
        compiles=1 + smaller,
        params=params.total,
        params_non_embedding=params.non_embedding,
        steps=[min(steps), max(steps)],
        tokens=tokens,
        expected_tokens=expected,
        flops_6nd=tokens * objective.flops_per_token(config, train_config.seq_len, "6N"),
        flops_exact=tokens * objective.flops_per_token(config, train_config.seq_len, "exact"),
        state_bytes=state_bytes(first),
        checkpoint_bytes=len(cohort.trials) * state_bytes(first),
        memory_bytes=memory_bytes(first, lanes),
        step_seconds=None if speed is None else speed.step_seconds(config, train_config, objective),
        hours=None if speed is None else _hours(speed, cohort, expected, validated, 1 + smaller),
    )


def _expected(sweep: Sweep, trials: list[Trial]) -> dict[str, tuple[int, int]]:
    """Return (tokens, validations) of every trial under the policy; a population's children count as their parents."""
    used = {trial.id: (0, 0) for trial in trials}
    first: dict[str, str] = {}
    for row in play(make_policy(sweep), trials, lambda trial, step: hash_fraction(trial.id)):
        known = row.trial.id if row.trial.parent is None else first[row.trial.parent[0]]
        first[row.trial.id] = known
        tokens, validations = used[known]
        used[known] = tokens + tokens_used(row), validations + len(row.rungs)
    return used


def _hours(speed: Speed, cohort: Cohort, tokens: int, validated: int, compiles: int) -> float:
    """Return the hours to train and validate tokens; validation takes a third (forward pass only)."""
    steps = (tokens + validated / 3) / cohort.train_config.tokens_per_step
    seconds = speed.step_seconds(cohort.config, cohort.train_config, cohort.trials[0].recipe.objective)
    return (steps * seconds + compiles * speed.compile_seconds) / 3600


def _is_done(sweep: Sweep, trial: Trial) -> bool:
    folder = sweep.run_folder(trial)
    if not (folder / "run.json").exists():
        return False
    record = read_record(folder)
    return record["status"] == "diverged" or (record["status"] == "finished" and record["step"] >= trial.steps)
