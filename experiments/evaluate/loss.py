"""Measure loss, perplexity and bits per byte of a model on a data folder's validation split."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import ModelConfig, Params
from model.errors import InputError
from model.tokenizer import Tokenizer, load_tokenizer
from train import eval_step
from train.data import batches_in_order, gives_ids_of, load_manifest, validation_batches
from train.data.kinds import check_kind
from train.data.rows import Batch
from train.data.shards import TokenShards
from train.progress import progress_bar

_OTHERS = {"masked-language-model": "masked", "language-model": "spans", "classifier": "classification"}
"""The objectives that evaluate models other than decoders of text, by the model's head."""


def evaluate(
    config: ModelConfig,
    params: Params,
    data: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 8,
    seq_len: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Return {"loss" (nats per token), "perplexity", "bits_per_byte", "tokens", "bytes", "seq_len"}.

    seq_len None: the model's context. tokenizer: the model's; if it gives other ids than the data's, the split's
    documents are encoded with it, and each row starts with its begin token if the model expects one. The data's own ids
    are read as in training, without it. bits_per_byte compares models across tokenizers: all nats over all bytes of
    text, the documents' end tokens being predicted too.
    """
    seq_len = seq_len or config.max_seq_len
    batches, bytes_per_token = validation_set(
        config, data, tokenizer=tokenizer, batch_size=batch_size, seq_len=seq_len, max_tokens=max_tokens
    )
    nats, tokens = _sums(config, params, batches)
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "tokens": int(tokens),
        "bytes": round(tokens * bytes_per_token),
        "seq_len": seq_len,
    }


def bits_per_byte(model: Path, text: Path) -> float:
    """Return the bits per byte that a stored model needs for the validation split of plain text, in rows of 512 tokens.

    At most 65,536 tokens are read. Raises InputError as `evaluate` does.
    """
    from model.store import open_model

    opened = open_model(model)
    seq_len = min(512, opened.config.max_seq_len)
    found = evaluate(opened.config, opened.params, text, tokenizer=opened.tokenizer, seq_len=seq_len, max_tokens=65_536)
    return found["bits_per_byte"]


def validation_set(
    config: ModelConfig,
    data: str | Path,
    *,
    tokenizer: Tokenizer | None,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
) -> tuple[list[Batch], float]:
    """Return (batches of the validation split in the model's ids, bytes of text per token); as in `evaluate`."""
    if config.head != "language-model" or config.stack != "decoder":
        hint = f"; evaluate it by objective={_OTHERS[config.head]}" if config.head in _OTHERS else ""
        raise InputError(
            f"a model with stack={config.stack!r} and head={config.head!r} has no loss on plain text{hint}"
        )
    manifest = load_manifest(data)
    if tokenizer is not None and not gives_ids_of(tokenizer, data):
        return _reencoded(data, tokenizer, batch_size, seq_len, max_tokens)
    if manifest.vocab_size > config.vocab_size:
        raise InputError(f"the data's vocabulary of {manifest.vocab_size} exceeds vocab_size={config.vocab_size}")
    batches = validation_batches(data, batch_size=batch_size, seq_len=seq_len, max_tokens=max_tokens)
    return batches, manifest.splits["validation"].bytes_per_token


def validation_texts(data: str | Path) -> list[str]:
    """Return the documents of the validation split, as they were before they were encoded."""
    shards = TokenShards(data, "validation")
    check_kind(shards, "text")
    tokens = shards.windows(np.array([0]), len(shards))[0]
    tokenizer = load_tokenizer(data)
    ends = np.flatnonzero(tokens == shards.eos_id)
    return [tokenizer.decode(part[part != shards.eos_id].tolist()) for part in np.split(tokens, ends + 1) if len(part)]


def _reencoded(
    data: str | Path, tokenizer: Tokenizer, batch_size: int, seq_len: int, max_tokens: int | None
) -> tuple[list[Batch], float]:
    """Return (batches of the split in this tokenizer's ids, its bytes per token), an end token after each document."""
    texts = validation_texts(data)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    encoded = [np.array([*ids, *end], np.int32) for ids in tokenizer.encode_batch(texts)]
    stretch = np.concatenate(encoded)
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(stretch)
    # A model that was trained with a begin token before every text expects one before each row.
    around = tokenizer.encode("a", add_special_tokens=True)
    first = tokenizer.bos_id if around[:1] == [tokenizer.bos_id] else None
    predicted = stretch if max_tokens is None else stretch[: max_tokens + (first is None)]
    return batches_in_order(predicted, batch_size, seq_len, first), bytes_per_token


def _sums(config: ModelConfig, params: Params, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return (nats, predicted tokens) over all batches."""
    step = jax.jit(functools.partial(eval_step, config))
    sums = []
    with progress_bar("evaluating", len(batches)) as advance:
        for batch in batches:
            metrics = jax.device_get(step(params, batch))
            sums.append((float(metrics["loss"]) * float(metrics["loss_tokens"]), float(metrics["loss_tokens"])))
            advance()
    nats, tokens = np.sum(sums, axis=0)
    return float(nats), float(tokens)
