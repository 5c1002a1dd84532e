"""Plan a sweep: its cohorts, and their cost in FLOPs, hours and bytes. Only a probe is trained."""

import dataclasses
import math
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


@pinned()
def plan_sweep(sweep: Sweep, probe: bool = True) -> dict[str, Any]:
    """Return the plan as a document.

    cohorts: of each the trials, lanes, compiles, parameters, steps, and sums over its trials: tokens, FLOPs (6ND and
    exact), bytes of their checkpoints. memory_bytes: predicted, of a device, while it trains. total: the sums.
    expected: tokens and FLOPs under the sweep's policy, where no trial diverges and the order of losses is by chance.
    done: trials whose runs have ended already. hours (None without a probe) are those of one worker on this machine for
    what the policy is expected to train, with validation and compilation; probe: the real step, timed in the cohorts
    that have the smallest and the largest one. estimated: the sampler has not drawn its points yet; random points are
    used in the estimate.
    """
    trials = expected_trials(sweep, sweep.trials)
    cohorts = group(trials)
    used = _expected(sweep, trials)
    shapes = [(cohort.trials[0], len(cohort.trials)) for cohort in cohorts]
    speed = time_steps(shapes) if probe else None
    rows = [_row(sweep, cohort, used, speed) for cohort in cohorts]
    summed = ("trials", "compiles", "tokens", "flops_6nd", "flops_exact", "checkpoint_bytes", "hours")
    total = {name: None if rows[0][name] is None else sum(row[name] for row in rows) for name in summed}
    tokens = sum(row["expected_tokens"] for row in rows)
    return {
        "folder": str(sweep.folder),
        "sampler": sweep.sampler,
        "policy": sweep.policy,
        "estimated": sweep.sampler != "all",
        "done": sum(_is_done(sweep, trial) for trial in trials),
        "cohorts": rows,
        "total": total | {"memory_bytes": max(row["memory_bytes"] for row in rows)},
        "expected": {
            "tokens": tokens,
            "share": tokens / total["tokens"],
            "flops_6nd": sum(row["expected_tokens"] / row["tokens"] * row["flops_6nd"] for row in rows),
        },
        "probe": None if speed is None else dataclasses.asdict(speed),
    }


def _row(sweep: Sweep, cohort: Cohort, used: dict[str, tuple[int, int]], speed: Speed | None) -> dict[str, Any]:
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
    return {
        "cohort": cohort.name,
        "label": cohort.label,
        "trials": len(cohort.trials),
        "lanes": lanes,
        "compiles": 1 + smaller,
        "params": params.total,
        "params_non_embedding": params.non_embedding,
        "steps": [min(steps), max(steps)],
        "tokens": tokens,
        "expected_tokens": expected,
        "flops_6nd": tokens * objective.flops_per_token(config, train_config.seq_len, "6N"),
        "flops_exact": tokens * objective.flops_per_token(config, train_config.seq_len, "exact"),
        "state_bytes": state_bytes(first),
        "checkpoint_bytes": len(cohort.trials) * state_bytes(first),
        "memory_bytes": memory_bytes(first, lanes),
        "step_seconds": speed and speed.step_seconds(config, train_config, objective),
        "hours": speed and _hours(speed, cohort, expected, validations * sweep.evaluate_tokens, 1 + smaller),
    }


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
