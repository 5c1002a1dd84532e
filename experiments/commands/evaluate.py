"""`isoflop eval`: the loss of a trained run."""

from pathlib import Path

import tyro

from experiments.commands.options import JsonFile


def evaluate(
    run: tyro.conf.Positional[Path],
    *,
    data: Path,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    json: JsonFile = None,
) -> None:
    """Loss, perplexity and bits per byte on a data folder's validation split.

    Example: isoflop eval runs/first --data data/sotu

    Args:
        run: A run directory.
        data: A folder made by `isoflop data prepare`, with the model's own tokenizer.
        seq_len: Tokens per row; the model's context by default.
        max_tokens: Use only the first so many tokens of the split.
        batch_size: Rows per step.
        json: Also write the numbers to this file.
    """
    from experiments.commands.options import write_document
    from experiments.evaluate.loss import evaluate as measure
    from train import load_run

    config, params = load_run(run)
    values = measure(config, params, data, batch_size=batch_size, seq_len=seq_len, max_tokens=max_tokens)
    write_document(json, values)
    print(
        f"loss {values['loss']:.4f} nats per token, perplexity {values['perplexity']:.2f}, "
        f"{values['bits_per_byte']:.4f} bits per byte over {values['tokens']:,} tokens"
    )
