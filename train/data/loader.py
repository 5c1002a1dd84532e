"""Training batches as a pure function of (seed, step), and the fixed batches of validation."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from model.errors import InputError, check_at_least_one, check_whole
from train.data.kinds import check_kind
from train.data.rows import Batch, Windows, draw, segments
from train.data.shards import TokenShards


class Loader:
    """Training batches of one source: every window of `seq_len` predictions once per epoch, shuffled by the seed.

    A batch may span two epochs. `data` is a prepared folder (its train split) or opened `TokenShards`.
    """

    def __init__(
        self,
        data: str | Path | TokenShards,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        segment_documents: bool = False,
    ):
        check_seed(seed)
        self.shards = open_split(data, "train", batch_size, seq_len)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rows = Windows(self.shards, seq_len, segment_documents)
        self.rows_per_epoch = len(self.rows)
        self.tokens_per_epoch = self.rows_per_epoch * seq_len

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0; keys and shapes as in `Rows.take`."""
        if step < 0:
            raise InputError(f"step={step} must not be negative")
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        return draw(self.rows, index, self.seed)

    def epoch(self, step: int) -> float:
        """Return the epochs completed before the step, a fraction included."""
        return step * self.batch_size / self.rows_per_epoch


def validation_batches(
    data: str | Path | TokenShards,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    segment_documents: bool = False,
) -> list[Batch]:
    """Return the first `max_tokens` predictions (None: all) of the validation split, in order.

    The predicted tokens do not depend on batch_size and seq_len. Every batch has the same shape and a `loss_mask`
    (float32); padding in the last batch has mask 0 (and segment id 0).
    """
    shards = open_split(data, "validation", batch_size, seq_len)
    check_kind(shards, "text")
    if max_tokens is not None:
        check_at_least_one(max_tokens=max_tokens)
    available = len(shards) - 1
    predicted = available if max_tokens is None else min(max_tokens, available)
    batches = batches_in_order(shards.windows(np.array([0]), predicted + 1)[0], batch_size, seq_len)
    if segment_documents:
        for batch in batches:
            real = batch["loss_mask"]  # 0 for padding
            batch |= segments(batch["tokens"], shards.eos_id)
            batch["loss_mask"] = batch["loss_mask"] * real
            batch["segment_ids"] = np.where(real > 0, batch["segment_ids"], 0).astype(np.int32)
    return batches


def batches_in_order(
    stream: Int32[np.ndarray, " tokens"], batch_size: int, seq_len: int, first: int | None = None
) -> list[Batch]:
    """Return batches that predict every token of a stream once, from the tokens before it in its row.

    The last batch is padded. first: token id prepended to each row, as models with a begin token expect; None: rows
    overlap by one token instead, and the first token of the stream is not predicted. With seq_len=2, the stream
    [5, 6, 7, 8, 9] becomes the rows 5 6 → 6 7 and 7 8 → 8 9; with first=1, the rows 1 5 → 5 6, 1 7 → 7 8 and 1 9 → 9 0.
    """
    targets = stream[1:] if first is None else stream
    count = math.ceil(len(targets) / (batch_size * seq_len))
    shape = (count, batch_size, seq_len)
    mask, targets = _padded(np.ones(len(targets), np.float32), shape), _padded(targets, shape)
    if first is None:
        tokens = _padded(stream[:-1], shape)
    else:
        tokens = np.concatenate([np.full_like(targets[..., :1], first), targets[..., :-1]], axis=-1)
    return [{"tokens": tokens[i], "targets": targets[i], "loss_mask": mask[i]} for i in range(count)]


def _padded(flat: Int32[np.ndarray, " n"] | Float32[np.ndarray, " n"], shape: tuple[int, int, int]) -> np.ndarray:
    result = np.zeros(shape, flat.dtype)
    result.reshape(-1)[: len(flat)] = flat
    return result


def check_seed(seed: int) -> None:
    """Raise InputError unless the seed fits into 64 bits."""
    check_whole("seed", seed, 0, 2**64 - 1)


def open_split(data: str | Path | TokenShards, split: str, batch_size: int, seq_len: int) -> TokenShards:
    """Return the tokens of a split. Raises InputError if those of a text do not fill one row."""
    check_at_least_one(batch_size=batch_size, seq_len=seq_len)
    shards = data if isinstance(data, TokenShards) else TokenShards(data, split)
    if shards.manifest.kind == "text" and len(shards) <= seq_len:
        raise InputError(
            f"corpus too small: the {shards.split} split of {shards.folder} has {len(shards)} tokens,"
            f" one window of seq_len={seq_len} needs {seq_len + 1}; take a shorter seq_len or a larger corpus"
        )
    return shards
