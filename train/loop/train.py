"""Check the arguments of `train` and `population`, open what they name, and run the loop."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from model import Execution, ModelConfig
from model.ambient import pinned
from model.errors import InputError
from model.sharding import check_batch, default_axes, make_mesh
from train.config import HParams, TrainConfig
from train.data.folders import Data
from train.hosts import agree
from train.lanes.build import frozen_shapes, lanes_for, trained_shapes
from train.loop.loop import Loop
from train.loop.member import Member
from train.loop.microbatch import choose_microbatches
from train.loop.options import RunOptions
from train.objectives import Objective
from train.plan import Plan
from train.recipe import Branch, Places, Recipe, Weights, difference
from train.run import Result, executions, read_record
from train.run.checkpoint import Checkpoints
from train.start import Bases
from train.task_sets import check_model, pack

Folder = str | Path


@pinned()
def train(
    recipe: Recipe | ModelConfig,
    train_config: TrainConfig | None = None,
    hparams: HParams | None = None,
    *,
    run: Folder,
    data: Places | None = None,
    steps: int | None = None,
    shell: RunOptions = RunOptions(),
    branch: Branch | None = None,
    execution: Execution = Execution(),
) -> Result:
    """Train a recipe to its last step. The same call again resumes the run, also under another execution.

    Instead of a recipe it takes a config, TrainConfig and HParams, with the recipe's data, steps and start (`branch`).
    data: with a recipe, where its data are now. Raises InputError on bad input, before anything is written, and
    KeyboardInterrupt after Ctrl-C or SIGTERM, once the state is saved.
    """
    single = None if hparams is None else [hparams]
    return population(
        [recipe] if isinstance(recipe, Recipe) else recipe,
        train_config,
        single,
        data=data,
        runs=[run],
        steps=steps,
        shell=shell,
        branches=None if branch is None else [branch],
        execution=execution,
    )[0]


@pinned()
def population(
    recipes: Sequence[Recipe] | ModelConfig,
    train_config: TrainConfig | None = None,
    hparams: Sequence[HParams] | None = None,
    *,
    runs: Sequence[Folder],
    data: Places | None = None,
    steps: int | Sequence[int] | None = None,
    lanes: int | None = None,
    shell: RunOptions = RunOptions(),
    branches: Sequence[Branch | None] | None = None,
    execution: Execution = Execution(),
) -> list[Result]:
    """Train one lane per recipe, all in one compiled program, each with a run directory of its own.

    The recipes may differ in hyperparameters, steps and starts only. Instead of recipes: a config, a TrainConfig and
    several HParams. steps: for all, or one number each. A lane ends at its own horizon (`hparams.total_steps`, or its
    `steps`) and its state stays fixed from then on; one that is not finite for `max_skipped` steps in a row ends as
    "diverged". Neither changes a bit of the other lanes; but vmapped lanes that remain (`RunOptions.compact`) then move
    to a program of half as many lanes, which rounds differently. lanes (or the execution's): of the program, at least
    one per recipe; the others are padding that is never active, so that calls with fewer recipes run the same program
    with the same bits. The number is rounded up to a multiple of the mesh's population axis. Raises as `train` does.
    """
    chosen = _recipes(recipes, train_config, hparams, data, steps, branches)
    if not chosen:
        raise InputError("a population needs at least one lane")
    first, opened = chosen[0], _open(chosen, data)
    config, train_config = first.model, first.train
    bases = Bases(config, first.objective.FRESH)
    _check(chosen, opened, runs, shell, bases)
    lanes = lanes or execution.lanes or len(chosen)
    if lanes < len(chosen):
        raise InputError(f"lanes={lanes} is fewer than the {len(chosen)} members; give at least one lane to each")
    if execution.accumulate == 1:
        execution = execution.replace(accumulate=first.accumulate)
    execution = _as_before(execution, config, runs, shell)
    first.objective.check_execution(train_config, execution)
    stages = Plan.of(train_config, None if train_config.phases else 1).stages
    rows = math.gcd(*(stage.batch_size // execution.accumulate for stage in stages))
    mesh = make_mesh(execution.mesh or default_axes(rows), execution.platform)
    lanes = lanes_for(mesh, lanes, len(chosen))
    execution = choose_microbatches(config, train_config, lanes, mesh, shell, execution, first.objective)
    if first.accumulate not in (1, execution.accumulate):
        raise InputError(
            f"the recipe has accumulate={first.accumulate}, which is part of a run with dropout or experts, and the "
            f"execution accumulate={execution.accumulate}; give one of them"
        )
    for stage in stages:
        check_batch(mesh, stage.batch_size // execution.accumulate, stage.seq_len)
    validation = first.objective.validation(config, train_config, opened.first, shell.evaluate_tokens)
    tasks = pack(shell.tasks, config, train_config.batch_size, train_config.seq_len)
    with ExitStack() as stack:
        members = []
        for recipe, folder in zip(chosen, runs, strict=True):
            members.append(Member(recipe.under(execution), Path(folder), opened, shell, execution))
            stack.callback(members[-1].close)
        if not all(member.ended for member in members):
            try:
                Loop(members, lanes, validation, tasks, bases, mesh, shell, execution).run(stack)
            except Exception:
                for member in members:
                    member.fail()
                raise
        return [member.result() for member in members]


def _recipes(
    recipes: Sequence[Recipe] | ModelConfig,
    train_config: TrainConfig | None,
    hparams: Sequence[HParams] | None,
    data: Places | None,
    steps: int | Sequence[int] | None,
    branches: Sequence[Branch | None] | None,
) -> list[Recipe]:
    """Return the recipes of a call in either form. Raises InputError if the two are mixed."""
    if not isinstance(recipes, ModelConfig):
        given = {"train_config": train_config, "hparams": hparams, "branch": branches}
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name} is part of the recipe; give recipe.replace(…) instead")
        if isinstance(recipes, Recipe) or not all(isinstance(one, Recipe) for one in recipes):
            raise InputError("give a list of Recipes, or a ModelConfig with its TrainConfig, HParams and data")
        found = list(recipes)
        counts = _steps_of_each(steps, len(found))
        for number, count in enumerate(counts):
            if count is not None:
                found[number] = found[number].replace(steps=count)
        return found
    if train_config is None or hparams is None or data is None:
        raise InputError("give a Recipe, or a ModelConfig with its TrainConfig, HParams and data")
    if branches is not None and len(branches) != len(hparams):
        raise InputError(f"{len(hparams)} sets of hyperparameters but {len(branches)} branches were given")
    if not hparams:
        return []
    opened = Data.open(data)
    base = Recipe(recipes, train_config, hparams[0], opened.hash, folders=opened.place)
    counts, starts = _steps_of_each(steps, len(hparams)), branches or [None] * len(hparams)
    each = zip(hparams, counts, starts, strict=True)
    return [base.replace(hparams=values, steps=count, start=start) for values, count, start in each]


def _steps_of_each(steps: int | Sequence[int] | None, count: int) -> list[int | None]:
    if steps is None or isinstance(steps, int):
        return [steps] * count
    if len(steps) != count:
        raise InputError(f"{count} sets of hyperparameters but {len(steps)} numbers of steps were given")
    return [int(number) for number in steps]


def _open(recipes: Sequence[Recipe], data: Places | None) -> Data:
    """Return the data of the recipes. Raises InputError if their folder is not known or holds other data."""
    first = recipes[0]
    place = first.folders if data is None else data
    if place is None:
        raise InputError(f"the folder of the data {first.data!r} is not known; give data=FOLDER")
    opened = Data.open(place)
    if opened.hash != first.data:
        raise InputError(f"{opened.place} holds other data than the recipe names")
    return opened


def _check(recipes: Sequence[Recipe], opened: Data, runs: Sequence, options: RunOptions, bases: Bases) -> None:
    first = recipes[0]
    options.check_metric(first.objective.validation_metrics)
    if len(recipes) != len(runs):
        raise InputError(f"{len(recipes)} sets of hyperparameters but {len(runs)} run folders were given")
    if len({str(Path(run).absolute()) for run in runs}) < len(runs):
        raise InputError("two lanes have the same run folder; every lane needs its own")
    for other in recipes[1:]:
        if differing := difference(first, other.replace(hparams=first.hparams, start=first.start)):
            raise InputError(
                f"the lanes of a population may differ in hyperparameters, steps and starts, not in {differing}"
            )
    first.objective.check(first.model, first.train)
    check_model(first.model, options.tasks)
    check_frozen(recipes)
    needed = [recipe.start for recipe, run in zip(recipes, runs, strict=True) if _reads_start(recipe, Path(run))]
    for start in dict.fromkeys(needed):
        if isinstance(start, Weights):
            _check_fresh(first.objective, bases.lacking(start), start)
    first.objective.check_data(first.model, opened.sources)
    planned = options.checkpoint_every or options.keep_every or options.keep_steps
    if first.train.spike_sigma > 0 and not planned:
        raise InputError(
            f"spike_sigma={first.train.spike_sigma} needs checkpoint_every (or keep_every): where a run goes back to "
            "must not depend on the clock"
        )


def _check_fresh(objective: Objective, lacking: Sequence[str], start: Weights) -> None:
    """Raise InputError if parameters that the start lacks, and that are drawn, would not be trained."""
    for name in lacking:
        if objective.freezes and name not in objective.trainable:
            raise InputError(
                f"{start.path} has no {name} of the model's shape, so that it is drawn and must be trained; "
                f"set objective.trainable={name}"
            )


def _reads_start(recipe: Recipe, run: Path) -> bool:
    """Return whether the run reads its start: before its first step or, with frozen parameters, whenever it resumes."""
    if not (run / "run.json").exists():
        return True
    record = read_record(run)
    ended = record["status"] == "diverged" or record.get("stopped_early") or record["step"] >= recipe.horizon
    return not ended and (recipe.objective.freezes or not Checkpoints(run, read_only=True).steps())


def check_frozen(recipes: Sequence[Recipe]) -> None:
    """Raise InputError unless frozen parameters come from weights, the same ones for all lanes."""
    first, objective = recipes[0].start, recipes[0].objective
    if objective.adapter is None:
        for recipe in recipes:
            if recipe.hparams.lora_rank > 0 or recipe.hparams.lora_alpha > 0:
                raise InputError("lora_rank and lora_alpha are for a low-rank adapter; give the objective an adapter")
    if not objective.freezes:
        return
    given = f"trainable={list(objective.trainable)}" if objective.trainable else "an adapter"
    if isinstance(first, Branch):
        raise InputError(
            f"a run with {given} cannot branch off another run, whose checkpoints hold no frozen parameters; start "
            "one of its own from the same weights"
        )
    if not isinstance(first, Weights):
        raise InputError(
            f"{given} leaves the other parameters unchanged, so that they must come from a model; give a run, a "
            "Hugging Face folder or a GGUF file in place of the preset (start=weights(PATH) of a Recipe)"
        )
    if any(recipe.start != first for recipe in recipes):
        raise InputError("lanes that share frozen parameters must start from the same weights")
    frozen_shapes(recipes[0].model, objective)
    if objective.adapter is not None:
        trained_shapes(recipes[0].model, objective)
        for recipe in recipes:
            if recipe.hparams.lora_rank > objective.adapter.rank:
                raise InputError(
                    f"lora_rank={int(recipe.hparams.lora_rank)} exceeds the adapter's rank={objective.adapter.rank}, "
                    "which is the largest of its lanes; give that one the largest rank"
                )


def _as_before(execution: Execution, config: ModelConfig, runs: Sequence[Folder], options: RunOptions) -> Execution:
    """Return the execution with its open fields set as in existing runs, or else by the default rules.

    Open are scan_layers=None and, with microbatch="auto", the number of microbatches, which may then only grow.
    """
    before = agree(lambda: _executed(runs))
    if execution.scan_layers is None:
        known = before and before["scan_layers"]
        execution = execution.replace(scan_layers=execution.scans(config) if known is None else known)
    if options.microbatch == "auto" and before is not None and "accumulate" in before:
        execution = execution.replace(accumulate=before["accumulate"])
    return execution


def _executed(runs: Sequence[Folder]) -> dict | None:
    """Return the known fields of the newest execution of the first run that has begun; None if none has."""
    for folder in runs:
        if (Path(folder) / "run.json").exists() and (found := executions(record := read_record(folder))):
            known = found[-1][1].to_dict()
            if "executions" not in record:  # older versions did not record the microbatches
                del known["accumulate"]
            return known
    return None
