"""`isoflop sweep`: many settings of traced hyperparameters in one compiled program."""

from pathlib import Path

import tyro

from experiments.commands.options import JsonFile, Overrides
from model.errors import InputError


def run(
    preset: tyro.conf.Positional[str],
    *,
    data: Path,
    out: Path,
    steps: int,
    set: Overrides,
    seeds: int = 2,
    base: Overrides = (),
    batch_size: int = 8,
    seq_len: int = 128,
    json: JsonFile = None,
) -> None:
    """Train the product of some values of hyperparameters, every trial a lane of one program.

    Example: isoflop sweep run study-24 --data data/sotu --out sweeps/lr --steps 200
    --set learning_rate=logspace:1e-3:1e-1:5 weight_decay=0,0.1 --seeds 2

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config.
        data: A folder made by `isoflop data prepare`.
        out: The folder for the trials; the same command again resumes them.
        steps: Updates of each trial.
        set: Axes: NAME=v1,v2,… or NAME=logspace:LOW:HIGH:COUNT, of hyperparameters (not shapes).
        seeds: Runs per setting; their spread is the noise of the result.
        base: Other fields for all trials, such as schedule=wsd num_layers=3.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        json: Also write the summary to this file.
    """
    from experiments.commands.options import read_config, split_overrides, write_document
    from experiments.sweep.run import run_sweep
    from train import HParams, TrainConfig
    from train.data import load_manifest
    from train.files import write_json

    axes = parse_axes(set)
    manifest = load_manifest(data)
    config, train_config, hparams = split_overrides(
        base,
        read_config(preset).replace(vocab_size=manifest.vocab_size, eos_token_ids=(manifest.eos_id,)),
        TrainConfig(batch_size=batch_size, seq_len=seq_len),
        HParams(warmup_steps=max(1, steps // 20)),
    )
    summary = run_sweep(config, train_config, hparams, axes, seeds=range(seeds), data=data, folder=out, steps=steps)
    write_json(out / "sweep.json", summary)
    write_document(json, summary)
    show(summary)


def plan(
    preset: tyro.conf.Positional[str],
    *,
    steps: int,
    set: Overrides,
    seeds: int = 2,
    batch_size: int = 8,
    seq_len: int = 128,
    json: JsonFile = None,
) -> None:
    """What a sweep would run: trials, tokens and FLOPs. Nothing is trained.

    Example: isoflop sweep plan study-24 --steps 200 --set learning_rate=logspace:1e-3:1e-1:5 --seeds 2

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config.
        steps: Updates of each trial.
        set: Axes: NAME=v1,v2,… or NAME=logspace:LOW:HIGH:COUNT, of hyperparameters (not shapes).
        seeds: Runs per setting.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        json: Also write the plan to this file.
    """
    from experiments.commands.options import read_config, write_document
    from experiments.sweep.run import plan_trials, trial_name
    from model import accounting
    from train import HParams

    config = read_config(preset)
    trials = plan_trials(HParams(), parse_axes(set), range(seeds))
    tokens = steps * batch_size * seq_len
    flops = len(trials) * tokens * accounting.flops_per_token(config, seq_len, "6N")
    write_document(json, {"trials": trials, "tokens_per_trial": tokens, "flops_6nd": flops})
    for trial in trials:
        print(trial_name(trial))
    print(f"{len(trials)} trials of {tokens:,} tokens in one compiled program, {flops:.3g} FLOPs (6ND) in all")


def parse_axes(texts: tuple[str, ...]) -> dict[str, list[float]]:
    """All axes by name; a name that comes twice is refused."""
    axes: dict[str, list[float]] = {}
    for name, values in map(parse_axis, texts):
        if name in axes:
            raise InputError(f"--set gives {name} twice; give all its values in one axis")
        axes[name] = values
    return axes


def parse_axis(text: str) -> tuple[str, list[float]]:
    """Read `name=1,2,3` or `name=logspace:1e-4:1e-2:5`."""
    name, equals, values = text.partition("=")
    try:
        if not equals:
            raise ValueError
        if values.startswith("logspace:"):
            low, high, count = values.removeprefix("logspace:").split(":")
            return name, _logspace(float(low), float(high), int(count))
        return name, [float(value) for value in values.split(",")]
    except ValueError:
        raise InputError(f"--set {text!r} is not of the form NAME=v1,v2 or NAME=logspace:LOW:HIGH:COUNT") from None


def _logspace(low: float, high: float, count: int) -> list[float]:
    if not 0 < low < high or count < 2:
        raise ValueError
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def show(summary: dict) -> None:
    """Print the settings, best first, and what a reader should beware of."""
    from rich.table import Table

    from experiments.commands.options import console

    out, names = console(), list(summary["axes"])
    table = Table(title=f"{len(summary['trials'])} trials, {summary['compiles']} compile", title_justify="left")
    for name in (*names, "loss", "± seeds", "lost"):
        table.add_column(name, justify="right")
    order = sorted(summary["settings"], key=lambda row: (row["lost"] > 0, row["mean"] or float("inf")))
    for row in order[:12]:
        spread = "" if row["std"] is None else f"{row['std']:.4f}"
        mean = "diverged" if row["mean"] is None else f"{row['mean']:.4f}"
        table.add_row(*(f"{row[name]:.4g}" for name in names), mean, spread, str(row["lost"] or ""))
    out.print(table)
    if summary["seed_noise"] is not None:
        out.print(f"seed noise of one run: {summary['seed_noise']:.4f} nats", highlight=False)
    equal = (summary["winner"] or {}).get("indistinguishable")
    if equal:
        out.print(f"{len(equal)} other settings cannot be told apart from the winner", highlight=False)
    for warning in summary["warnings"]:
        out.print(f"warning: {warning}", style="yellow", highlight=False)
