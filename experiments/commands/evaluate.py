"""`isoflop eval`: the loss of a trained model."""

from pathlib import Path

import tyro

from experiments.commands.options import JsonFile


def evaluate(
    model: tyro.conf.Positional[Path],
    *,
    data: Path,
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    evaluate_tokens: int | None = None,
    batch_size: int = 8,
    json: JsonFile = None,
) -> None:
    """Loss, perplexity and bits per byte on a data folder's validation split.

    Example: isoflop eval runs/first --data data/sotu

    A model with another tokenizer than the data's reads the same text, encoded with its own: compare bits per byte.

    Args:
        model: A run directory, a Hugging Face folder or a GGUF file.
        data: A folder made by `isoflop data prepare`.
        tokenizer: The model's tokenizer, where none stands beside it.
        seq_len: Tokens per row; the model's context by default.
        evaluate_tokens: Use only the first so many tokens of the split.
        batch_size: Rows per step.
        json: Also write the numbers to this file.
    """
    from experiments.commands.options import say, write_document
    from experiments.evaluate.loss import evaluate as measure
    from experiments.models import need_tokenizer
    from model.store import open_model

    opened = open_model(model, tokenizer or (data if (model / "run.json").is_file() else None))
    values = measure(
        opened.config,
        opened.params,
        data,
        tokenizer=need_tokenizer(opened.tokenizer, model),
        batch_size=batch_size,
        seq_len=seq_len,
        max_tokens=evaluate_tokens,
    )
    tokens = values["tokens"]
    if evaluate_tokens is not None and tokens < evaluate_tokens:
        say(f"--evaluate-tokens {evaluate_tokens:,} is more than the {tokens:,} tokens of the split; all were read")
    write_document(json, values)
    print(
        f"loss {values['loss']:.4f} nats per token, perplexity {values['perplexity']:.2f}, "
        f"{values['bits_per_byte']:.4f} bits per byte over {values['tokens']:,} tokens "
        f"({values['bytes']:,} bytes) in rows of {values['seq_len']:,}"
    )
