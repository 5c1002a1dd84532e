"""Loss, perplexity and bits per byte of a model on a data folder's validation split."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import ModelConfig, Params
from model.errors import InputError
from train import eval_step
from train.data import load_manifest, validation_batches
from train.progress import progress_bar


def evaluate(
    config: ModelConfig,
    params: Params,
    data: str | Path,
    *,
    batch_size: int = 8,
    seq_len: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """{"loss" (nats per token), "perplexity", "bits_per_byte", "tokens"}; seq_len None: the model's context.

    bits_per_byte = loss / ln 2 / bytes per token of the validation split: it compares models across tokenizers.
    """
    manifest = load_manifest(data)
    if manifest.vocab_size > config.vocab_size:
        raise InputError(f"the data's vocabulary of {manifest.vocab_size} exceeds vocab_size={config.vocab_size}")
    seq_len = seq_len or config.max_seq_len
    batches = validation_batches(data, batch_size=batch_size, seq_len=seq_len, max_tokens=max_tokens)
    step = jax.jit(functools.partial(eval_step, config))
    sums = []
    with progress_bar("evaluating", len(batches)) as advance:
        for batch in batches:
            metrics = jax.device_get(step(params, batch))
            sums.append((float(metrics["loss"]) * float(metrics["loss_tokens"]), float(metrics["loss_tokens"])))
            advance()
    nats, tokens = np.sum(sums, axis=0)
    loss = float(nats / tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / manifest.splits["validation"].bytes_per_token,
        "tokens": int(tokens),
        "seq_len": seq_len,
    }
