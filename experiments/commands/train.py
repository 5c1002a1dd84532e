"""`isoflop train`: one run."""

from pathlib import Path

import tyro

from experiments.commands.options import JsonFile, Overrides


def train(
    preset: tyro.conf.Positional[str],
    *,
    data: Path,
    out: Path,
    steps: int,
    seed: int = 0,
    learning_rate: float = 3e-3,
    batch_size: int = 8,
    seq_len: int = 128,
    set: Overrides = (),
    evaluate_every: int = 0,
    evaluate_tokens: int = 65_536,
    checkpoint_every: int = 0,
    checkpoint_seconds: float = 60.0,
    mesh: str | None = None,
    json: JsonFile = None,
) -> None:
    """Train one model; the same command again resumes it.

    Example: isoflop train study-32 --data data/sotu --out runs/first --steps 500 --set schedule=wsd beta2=0.99

    Args:
        preset: A preset (see `isoflop model list`) or a JSON file of a model config.
        data: A folder made by `isoflop data prepare`.
        out: The run directory.
        steps: Updates to make; also the horizon of the schedule unless total_steps is set.
        seed: Of parameters, dropout and data order.
        learning_rate: The schedule's peak.
        batch_size: Rows per step.
        seq_len: Tokens per row.
        set: Any other model, training or hyperparameter field, such as num_layers=4 schedule=constant weight_decay=0.
        evaluate_every: Steps between validations; 0 validates at the end only.
        evaluate_tokens: Tokens of the validation split, the same each time.
        checkpoint_every: Steps between checkpoints; 0 saves by time alone.
        checkpoint_seconds: Seconds between checkpoints.
        mesh: Devices to train on, such as data=8; all by default.
        json: Also write the result to this file.
    """
    import dataclasses

    from experiments.commands.options import read_config, split_overrides, write_document
    from model.sharding import parse_mesh
    from train import HParams, Shell, TrainConfig
    from train import train as run_training
    from train.data import load_manifest

    manifest = load_manifest(data)
    config = read_config(preset).replace(vocab_size=manifest.vocab_size, eos_token_ids=(manifest.eos_id,))
    config, train_config, hparams = split_overrides(
        set,
        config,
        TrainConfig(batch_size=batch_size, seq_len=seq_len),
        HParams(learning_rate=learning_rate, seed=seed, warmup_steps=max(1, steps // 20)),
    )
    shell = Shell(
        evaluate_every=evaluate_every,
        evaluate_tokens=evaluate_tokens,
        checkpoint_every=checkpoint_every,
        checkpoint_seconds=checkpoint_seconds,
        mesh=parse_mesh(mesh) if mesh else None,
        description=f"training {preset}",
    )
    result = run_training(config, train_config, hparams, data=data, run=out, steps=steps, shell=shell)
    values = dataclasses.asdict(result) | {
        "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
        "flops_6nd_per_second": result.flops_6nd / max(result.seconds, 1e-9),
        "flops_exact_per_second": result.flops_exact / max(result.seconds, 1e-9),
    }
    write_document(json, values)
    loss = "none" if result.validation_loss is None else f"{result.validation_loss:.4f}"
    print(
        f"{out}: {result.status} after {result.steps:,} steps, {result.tokens:,} tokens ({result.epochs:.2f} epochs); "
        f"validation loss {loss} nats per token; {values['tokens_per_second']:,.0f} tokens/s, "
        f"{values['flops_6nd_per_second']:.3g} FLOP/s (6ND)"
    )
