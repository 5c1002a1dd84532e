"""The rows that a split of tokens is read in: windows cut from the whole, or documents packed by best fit."""

import functools
import weakref
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from model.errors import InputError
from train.config import TrainConfig
from train.data.documents import document_ends
from train.data.packing import Packing, PackingStatistics, pack, ranges
from train.data.permutation import permute
from train.data.shards import TokenShards

Batch = dict[str, np.ndarray]


@runtime_checkable
class Rows(Protocol):
    """The rows of one epoch, each of `seq_len` predictions, in a fixed order."""

    seq_len: int

    def __len__(self) -> int:
        """Rows in an epoch."""
        ...

    def take(self, places: Int64[np.ndarray, " n"]) -> Batch:
        """`tokens` and `targets` int32 [n, seq_len] of the rows at these places.

        Where documents are told apart also `segment_ids` (1, 2, … within the row, 0 where it is not filled),
        `positions` (restarting per segment), both int32, and `loss_mask` float32.
        """
        ...


RowsOf = Callable[[TokenShards, int], Rows]
"""(tokens, seq_len) → rows."""


class Windows:
    """Contiguous windows at multiples of `seq_len`, so that each token but the first is predicted once per epoch.

    The `(tokens - 1) % seq_len` tokens at the end, too few for a window, are left out. segment_documents: whether
    documents are told apart; the guess of the next document's first token is then masked.
    """

    def __init__(self, shards: TokenShards, seq_len: int, segment_documents: bool = False):
        self.shards, self.seq_len = shards, seq_len
        self._eos_id = shards.eos_id if segment_documents else None

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.seq_len

    def take(self, places: Int64[np.ndarray, " n"]) -> Batch:
        """See `Rows.take`."""
        return as_batch(self.shards.windows(places * self.seq_len, self.seq_len + 1), self._eos_id)


class PackedDocuments:
    """Whole documents, packed by best fit: every token of a document but its first is predicted once per epoch.

    A document of n tokens, its end token among them, takes n - 1 slots; nothing is predicted across documents. Only one
    longer than a row is divided, into segments of their own. Unfilled slots are 0 throughout. The packing depends on
    the tokens and `seq_len` alone. Raises InputError where there is nothing to predict.
    """

    def __init__(self, shards: TokenShards, seq_len: int):
        self.shards, self.seq_len = shards, seq_len
        self._packing = _packing(shards, seq_len)
        if not len(self):
            raise InputError(
                f"nothing to pack: no document of the {shards.split} split of {shards.folder} has two tokens;"
                " take a larger corpus"
            )

    @property
    def statistics(self) -> PackingStatistics:
        """How well the documents fill the rows."""
        return self._packing.statistics

    def __len__(self) -> int:
        return self.statistics.rows

    def take(self, places: Int64[np.ndarray, " n"]) -> Batch:
        """See `Rows.take`."""
        packing, rows = self._packing, np.arange(len(places), dtype=np.int64)
        counts = packing.first[places + 1] - packing.first[places]
        pieces = ranges(packing.first[places], counts)
        starts, lengths = packing.starts[pieces], packing.lengths[pieces].astype(np.int64)
        read = self.shards.spans(starts, lengths + 1)
        inputs = ranges(np.cumsum(lengths + 1) - (lengths + 1), lengths)  # of what was read, all but each piece's last
        positions = ranges(np.zeros_like(lengths), lengths)
        filled = np.zeros(len(places), np.int64)  # slots of each row
        np.add.at(filled, np.repeat(rows, counts), lengths)
        slots = ranges(rows * self.seq_len, filled)
        values = {
            "tokens": read[inputs],
            "targets": read[inputs + 1],
            "segment_ids": np.repeat(ranges(np.ones_like(counts), counts), lengths).astype(np.int32),
            "positions": positions.astype(np.int32),
            "loss_mask": np.ones(len(slots), np.float32),
        }
        batch = {name: np.zeros((len(places), self.seq_len), value.dtype) for name, value in values.items()}
        for name, value in values.items():
            batch[name].reshape(-1)[slots] = value
        return batch


_PACKINGS: weakref.WeakKeyDictionary[TokenShards, dict[int, Packing]] = weakref.WeakKeyDictionary()


def _packing(shards: TokenShards, seq_len: int) -> Packing:
    """The packing of a split, made once for all lanes that read it."""
    made = _PACKINGS.setdefault(shards, {})
    if seq_len not in made:
        made[seq_len] = pack(document_ends(shards), seq_len)
    return made[seq_len]


def rows_of(train_config: TrainConfig) -> RowsOf:
    """How the rows of a run are made of its tokens."""
    if train_config.packing == "best-fit":
        return PackedDocuments
    return functools.partial(Windows, segment_documents=train_config.segment_documents)


def draw(rows: Rows, index: Int64[np.ndarray, " n"], seed: int) -> Batch:
    """The rows that stand at these places of the endless order from the seed: all of them once per epoch."""
    epoch, place = np.divmod(index, len(rows))
    return rows.take(permute(place, len(rows), seed, epoch))


def as_batch(windows: Int32[np.ndarray, "batch window"], eos_id: int | None) -> Batch:
    """`tokens` and `targets`, and with the end token also what `segments` makes of them."""
    tokens, targets = (np.ascontiguousarray(part) for part in (windows[:, :-1], windows[:, 1:]))
    batch = {"tokens": tokens, "targets": targets}
    return batch if eos_id is None else batch | segments(tokens, eos_id)


def segments(tokens: Int32[np.ndarray, "batch seq"], eos_id: int) -> Batch:
    """`segment_ids`, `positions` and `loss_mask` of rows; a new segment begins after each end token."""
    ends = tokens == eos_id
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    place = np.arange(tokens.shape[1], dtype=np.int32)
    return {
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32) + np.int32(1),
        "positions": place - np.maximum.accumulate(np.where(starts, place, np.int32(0)), axis=1),
        "loss_mask": (~ends).astype(np.float32),
    }
