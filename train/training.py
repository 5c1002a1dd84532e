"""What a caller asks for: checked, opened, and handed to the loop."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from model import ModelConfig
from model.ambient import pinned
from model.errors import InputError
from model.sharding import check_batch, default_axes, make_mesh, parts_of_lanes
from train.apart import lie_apart
from train.branch import Branch
from train.config import HParams, TrainConfig
from train.data.folders import Data
from train.loop import Loop
from train.microbatch import choose_cuts
from train.plan import Plan
from train.run import Result
from train.shell import Shell
from train.trial import Trial

Folder = str | Path


@pinned()
def train(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: HParams,
    *,
    data: Folder | Mapping[str, Folder],
    run: Folder,
    steps: int | None = None,
    shell: Shell = Shell(),
    branch: Branch | None = None,
) -> Result:
    """Train until `steps` updates are made (None: the schedule's horizon). The same call again resumes the run.

    data: a prepared folder, or several by the names that mixtures use, the first for validation too. branch: where it
    leaves another run (`train.branch`). Raises InputError on bad input, before anything is written, and
    KeyboardInterrupt after Ctrl-C or SIGTERM, once the state is saved.
    """
    branches = None if branch is None else [branch]
    return population(
        config, train_config, [hparams], data=data, runs=[run], steps=steps, shell=shell, branches=branches
    )[0]


@pinned()
def population(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: Sequence[HParams],
    *,
    data: Folder | Mapping[str, Folder],
    runs: Sequence[Folder],
    steps: int | Sequence[int] | None = None,
    lanes: int | None = None,
    shell: Shell = Shell(),
    branches: Sequence[Branch | None] | None = None,
) -> list[Result]:
    """Train one lane per entry of `hparams`, all in one compiled program, each with a run directory of its own.

    steps: for all, or one number each. A lane ends at its own horizon (`hparams.total_steps`, or its `steps`) and is
    frozen from there on; one that goes non-finite for `max_skipped` steps ends as "diverged". Neither changes a bit of
    its neighbours; but where lanes run side by side (`Shell.compact`) those that are left then move to a program of
    half as many lanes, which rounds differently. lanes: of the program, at least one each; the others are padding that
    is never active, so that calls with fewer trials run the same program to the same bits. It is rounded up to what
    the mesh's population axis divides. Raises as `train` does.
    """
    _check(config, train_config, hparams, runs, shell)
    targets = _steps_of_each(steps, len(hparams))
    lanes = len(hparams) if lanes is None else lanes
    if lanes < len(hparams):
        raise InputError(f"lanes={lanes} is fewer than the {len(hparams)} trials; give at least one lane to each")
    opened = Data.open(data)
    for name, source in opened.sources.items():
        if source.manifest.vocab_size > config.vocab_size:
            raise InputError(
                f"the vocabulary of {name} ({source.manifest.vocab_size}) exceeds the model's "
                f"vocab_size={config.vocab_size}"
            )
    stages = Plan.of(train_config, None if train_config.phases else 1).stages
    rows = math.gcd(*(stage.batch_size // train_config.accumulate for stage in stages))
    mesh = make_mesh(shell.mesh or default_axes(rows))
    if lie_apart(mesh):
        lanes = len(hparams)  # lanes are no part of the program, so that nothing is to be filled up
    lanes = -(-lanes // parts_of_lanes(mesh)) * parts_of_lanes(mesh)
    train_config = choose_cuts(config, train_config, lanes, mesh, shell)
    for stage in stages:
        check_batch(mesh, stage.batch_size // train_config.accumulate, stage.seq_len)
    with ExitStack() as stack:
        trials = []
        for number, (values, folder) in enumerate(zip(hparams, runs, strict=True)):
            branch = branches[number] if branches else None
            trials.append(Trial(config, train_config, values, Path(folder), opened, targets[number], shell, branch))
            stack.callback(trials[-1].close)
        if not all(trial.ended for trial in trials):
            try:
                Loop(config, train_config, trials, lanes, opened.first, mesh, shell).run(stack)
            except Exception:
                for trial in trials:
                    trial.fail()
                raise
        return [trial.result() for trial in trials]


def _steps_of_each(steps: int | Sequence[int] | None, count: int) -> list[int | None]:
    if steps is None or isinstance(steps, int):
        return [steps] * count
    if len(steps) != count:
        raise InputError(f"{count} sets of hyperparameters but {len(steps)} numbers of steps were given")
    return [int(number) for number in steps]


def _check(
    config: ModelConfig, train_config: TrainConfig, hparams: Sequence[HParams], runs: Sequence, shell: Shell
) -> None:
    if not hparams:
        raise InputError("a population needs at least one lane")
    if len(hparams) != len(runs):
        raise InputError(f"{len(hparams)} sets of hyperparameters but {len(runs)} run folders were given")
    if len({str(Path(run).absolute()) for run in runs}) < len(runs):
        raise InputError("two lanes have the same run folder; every lane needs its own")
    check_trainable(config, train_config)
    planned = shell.checkpoint_every or shell.keep_every or shell.keep_steps
    if train_config.spike_sigma > 0 and not planned:
        raise InputError(
            f"spike_sigma={train_config.spike_sigma} needs checkpoint_every (or keep_every): where a run goes back to "
            "must not depend on the clock"
        )


def check_trainable(config: ModelConfig, train_config: TrainConfig) -> None:
    """Raise InputError on a model that a run cannot train on plain text, or not in rows of this length."""
    if config.stack != "decoder" or config.head != "language-model":
        raise InputError(
            f"a run trains decoders on plain text, not stack={config.stack!r} with head={config.head!r}; "
            "use train_step with batches of your own"
        )
    longest = max([train_config.seq_len, *(phase.seq_len or 0 for phase in train_config.phases)])
    if longest > config.max_seq_len:
        raise InputError(f"seq_len={longest} is longer than the model's context, max_seq_len={config.max_seq_len}")
