"""Implement `isoflop train` and `isoflop cool`: one run, and branches of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.commands.options import JsonFile, OptionalMetric, Overrides
from experiments.words import counted

if TYPE_CHECKING:
    from train import Recipe, Result, RunOptions, TrainConfig
    from train.data.manifest import Manifest
    from train.objectives import Objective
    from train.phases import Phase


def train(
    preset: tyro.conf.Positional[str],
    *,
    data: tuple[str, ...],
    out: Path,
    steps: int | None = None,
    objective: str | None = None,
    lora: int | None = None,
    seed: int = 0,
    learning_rate: float = 3e-3,
    batch_size: int = 8,
    seq_len: int = 128,
    set: Overrides = (),
    phases: Path | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    mesh: str | None = None,
    microbatch: str | None = None,
    evaluate_every: int = 0,
    evaluate_tokens: int = 65_536,
    evaluate_tasks: tuple[str, ...] = (),
    evaluate_task_items: int = 500,
    checkpoint_every: int = 0,
    checkpoint_seconds: float = 60.0,
    keep_checkpoints: int = 2,
    keep_every: int = 0,
    keep_best: OptionalMetric = False,
    keep_steps: tuple[int, ...] = (),
    patience: int = 0,
    wandb: str | None = None,
    profile: bool = False,
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    json: JsonFile = None,
) -> None:
    """Train one model; the same command again resumes it.

    Example: isoflop train study-32 --data data/sotu --out runs/first --steps 500 --set schedule=wsd beta2=0.99

    Example: isoflop train bert-base --objective masked --data data/sotu --out runs/bert --steps 500
    --set num_layers=4 d_model=128 num_heads=4 d_ff=512 mask_rate=0.3

    Example: isoflop train gpt2-small --data web=data/web good=data/good --out runs/big --phases phases.json
    --mesh fsdp=8

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config, trained from fresh parameters; or
            a run, a Hugging Face folder or a GGUF file, whose parameters training starts from.
        data: A folder made by `isoflop data prepare`, or several as NAME=FOLDER, whose names the mixtures of phases
            use; the first is also validated on.
        out: The run directory.
        steps: Number of updates; also the schedule's horizon unless total_steps is set. Warm-up is steps / 20 unless
            warmup_steps is set. With --phases: all of them.
        objective: Training objective: language-modeling (decoders), masked (encoders such as bert-base), spans
            (encoder-decoders such as t5-small), classification (of data with labels); by default language-modeling, or
            that of the run that is started from. A fresh model gets the head and the ids for masks or sentinels that it
            needs; fields are set as --set objective.mean_span=4.
        lora: Train a low-rank adapter of this rank on a stored model, whose own parameters stay as they are; lanes of
            smaller ranks and other alphas by --set lora_rank=4 lora_alpha=16, its matrices by
            objective.adapter.targets.
        seed: Of parameters, dropout and data order.
        learning_rate: The schedule's peak.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        set: Any other field of the model, the training or the hyperparameters, such as num_layers=4 schedule=constant
            optimizer=muon; and of how it runs, which may change when a run is resumed: remat=full accumulate=4
            loss_chunks=8.
        phases: A JSON file with the list of phases, such as experiments/configs/phases.json.
        precision: Of products and activations; parameters, softmax, norms and loss are float32. auto: bfloat16 on GPUs
            and TPUs, float32 on CPUs.
        mesh: Devices to train on, such as data=2,fsdp=4 (also tensor, expert, sequence,
            population); all on data by default.
        microbatch: Rows of a microbatch, or auto: as many as the device's memory holds.
        evaluate_every: Steps between validations; 0 validates at the end only.
        evaluate_tokens: Tokens of the validation split, the same each time; all of them if it has fewer.
        evaluate_tasks: Tasks that every validation also scores, such as minimal_pairs: TASK/acc, TASK/acc_norm and
            TASK/bits_per_byte in metrics.jsonl.
        evaluate_task_items: Questions of each of these tasks, the same each time.
        checkpoint_every: Steps between checkpoints; 0 saves by time alone.
        checkpoint_seconds: Seconds between checkpoints.
        keep_checkpoints: Number of newest checkpoints to keep.
        keep_every: Save and keep a checkpoint every N steps; 0: none.
        keep_best: Save and keep the checkpoint of the best validation, by METRIC of metrics.jsonl or validation_loss.
        keep_steps: Save and keep checkpoints of these steps (for `isoflop cool`).
        patience: End the run after this many consecutive validations without improvement of --keep-best's metric; 0:
            never.
        wandb: Also log the metrics to this Weights & Biases project.
        profile: Write a trace of five steps to OUT/profile, for TensorBoard or Perfetto.
        distributed: This process is one of several of a run, coordinated by Slurm or the TPU pod.
        coordinator: HOST:PORT of process 0, if no scheduler gives it; with --num-processes and --process-id.
        num_processes: Processes of this run.
        process_id: The index of this process.
        json: Also write the result to this file.
    """
    from experiments.commands.options import say_unused
    from experiments.evaluate.in_training import task_sets
    from experiments.inputs import read_changes
    from experiments.models import is_stored, read_config, started_from
    from model import Execution
    from model.errors import InputError
    from model.sharding import parse_mesh
    from train import HParams, Recipe, RunOptions, TrainConfig
    from train import train as run_training
    from train.data import load_manifest
    from train.hosts import initialize
    from train.overlay import overlay

    if distributed or coordinator is not None:
        initialize(coordinator, num_processes, process_id)
    else:
        say_unused("without --coordinator or --distributed", train, num_processes=num_processes, process_id=process_id)
    folders = _folders(data)
    manifest = load_manifest(next(iter(folders.values())))
    base = TrainConfig(batch_size=batch_size, seq_len=seq_len, phases=_read_phases(phases) if phases else ())
    if steps is None and not base.phases:
        raise InputError("give --steps, or --phases")
    warmup = {} if steps is None else {"warmup_steps": max(1, steps // 20)}
    hparams = HParams(learning_rate=learning_rate, seed=seed, **warmup)
    plain: dict[str, Any] = {"train": base, "hparams": hparams, "data": folders, "steps": steps}
    if is_stored(preset):
        config, start, own = started_from(Path(preset), next(iter(folders.values())))
        plain |= {"start": start, "objective": objective or own}
        named: dict[str, Any] = {}
    else:
        config = read_config(preset).replace(vocab_size=manifest.vocab_size, eos_token_ids=(manifest.eos_id,))
        named = {} if objective is None else {"objective": objective}
    if lora is not None:
        named |= {"objective.adapter.rank": lora}
    recipe, execution = overlay(
        named | read_changes(set),
        Recipe(config.replace(compute_dtype=dtype_of(precision)), **plain),
        Execution(mesh=parse_mesh(mesh) if mesh else None),
    )
    shell = RunOptions(
        evaluate_every=evaluate_every,
        evaluate_tokens=evaluate_tokens,
        tasks=task_sets(evaluate_tasks, next(iter(folders.values())), evaluate_task_items),
        checkpoint_every=checkpoint_every,
        checkpoint_seconds=checkpoint_seconds,
        keep_checkpoints=keep_checkpoints,
        keep_every=keep_every,
        keep_best=keep_best,
        keep_steps=keep_steps,
        patience=patience,
        microbatch=microbatch,
        announce=True,
        wandb=wandb,
        profile=profile,
        description=f"training {preset}",
    )
    if recipe.train.phases:
        _show_plan(recipe.train)
    warn_about_limits(shell, manifest, recipe)
    result = run_training(recipe, run=out, shell=shell, execution=execution)
    report_result(result, json, recipe)
    say_tasks(result, shell)


def cool(
    base_run: tyro.conf.Positional[Path],
    *,
    at: tuple[int, ...],
    out: Path,
    data: tuple[str, ...] = (),
    decay_fraction: float = 0.2,
    decay_steps: int | None = None,
    final_fraction: float = 0.0,
    mesh: str | None = None,
    evaluate_tokens: int = 65_536,
    json: JsonFile = None,
) -> None:
    """Branch off a constant-rate run at each step of --at with a cooldown: one loss per number of tokens.

    The base run must have checkpoints at these steps: train it with --set schedule=constant and with --keep-every or
    --keep-steps. Its compute is spent once; each branch is a separate run and reports how much of its FLOPs is the base
    run's.

    Example: isoflop cool runs/base --at 1000 2000 4000 --out runs/cooled

    Args:
        base_run: The run directory to branch off.
        at: Steps of the base run after which a branch starts.
        out: A folder that gets one run directory per branch, named after its step.
        data: The new folder of the base run's data, if they were moved; several as NAME=FOLDER.
        decay_fraction: Steps of the cooldown, as a fraction of the base run's steps before it.
        decay_steps: Steps of the cooldown, instead of a fraction.
        final_fraction: Learning rate at the end, as a fraction of the peak.
        mesh: Devices to train on, such as data=2,fsdp=4; all on data by default.
        evaluate_tokens: Tokens of the validation split, the same each time; all of them if it has fewer.
        json: Also write the results to this file.
    """
    from experiments.commands.options import say_fewer_tokens, say_unused, write_document
    from model import Execution
    from model.errors import InputError
    from model.sharding import parse_mesh
    from train import RunOptions, cooldown
    from train import train as run_training
    from train.data import load_manifest
    from train.run import executions, read_record

    if len(set(at)) < len(at):
        raise InputError(f"--at {' '.join(map(str, at))} has a step twice; give each once")
    if decay_steps is not None:
        say_unused("with --decay-steps", cool, decay_fraction=decay_fraction)
    results: list[dict[str, Any]] = []
    folders = _folders(data) if data else None
    for step in at:
        recipe = cooldown(base_run, step, decay_steps or max(1, round(decay_fraction * step)), final_fraction, folders)
        if not results:
            first = recipe.folders if isinstance(recipe.folders, str) else next(iter(recipe.folders.values()))
            say_fewer_tokens(evaluate_tokens, load_manifest(first))
        shell = RunOptions(evaluate_tokens=evaluate_tokens, description=f"cooling down from step {step}")
        held = executions(read_record(base_run)) or [(0, Execution())]
        execution = held[-1][1].replace(mesh=parse_mesh(mesh) if mesh else None, lanes=None)
        result = run_training(recipe, run=out / f"from-{step}", shell=shell, execution=execution)
        results.append(report_result(result, None, recipe))
    write_document(json, {"branches": results})


def report_result(result: "Result", json: Path | None, recipe: "Recipe") -> dict[str, Any]:
    """Print the result in one sentence and return it as a document."""
    import dataclasses

    from experiments.commands.options import write_document
    from experiments.runs.started import in_words, started_from_weights
    from train.hosts import is_writer
    from train.run import read_record

    own = 1 - result.branch_step / result.steps if result.steps else 1
    values = dataclasses.asdict(result) | {
        "tokens_per_second": own * result.tokens / max(result.seconds, 1e-9),
        "flops_6nd_per_second": own * result.flops_6nd / max(result.seconds, 1e-9),
        "flops_exact_per_second": own * result.flops_exact / max(result.seconds, 1e-9),
    }
    if not is_writer():
        return values
    started = started_from_weights(result.run, read_record(result.run))
    write_document(json, values | ({} if started is None else {"started": started}))
    loss = "none" if result.validation_loss is None else f"{result.validation_loss:.4f} {recipe.objective.UNIT}"
    loss += "".join(f", {name} {value:.4f}" for name, value in _besides_loss(result, recipe.objective).items())
    remarks = [
        counted(count, name)
        for name, count in (("skipped step", result.skipped), ("rollback", result.rollbacks))
        if count
    ]
    if result.stopped_early is not None:
        remarks.insert(0, _why_early(result.stopped_early, result.steps, recipe.horizon))
    print(
        f"{result.run}: {result.status} after {counted(result.steps, 'step')}, {counted(result.tokens, 'token')} "
        f"({result.epochs:.2f} epochs); validation loss {loss}; "
        f"{values['tokens_per_second']:,.0f} tokens/s and {values['flops_6nd_per_second']:.3g} FLOP/s (6ND) on average"
        + "".join(f"; {text}" for text in remarks)
    )
    if started is not None:
        print(f"{result.run} {in_words(started)}")
    return values


def say_tasks(result: "Result", shell: "RunOptions") -> None:
    """Print the metrics of each task at the run's last validation, with their standard errors."""
    from train.hosts import is_writer
    from train.run.metrics import open_metrics
    from train.task_sets import ERROR

    lines = open_metrics(result.run).lines if shell.tasks and is_writer() else []
    for task in shell.tasks if lines else ():
        said = []
        for name in task.metrics:
            value, error = lines[-1].get(name), lines[-1].get(f"{name}{ERROR}")
            if value is not None:
                said.append(f"{name} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        if said:
            questions = counted(len(task.questions), "question")
            print(f"{result.run}: {', '.join(said)} (standard errors over {questions})")


def _besides_loss(result: "Result", objective: "Objective") -> dict[str, float]:
    """Return the metrics of the run's last validation besides the loss, such as the accuracy."""
    from train.run.metrics import open_metrics

    names = [name for name in objective.EVALUATED if name != "loss"]
    if result.validation_loss is None or not names:
        return {}
    last = open_metrics(result.run).lines[-1]
    found = {name: last.get(f"validation_{name}") for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _why_early(early: dict[str, Any], step: int, steps: int) -> str:
    """Return why a run ended before its last step."""
    if early["best"] is None:
        outcome = "has not been finite"
    else:
        outcome = f"has not improved on {early['best']:.4g} (step {early['best_step']:,})"
    validations = counted(early["patience"], "validation")
    return f"stopped early at step {step:,} of {steps:,}: {early['metric']} {outcome} in {validations}"


def warn_about_limits(shell: "RunOptions", manifest: "Manifest", recipe: "Recipe") -> None:
    """Warn about requested numbers that exceed what exists or the run's end."""
    from experiments.commands.options import say_fewer_tokens
    from experiments.words import say
    from train.hosts import is_writer
    from train.schedule import uses_horizon

    if not is_writer():
        return
    say_fewer_tokens(shell.evaluate_tokens, manifest)
    train_config, hparams, last = recipe.train, recipe.hparams, recipe.horizon
    for flag, every in (("--evaluate-every", shell.evaluate_every), ("--keep-every", shell.keep_every)):
        if every > last:
            say(f"{flag} {every:,} is more than the run's {last:,} steps; only its end counts")
    if 0 < last <= shell.patience * shell.evaluate_every:
        say(f"--patience {shell.patience:,} is as many validations as the run has, or more; it cannot stop early")
    if late := [step for step in shell.keep_steps if step > last]:
        say(f"--keep-steps {' '.join(map(str, late))}: the run ends at step {last:,}, before those checkpoints")
    if uses_horizon(train_config, hparams) and 0 < hparams.total_steps < last:
        say(f"total_steps={int(hparams.total_steps):,} is fewer than the run's {last:,} steps; the schedule ends there")
    if not train_config.phases and hparams.warmup_steps > last:
        say(f"warmup_steps={int(hparams.warmup_steps):,} is more than the run's {last:,} steps; it ends below its rate")


def _folders(data: tuple[str, ...]) -> dict[str, Path]:
    """Return one folder, or NAME=FOLDER several times."""
    from model.errors import InputError

    if len(data) == 1 and "=" not in data[0]:
        return {"data": Path(data[0])}
    folders = {}
    for text in data:
        name, equals, folder = text.partition("=")
        if not equals:
            raise InputError(f"--data {text!r}: with several sources each is NAME=FOLDER")
        if name in folders:
            raise InputError(f"--data names {name!r} twice")
        folders[name] = Path(folder)
    return folders


def _read_phases(path: Path) -> "tuple[Phase, ...]":
    """Read phases from a JSON file with a list of objects. Raises InputError if it is another file."""
    import json

    from model.errors import InputError
    from train.phases import Phase

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON; give a list of phases: {error}") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values) or not values:
        raise InputError(f'{path} must be a JSON list of phases, such as [{{"name": "bulk", "tokens": 1000000}}]')
    return tuple(Phase.from_dict(value) for value in values)


def dtype_of(precision: str) -> Any:
    """Return the compute dtype: "auto" is float32 on CPUs and bfloat16 elsewhere."""
    import jax

    if precision != "auto":
        return precision
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _show_plan(train_config: "TrainConfig") -> None:
    """Print the phases as a table on stderr, as all progress."""
    from rich.console import Console

    from experiments.commands.options import new_table
    from train.hosts import is_writer
    from train.plan import Plan, describe

    if not is_writer():
        return
    names = ("phase", "steps", "tokens", "batch", "seq_len", "rate over peak", "mixture", "rope_base")
    table = new_table(*names, title="the plan")
    for row in describe(Plan.of(train_config)):
        table.add_row(
            row["phase"],
            f"{row['first_step']:,} … {row['last_step']:,}",
            f"{row['tokens_before']:,} … {row['tokens_after']:,}",
            str(row["batch_size"]),
            str(row["seq_len"]),
            f"{row['rate_first']:.3g} … {row['rate_last']:.3g}",
            ", ".join(f"{name} {weight:g}" for name, weight in row["mixture"].items()) or "the first source",
            "as before" if row["rope_base"] is None else f"{row['rope_base']:g}",
        )
    Console(stderr=True, width=None if Console(stderr=True).is_terminal else 140).print(table)
