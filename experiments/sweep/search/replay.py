"""Replay searches on a recorded grid: how many trials each sampler needs, for many seeds, without training.

The sampler suggests a point of the grid and receives the loss of a random one of its runs, so that it sees realistic
noise. A numeric axis is suggested by rank, so that its spacing is the grid's; other axes by name.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.sweep.search.recorded import Recorded, is_ordered
from experiments.sweep.search.samplers import make_sampler
from model.errors import check_at_least_one


@dataclasses.dataclass(frozen=True)
class Replay:
    """One search. first: the number, from 1, of the first trial in the best region; settled: the trial from which the
    best point so far (by mean loss) stays in that region to the end of the budget. None: never.
    """

    first: int | None
    settled: int | None


@dataclasses.dataclass(frozen=True)
class SamplerReplays:
    """The searches of one sampler, and their [lower quartile, median, upper quartile].

    None if a search did not get there.
    """

    first: list[int | None]
    first_quartiles: list[int | None]
    settled: list[int | None]
    settled_quartiles: list[int | None]


@dataclasses.dataclass(frozen=True)
class SamplerComparison:
    """The number of trials that each sampler needs on a recorded grid."""

    axes: dict[str, list[Any]]
    points: int
    best: dict[str, Any]
    best_mean: float
    seed_noise: float
    best_region: list[dict[str, Any]]
    replays: int
    budget: int
    """The number of trials of each search."""
    batch: int
    samplers: dict[str, SamplerReplays]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def replay_search(recorded: Recorded, sampler: str, seed: int, budget: int, batch: int = 1) -> Replay:
    """Run one search of `budget` trials, of which `batch` at a time are requested and then reported.

    Raises InputError.
    """
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    random = np.random.default_rng([seed, 1])
    region = recorded.best_region
    seen: dict[tuple[Any, ...], list[float]] = {}
    visits: list[bool] = []
    recommended: list[bool] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(sampler=make_sampler(sampler, seed))
            while len(visits) < budget:
                asked = [study.ask() for _ in range(min(batch, budget - len(visits)))]
                points = [_suggest(trial, recorded.axes) for trial in asked]
                for trial, point in zip(asked, points, strict=True):
                    answers = recorded.losses[point]
                    answer = answers[random.integers(len(answers))]
                    seen.setdefault(point, []).append(math.inf if answer is None else answer)
                    if answer is None:
                        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    else:
                        study.tell(trial, answer)
                    visits.append(point in region)
                    recommended.append(min(seen, key=lambda known: math.fsum(seen[known]) / len(seen[known])) in region)
    finally:
        optuna.logging.set_verbosity(verbosity)
    outside = [number for number, good in enumerate(recommended, 1) if not good]
    settled = outside[-1] + 1 if outside else 1
    return Replay(visits.index(True) + 1 if any(visits) else None, settled if settled <= budget else None)


def compare_samplers(
    recorded: Recorded,
    samplers: Sequence[str],
    *,
    replays: int = 20,
    budget: int | None = None,
    batch: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> SamplerComparison:
    """Replay each sampler with the seeds 0, 1, …; budget: trials of each (None: as many as the grid has points).

    Raises InputError.
    """
    budget = len(recorded.losses) if budget is None else budget
    check_at_least_one(replays=replays, trials=budget, batch=batch)
    for sampler in samplers:
        make_sampler(sampler, 0)  # raise now, before hours are spent on the others
    by_sampler = {}
    for sampler in samplers:
        found = []
        for seed in range(replays):
            found.append(replay_search(recorded, sampler, seed, budget, batch))
            advance()
        first, settled = [replay.first for replay in found], [replay.settled for replay in found]
        by_sampler[sampler] = SamplerReplays(first, quartiles(first), settled, quartiles(settled))
    return SamplerComparison(
        axes=recorded.axes,
        points=len(recorded.losses),
        best=recorded.named(recorded.best),
        best_mean=recorded.mean(recorded.best),
        seed_noise=recorded.seed_noise,
        best_region=[recorded.named(point) for point in sorted(recorded.best_region, key=recorded.mean)],
        replays=replays,
        budget=budget,
        batch=batch,
        samplers=by_sampler,
    )


def quartiles(trials: Sequence[int | None]) -> list[int | None]:
    """Return the lower quartile, median and upper quartile, each one of the numbers; None counts as the largest."""
    numbers = [math.inf if number is None else number for number in trials]
    values = np.quantile(numbers, [0.25, 0.5, 0.75], method="inverted_cdf")
    return [int(value) if math.isfinite(value) else None for value in values]


def _suggest(trial: Any, axes: dict[str, list[Any]]) -> tuple[Any, ...]:
    point = []
    for name, values in axes.items():
        if is_ordered(values):
            point.append(values[trial.suggest_int(name, 0, len(values) - 1)])
        else:
            point.append(values[trial.suggest_categorical(name, range(len(values)))])
    return tuple(point)
