"""Rows of a tokenized split: contiguous windows, or documents packed by best fit."""

import functools
import weakref
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64

from model.errors import InputError
from train.config import Order, TrainConfig
from train.data.documents import document_ends
from train.data.kinds import check_kind
from train.data.packing import Packing, PackingStatistics, pack, ranges
from train.data.permutation import permute
from train.data.shards import TokenShards

Batch = dict[str, np.ndarray]


@runtime_checkable
class Rows(Protocol):
    """Rows of one epoch, each of `seq_len` predictions, in a fixed order."""

    seq_len: int

    def __len__(self) -> int:
        """Return the number of rows per epoch."""
        ...

    def take(self, indices: Int64[np.ndarray, " n"]) -> Batch:
        """Return `tokens` and `targets` of rows, int32 [n, seq_len].

        Rows with separate documents also have `segment_ids` (1, 2, … within the row, 0 for padding) and `positions`
        (from 0 in each segment), both int32, and `loss_mask`, float32.
        """
        ...


RowsOf = Callable[[TokenShards, int], Rows]
"""(tokens, seq_len) → rows."""


class Windows:
    """Contiguous windows at multiples of `seq_len`: each token but the first is predicted once per epoch.

    The last `(tokens - 1) % seq_len` tokens, too few for a window, are left out. segment_documents: make each document
    a segment of its own, and mask the prediction of the next document's first token.
    """

    def __init__(self, shards: TokenShards, seq_len: int, segment_documents: bool = False):
        check_kind(shards, "text")
        self.shards, self.seq_len = shards, seq_len
        self._eos_id = shards.eos_id if segment_documents else None

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.seq_len

    def take(self, indices: Int64[np.ndarray, " n"]) -> Batch:
        """See `Rows.take`."""
        return as_batch(self.shards.windows(indices * self.seq_len, self.seq_len + 1), self._eos_id)


class PackedDocuments:
    """Whole documents packed by best fit: each token of a document but the first is predicted once per epoch.

    A document of n tokens, end token included, takes n - 1 slots, and nothing is predicted across documents. Documents
    longer than a row are divided into pieces, each a segment of its own. All arrays are 0 in empty slots. The packing
    depends on nothing but the tokens and `seq_len`. Raises InputError if there is nothing to predict.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("text",)
    """Kinds of data folders that can be packed."""

    def __init__(self, shards: TokenShards, seq_len: int):
        check_kind(shards, *self.KINDS)
        self.shards, self.seq_len = shards, seq_len
        self._packing = _packing(shards, seq_len)
        if not len(self):
            raise InputError(
                f"nothing to pack: no document of the {shards.split} split of {shards.folder} has two tokens;"
                " take a larger corpus"
            )

    @property
    def statistics(self) -> PackingStatistics:
        """Fill of the rows."""
        return self._packing.statistics

    def __len__(self) -> int:
        return self.statistics.rows

    def take(self, indices: Int64[np.ndarray, " n"]) -> Batch:
        """See `Rows.take`."""
        packing, rows = self._packing, np.arange(len(indices), dtype=np.int64)
        first_piece = packing.first_piece[indices]
        pieces_per_row = packing.first_piece[indices + 1] - first_piece
        pieces = ranges(first_piece, pieces_per_row)
        starts, lengths = packing.starts[pieces], packing.lengths[pieces].astype(np.int64)

        # A piece of 3 slots reads 4 tokens a b c d: its inputs are a b c, its targets b c d.
        tokens = self.shards.spans(starts, lengths + 1)
        piece_begins = np.cumsum(lengths + 1) - (lengths + 1)
        inputs = ranges(piece_begins, lengths)
        segment_of_piece = ranges(np.ones_like(pieces_per_row), pieces_per_row)
        values = {
            "tokens": tokens[inputs],
            "targets": tokens[inputs + 1],
            "segment_ids": np.repeat(segment_of_piece, lengths).astype(np.int32),
            "positions": ranges(np.zeros_like(lengths), lengths).astype(np.int32),
            "loss_mask": self._loss_mask(starts, lengths),
        }

        # Row r of the flattened batch begins at slot r·seq_len and is filled from there.
        filled = np.zeros(len(indices), np.int64)
        np.add.at(filled, np.repeat(rows, pieces_per_row), lengths)
        slots = ranges(rows * self.seq_len, filled)
        batch = {}
        for name, value in values.items():
            batch[name] = np.zeros((len(indices), self.seq_len), value.dtype)
            batch[name].reshape(-1)[slots] = value
        return batch

    def _loss_mask(
        self, starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"]
    ) -> Float32[np.ndarray, " slots"]:
        """Return the mask of the targets of pieces that begin at these tokens, one slot after another: all are 1."""
        del starts
        return np.ones(int(lengths.sum()), np.float32)


_PACKINGS: weakref.WeakKeyDictionary[TokenShards, dict[int, Packing]] = weakref.WeakKeyDictionary()


def _packing(shards: TokenShards, seq_len: int) -> Packing:
    """Return the packing of a split, computed once for all lanes that read it."""
    packings = _PACKINGS.setdefault(shards, {})
    if seq_len not in packings:
        packings[seq_len] = pack(document_ends(shards), seq_len)
    return packings[seq_len]


def rows_of(train_config: TrainConfig) -> RowsOf:
    """Return the constructor of a run's rows."""
    if train_config.packing == "best-fit":
        return PackedDocuments
    return functools.partial(Windows, segment_documents=train_config.segment_documents)


def draw(rows: Rows, index: Int64[np.ndarray, " n"], seed: int, order: Order = "shuffled") -> Batch:
    """Return rows of the endless sequence of epochs, each of them shuffled by (seed, epoch) or in the rows' order."""
    epoch, index_in_epoch = np.divmod(index, len(rows))
    if order == "sequential":
        return rows.take(index_in_epoch)
    return rows.take(permute(index_in_epoch, len(rows), seed, epoch))


def as_batch(windows: Int32[np.ndarray, "batch window"], eos_id: int | None) -> Batch:
    """Return `tokens` and `targets`, both [batch, window - 1], and unless eos_id is None also those of `segments`."""
    tokens = np.ascontiguousarray(windows[:, :-1])
    batch = {"tokens": tokens, "targets": np.ascontiguousarray(windows[:, 1:])}
    return batch if eos_id is None else batch | segments(tokens, eos_id)


def segments(tokens: Int32[np.ndarray, "batch seq"], eos_id: int) -> Batch:
    """Return `segment_ids`, `positions` and `loss_mask` of rows in which each end token closes a segment.

    The tokens a b E c d, with the end token E, have segment ids 1 1 1 2 2, positions 0 1 2 0 1 and the mask 1 1 0 1 1.
    """
    ends = tokens == eos_id
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    column = np.arange(tokens.shape[1], dtype=np.int32)
    segment_start = np.maximum.accumulate(np.where(starts, column, np.int32(0)), axis=1)
    return {
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32) + np.int32(1),
        "positions": column - segment_start,
        "loss_mask": (~ends).astype(np.float32),
    }
