"""The trials of a sweep: its points with its seeds, each checked before anything runs."""

import json
from collections.abc import Sequence
from typing import Any

from experiments.sweep.record import Sweep
from experiments.sweep.space import random
from experiments.sweep.space.kinds import describe
from experiments.sweep.space.overlay import apply
from experiments.sweep.trial import Trial
from model.errors import InputError


def plan_trials(sweep: Sweep) -> list[Trial]:
    """The trials of all points that are enumerated (sampler "all"), in the order of the calls; seeds vary fastest.

    One and the same trial stands there once. Raises InputError on a point that is impossible.
    """
    found: dict[str, Trial] = {}
    for request in (*sweep.earlier, sweep.request):
        if request.sampler == "all":
            for point in request.space(sweep.folder).points():
                for trial in trials_at(sweep, point, request.seeds):
                    found.setdefault(trial.id, trial)
    return list(found.values())


def trials_at(sweep: Sweep, point: dict[str, Any], seeds: Sequence[int] | None = None) -> list[Trial]:
    """A trial of the point for every seed (None: the sweep's); one alone where the point has a seed.

    Raises InputError on a point that is impossible.
    """
    chosen = (point["seed"],) if "seed" in point else sweep.seeds if seeds is None else seeds
    plain = json.loads(json.dumps(point))
    made = []
    for seed in chosen:
        setting = apply(sweep.base, {**plain, "seed": seed})
        made.append(Trial(setting, {**plain, "seed": seed}, sweep.data_hash))
    return made


def example_trials(sweep: Sweep, count: int) -> list[Trial]:
    """Trials as a search may draw them, for plans and checks: `count` random points of the newest space."""
    return [trial for point in random(sweep.space(), count).points() for trial in trials_at(sweep, point)]


def check_trial(trial: Trial, vocabulary: int) -> None:
    """Raise InputError on what `population` would refuse, before anything runs. vocabulary: of the data."""
    config, train_config = trial.setting.config, trial.setting.train_config
    if config.stack != "decoder" or config.head != "language-model":
        raise InputError(f"{describe(trial.point)}: a sweep trains decoders, not {config.stack!r} with {config.head!r}")
    if config.vocab_size < vocabulary:
        raise InputError(
            f"{describe(trial.point)}: vocab_size={config.vocab_size} is less than that of the data, {vocabulary}"
        )
    longest = max([train_config.seq_len, *(phase.seq_len or 0 for phase in train_config.phases)])
    if longest > config.max_seq_len:
        raise InputError(
            f"{describe(trial.point)}: seq_len={longest} is longer than the model's context, "
            f"max_seq_len={config.max_seq_len}"
        )
