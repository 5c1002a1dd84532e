"""What can be known to be wrong with a sweep before anything of it runs."""

from experiments.sweep.objectives import check_speed, direction
from experiments.sweep.record import Sweep
from experiments.sweep.row import Row
from experiments.sweep.search.policies import make_policy
from experiments.sweep.search.samplers import check_axes, make_sampler
from experiments.sweep.trials import example_trials, plan_trials
from model.errors import InputError
from train.data import load_manifest


def check_data(sweep: Sweep) -> None:
    """Raise InputError where the data are not (any more) those of the sweep."""
    found = load_manifest(sweep.data).hash
    if found != sweep.data_hash:
        raise InputError(f"{sweep.data} holds other data than the sweep {sweep.folder} was made for; restore them")


def check_sweep(sweep: Sweep) -> None:
    """Raise InputError on objectives, a sampler or a policy that cannot do with the sweep's trials; nothing runs."""
    check_data(sweep)
    directions = [direction(name) for name in sweep.objectives]
    if sweep.sampler == "all":
        trials = plan_trials(sweep)
    else:
        check_axes(sweep.sampler, sweep.space().axes())
        make_sampler(sweep.sampler, sweep.sampler_seed, directions)
        trials = example_trials(sweep, 4)
    for setting in {trial.setting.cohort: trial.setting for trial in trials}.values():
        check_speed(setting, sweep.objectives)
    # A policy says so when it cannot compare trials: it is asked, and nothing is done about its answer.
    make_policy(sweep).decide([Row(n, trial, "planned", {}, None, {}) for n, trial in enumerate(trials)])
