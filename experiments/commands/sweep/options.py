"""Define the options of `isoflop sweep run` and `plan`: the definition of a sweep on the command line."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.commands.options import Overrides

if TYPE_CHECKING:
    from experiments.sweep.record import Sweep
    from experiments.tuning import Tuning

Axes = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUES")]


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """The definition of a sweep."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    """A preset (see `isoflop model list`) or a JSON file of a model config, trained from fresh parameters; or a run, a
    Hugging Face folder or a GGUF file, whose parameters every trial starts from."""
    data: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """A folder made by `isoflop data prepare`."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The folder of the sweep. The same command again resumes it; other axes, seeds or trials are added to it."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Updates of each trial, unless an axis gives steps, tokens or tokens_per_parameter."""
    set: Axes = ()
    """Axes, in all combinations: NAME=v1,v2 or NAME=logspace:LOW:HIGH:COUNT; to draw: NAME=loguniform:LOW:HIGH."""
    space: Annotated[Path | None, tyro.conf.arg(metavar="FILE.py")] = None
    """A Python file that defines `space`, which is multiplied with the axes (see `experiments/sweep/space/`)."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Runs per setting; their spread is the noise of the result. By default 1, or the file's `replicate`."""
    base: Overrides = ()
    """Other fields for all trials, such as schedule=wsd num_layers=3."""
    lora: Annotated[int | None, tyro.conf.arg(metavar="RANK")] = None
    """Train low-rank adapters of a stored model, whose own parameters are on the devices once for all lanes; RANK is
    the largest of --set lora_rank=2,4,8."""
    tune: Annotated[str | None, tyro.conf.arg(metavar="METHOD")] = None
    """Fine-tune a stored model by a method of `isoflop tune`, with its defaults: sft, reward, dpo, kto, …; FOLDER is
    then of `isoflop data prepare --kind`, and beta, label_smoothing and lora_rank are axes of one program."""
    forgetting: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Plain text, for the objective forgetting: its bits per byte after training."""
    service_level: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME:MS ...")] = ()
    """For the objective capacity: the limits that a good request keeps, as in `isoflop bench serve`, such as ttft:200
    tpot:20. Prompts are of about decode.context tokens, an axis as decode.weights and decode.cache are."""
    service_share: Annotated[float, tyro.conf.arg(metavar="X")] = 0.95
    """The share of good requests at the capacity."""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Rows per step."""
    seq_len: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Tokens per row; by default 128, with --tune what the longest example takes."""
    objective: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ("loss",)
    """One or several of: loss, training_tokens_per_second, accuracy, margin or chosen_reward of --tune, forgetting,
    capacity (requests per second at --service-level, by the serving engine in this process, after training),
    TASK/METRIC such as minimal_pairs/bits_per_byte, whose metrics are acc, acc_norm and bits_per_byte, or a number of
    `isoflop bench decode`, such as tokens_per_second. Where losses are different functions, as at several betas, the
    first of accuracy, forgetting and tasks that is given ranks the settings."""
    sampler: Annotated[str, tyro.conf.arg(metavar="NAME")] = "all"
    """all: every combination; or draw --trials of them: random, quasirandom, tpe, gp, cmaes, nsga2."""
    trials: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """How many settings a sampler draws, each with all seeds."""
    sampler_seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of the sampler."""
    policy: Annotated[str, tyro.conf.arg(metavar="NAME")] = "all"
    """all: every trial to its end; halving, hyperband: the worse stop early; population: they copy the better."""
    eta: Annotated[float, tyro.conf.arg(metavar="X")] = 3.0
    """Halving and hyperband: one in ETA trials continues from each rung."""
    min_fraction: Annotated[float, tyro.conf.arg(metavar="X")] = 1 / 9
    """Halving and hyperband: the first rung, over a trial's tokens."""
    interval_fraction: Annotated[float, tyro.conf.arg(metavar="X")] = 0.1
    """Population: how often members are exchanged, over a trial's steps."""
    quantile: Annotated[float, tyro.conf.arg(metavar="X")] = 0.2
    """Population: the share that leaves, and of the best that take their places."""
    resample: Annotated[float, tyro.conf.arg(metavar="X")] = 0.25
    """Population: how often a copy draws a new value instead of perturbing its own."""
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Where workers find each other: postgresql+psycopg://… (a password is not written down: see PGPASSWORD),
    journal:FILE; SQLite in the sweep's folder by default."""
    lanes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Largest number of vmapped trials in one program; by default as many as memory holds."""
    evaluate_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 65_536
    """Tokens of the validation split, the same for all trials; all of them if it has fewer."""
    evaluate_task_items: Annotated[int, tyro.conf.arg(metavar="N")] = 500
    """Questions of each task among the objectives, the same for all trials."""

    def define(self) -> "Sweep":
        """Return the sweep with these options, merged with the definition in its folder. Nothing is written."""
        from experiments.commands.train import dtype_of
        from experiments.inputs import read_changes
        from experiments.models import is_stored, read_config, started_from
        from experiments.sweep.address import without_password
        from experiments.sweep.capacity import ServiceLevel
        from experiments.sweep.definition import define

        settings = _SETTINGS.get(self.policy, ())
        self._warn_about_unused(settings)
        base = read_changes(self.base)
        start: dict[str, Any] = {}
        seq_len, steps = self.seq_len, self.steps
        if tuning := self.tuning():
            recipe = tuning.recipe(dtype_of("auto"))
            config, start = recipe.model, {"weights": recipe.start, "objective": recipe.objective}
            seq_len = recipe.train.seq_len
            numbers = recipe.hparams.to_dict()
            kept = ("learning_rate", "final_fraction", "weight_decay", "beta2")
            base = {"schedule": recipe.train.schedule, **{name: numbers[name] for name in kept}} | base
        elif is_stored(self.preset):
            config, weights, objective = started_from(Path(self.preset), Path(self.data))
            start = {"weights": weights, "objective": objective}
        else:
            config = read_config(self.preset)
        if self.lora is not None and not tuning:
            base["objective.adapter.rank"] = self.lora
        sweep = define(
            config,
            data=self.data,
            folder=self.out,
            steps=steps,
            axes=self.set,
            space_file=self.space,
            seeds=self.seeds,
            base=base,
            batch_size=self.batch_size,
            seq_len=128 if seq_len is None else seq_len,
            objectives=self.objective,
            sampler=self.sampler,
            trials=self.trials,
            sampler_seed=self.sampler_seed,
            policy=self.policy,
            policy_settings={name: getattr(self, name) for name in settings},
            storage=None if self.storage is None else without_password(self.storage),
            lanes=self.lanes,
            evaluate_tokens=self.evaluate_tokens,
            forgetting=self.forgetting,
            evaluate_task_items=self.evaluate_task_items,
            service=ServiceLevel(self.service_level, self.service_share) if self.service_level else None,
            **start,
        )
        self._warn_about_limits(sweep)
        return sweep

    def tuning(self) -> "Tuning | None":
        """Return how the stored model is tuned; None without --tune."""
        from experiments.tuning import Tuning

        if self.tune is None:
            return None
        return Tuning(
            self.tune,
            Path(self.preset),
            self.data,
            lora=self.lora,
            steps=self.steps or 1,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
        )

    def _warn_about_unused(self, settings: Sequence[str]) -> None:
        """Warn about settings of other policies."""
        from experiments.commands.options import say_unused

        others = {name for names in _SETTINGS.values() for name in names} - set(settings)
        given = {name: getattr(self, name) for name in sorted(others)}
        say_unused(f"with --policy {self.policy}", SweepOptions, **given)
        if self.sampler == "all":
            say_unused("without --sampler", SweepOptions, sampler_seed=self.sampler_seed)

    def _warn_about_limits(self, sweep: "Sweep") -> None:
        """Warn about requested numbers that exceed what exists."""
        from experiments.commands.options import say_fewer_tokens
        from experiments.sweep.space import Values
        from experiments.sweep.trials import expected_trials
        from experiments.words import say
        from train.data import load_manifest

        say_fewer_tokens(self.evaluate_tokens, load_manifest(self.data))
        space = sweep.space()
        is_finite = all(isinstance(axis, Values) for axis in space.axes().values())
        if sweep.sampler != "all" and is_finite and sweep.trials > space.size:
            say(f"--trials {sweep.trials:,} is more than the {space.size:,} points of the space, each trained once")
        if sweep.base.recipe.hparams.warmup_steps > 0 or "warmup_steps" in space.names:
            recipes = [trial.recipe for trial in expected_trials(sweep, 1)]
            late = [recipe for recipe in recipes if recipe.hparams.warmup_steps > recipe.horizon]
            if late:
                warmup, steps = int(late[0].hparams.warmup_steps), late[0].horizon
                say(f"warmup_steps={warmup:,} is more than {steps:,} steps; {len(late):,} trials end below their rate")


_SETTINGS = {
    "halving": ("eta", "min_fraction"),
    "hyperband": ("eta", "min_fraction"),
    "population": ("interval_fraction", "quantile", "resample"),
}
"""The options that are settings of each policy."""


Options = Annotated[SweepOptions, tyro.conf.arg(name="")]
"""As the first argument of a command: its fields are flags without a prefix."""


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """The workers of a sweep."""

    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Train in this many worker processes instead of this one."""
    launcher: Literal["local", "slurm"] = "local"
    """Where they run: on this machine, or as jobs of a Slurm cluster that shares the folders. Jobs on several machines
    need a --storage that all reach, PostgreSQL or a journal: SQLite is not safe on network disks."""
    slurm_set: Overrides = ()
    """Of submitit's Slurm parameters, such as partition=gpu time=240 gpus_per_node=1."""
    heartbeat: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 15
    """Between a worker's signs of life."""
    grace: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 90
    """Without a sign of life for so long, a worker's trials are given to others."""


Workers = Annotated[WorkerOptions, tyro.conf.arg(name="")]
ONE_WORKER = WorkerOptions()
