"""List the trials of a sweep: its points with its seeds."""

import json
from collections.abc import Sequence
from typing import Any

from experiments.sweep.branches import list_trials
from experiments.sweep.record import Sweep
from experiments.sweep.space import random
from experiments.sweep.space.overlay import apply
from experiments.sweep.trial import Trial


def plan_trials(sweep: Sweep) -> list[Trial]:
    """Return the trials that are listed or enumerated (sampler "all"), in the order of the calls; seeds vary fastest.

    Equal trials are listed once. Raises InputError on a point that is impossible.
    """
    found: dict[str, Trial] = {}
    for request in (*sweep.earlier, sweep.request):
        if request.listed:
            for trial in list_trials(_base(sweep), request.listed):
                found.setdefault(trial.id, trial)
        elif request.sampler == "all":
            for point in request.space(sweep.folder).points():
                for trial in trials_at(sweep, point, request.seeds):
                    found.setdefault(trial.id, trial)
    return list(found.values())


def trials_at(sweep: Sweep, point: dict[str, Any], seeds: Sequence[int] | None = None) -> list[Trial]:
    """Return a trial of the point for every seed (None: the sweep's); one alone where the point has a seed.

    Raises InputError on a point that is impossible.
    """
    chosen = (point["seed"],) if "seed" in point else sweep.seeds if seeds is None else seeds
    plain, base = json.loads(json.dumps(point)), _base(sweep)
    return [apply(base, {**plain, "seed": seed}) for seed in chosen]


def expected_trials(sweep: Sweep, count: int) -> list[Trial]:
    """Return `plan_trials`; if a sampler has not drawn its points yet, `count` random points replace them."""
    found = plan_trials(sweep)
    if sweep.sampler != "all":
        points = random(sweep.space(), count).points()
        found += [trial for point in points for trial in trials_at(sweep, point)]
    return list({trial.id: trial for trial in found}.values())


def _base(sweep: Sweep) -> Trial:
    """Return the base trial with the paths of its data, which objectives may read, and of its weights."""
    return sweep.base.replace(recipe=sweep.placed(sweep.base.recipe).replace(folders=str(sweep.data)))
