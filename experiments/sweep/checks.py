"""Check a sweep for errors before any trial runs."""

from collections.abc import Mapping, Sequence

from experiments.sweep.capacity import CAPACITY
from experiments.sweep.objectives import FORGETTING, LOSS, check_speed, direction
from experiments.sweep.record import Sweep
from experiments.sweep.row import LedgerRow
from experiments.sweep.search.policies import make_policy
from experiments.sweep.search.samplers import check_axes, make_sampler
from experiments.sweep.space.kinds import describe
from experiments.sweep.trial import Trial
from experiments.sweep.trials import expected_trials
from model import Params
from model.checkpoint import parameters_sha256
from model.errors import InputError, check_at_least_one
from model.store import open_parameters
from train.data import load_manifest
from train.data.folders import Data
from train.data.manifest import Manifest
from train.data.shards import TokenShards
from train.loop.train import check_frozen
from train.recipe import Weights
from train.start import fit
from train.task_sets import TaskSet, check_model, is_task_metric

_PROBES = 16  # points of a searched space that represent those that a sampler draws


def check_data(sweep: Sweep) -> Manifest:
    """Return the sweep's data. Raises InputError if the folder no longer holds them."""
    hint = f"`isoflop sweep resume {sweep.folder} --data FOLDER` continues with their new path"
    if not sweep.data.exists():
        raise InputError(f"the data of the sweep {sweep.folder} are not at {sweep.data} any more; {hint}")
    manifest = load_manifest(sweep.data)
    if manifest.hash != sweep.data_hash:
        raise InputError(f"{sweep.data} holds other data than the sweep {sweep.folder} was made for; {hint}")
    return manifest


def check_weights(sweep: Sweep) -> Params | None:
    """Return the parameters that the sweep's trials start from; None: fresh ones.

    Raises InputError if the path holds other weights.
    """
    start = sweep.base.recipe.start
    if sweep.weights is None or not isinstance(start, Weights):
        return None
    hint = f"`isoflop sweep resume {sweep.folder} --base PATH` continues with their new path"
    if not sweep.weights.exists():
        raise InputError(f"the weights that the sweep {sweep.folder} starts from are not at {sweep.weights}; {hint}")
    params = open_parameters(sweep.weights)[1]
    if parameters_sha256(params) != start.sha256:
        raise InputError(f"{sweep.weights} holds other weights than the sweep {sweep.folder} starts from; {hint}")
    return params


def check_sweep(sweep: Sweep) -> None:
    """Raise InputError on objectives, a sampler, a policy or trials that are wrong or do not go together."""
    check_data(sweep)
    sources = Data.open(sweep.data).sources
    if not sweep.objectives or len(set(sweep.objectives)) < len(sweep.objectives):
        raise InputError(f"objectives={list(sweep.objectives)} must be at least one name, each once")
    if (FORGETTING in sweep.objectives) != (sweep.forgetting is not None):
        raise InputError(
            f"the objective {FORGETTING} and --forgetting FOLDER of plain text go together; give both or neither"
        )
    if (CAPACITY in sweep.objectives) != (sweep.service is not None):
        raise InputError(
            f"the objective {CAPACITY} and --service-level, such as ttft:200 tpot:20, go together; give both or neither"
        )
    tasks = sweep.task_sets()
    if sweep.lanes is not None:
        check_at_least_one(lanes=sweep.lanes)
    _check_sampler(sweep)
    measured = [name for one in tasks for name in one.metrics]
    if missing := [name for name in sweep.objectives if is_task_metric(name) and name not in measured]:
        raise InputError(f"the objective {missing[0]} is not measured; the tasks give {', '.join(measured)}: name one")
    policy = make_policy(sweep)
    trials = expected_trials(sweep, _PROBES)
    _check_start(sweep, trials)
    for trial in trials:
        _check_trial(trial, sources, tasks)
        if sweep.service is not None:
            sweep.service.check(trial)
        if trial.parent is not None and sweep.policy != "all":
            raise InputError(
                f"branches wait for their base runs, which --policy {sweep.policy} may stop; take --policy all"
            )
    if LOSS in sweep.objectives and len(names := sorted({trial.recipe.objective.NAME for trial in trials})) > 1:
        raise InputError(
            f"the losses of {' and '.join(names)} cannot be compared; run a sweep for each, or leave out the objective "
            f"{LOSS}"
        )
    if sweep.policy != "all":
        _check_recipes(sweep, trials)
    for trial in {trial.cohort: trial for trial in trials}.values():
        check_speed(trial, sweep.objectives)
    # `decide` raises if the policy cannot compare the trials; its decision is discarded.
    policy.decide([LedgerRow(number, trial, "planned", {}, None, {}) for number, trial in enumerate(trials)])


def _check_recipes(sweep: Sweep, trials: list[Trial]) -> None:
    """Raise InputError if trials differ in their execution alone: rounding would decide which of them continues."""
    first: dict[tuple[str, int], Trial] = {}
    for trial in trials:
        other = first.setdefault((trial.recipe.run_id, trial.steps), trial)
        if other.execution != trial.execution:
            names = [name for name in trial.point if trial.point[name] != other.point.get(name)]
            raise InputError(
                f"{' and '.join(names)} changes no loss but by rounding, so that --policy {sweep.policy} cannot choose "
                "by it; take --policy all"
            )


def _check_sampler(sweep: Sweep) -> None:
    directions = [direction(name) for name in sweep.objectives]
    if sweep.sampler == "all":
        if sweep.trials:
            raise InputError(
                f"trials={sweep.trials} goes with a sampler, which draws them; give --sampler random or tpe"
            )
        return
    make_sampler(sweep.sampler, sweep.sampler_seed, directions)
    if sweep.trials < 1:
        raise InputError(f"the sampler {sweep.sampler} needs --trials: how many points it is to draw")
    axes = sweep.space().axes()
    if not axes:
        raise InputError(f"the sampler {sweep.sampler} has nothing to choose; give --set NAME=VALUES or --space FILE")
    check_axes(sweep.sampler, axes)


def _check_start(sweep: Sweep, trials: list[Trial]) -> None:
    """Raise InputError if trials do not fit the starting weights, or branch off runs with frozen parameters."""
    params = check_weights(sweep)
    if params is None:
        return
    for config, trial in {trial.recipe.model: trial for trial in trials}.items():
        try:
            fit(params, config, sweep.weights, trial.recipe.objective.FRESH)
        except InputError as error:
            raise InputError(f"{describe(trial.point)}: {error}") from None
    if any(trial.recipe.objective.freezes for trial in trials):
        if sweep.policy == "population":
            raise InputError(
                "--policy population copies checkpoints, which hold no frozen parameters; take --policy halving"
            )
        if any(trial.parent is not None for trial in trials):
            raise InputError("branches continue from checkpoints, which lack frozen parameters; train all parameters")


def _check_trial(trial: Trial, sources: Mapping[str, TokenShards], tasks: Sequence[TaskSet]) -> None:
    """Raise InputError for a trial for which `population` would raise."""
    config, objective = trial.recipe.model, trial.recipe.objective
    try:
        objective.check(config, trial.recipe.train)
        objective.check_data(config, sources)
        check_model(config, tasks)
        if objective.freezes and trial.recipe.start is None:
            raise InputError(
                "what trainable and adapter leave as it is must come from a model; give the sweep a run, a Hugging "
                "Face folder or a GGUF file in place of the preset"
            )
        check_frozen([trial.recipe])
    except InputError as error:
        raise InputError(f"{describe(trial.point)}: {error}") from None
