"""Best-fit packing: pieces of documents share rows, so that hardly a slot stays empty and no token is cropped."""

import bisect
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from train.progress import progress_bar_if

_TAKES_SECONDS = 2**22  # documents


@dataclass(frozen=True)
class PackingStatistics:
    """Statistics of a packing into rows of `seq_len` slots.

    divided: documents longer than a row. tokens: end tokens included. fill: fraction of the slots that hold a
    prediction; cropped: fraction of the predictions that are in no slot.
    """

    seq_len: int
    documents: int
    divided: int
    rows: int
    tokens: int
    fill: float
    cropped: float

    def describe(self) -> str:
        """Return the statistics as one sentence."""
        return (
            f"{self.documents:,} documents of {self.tokens:,} tokens ({self.divided:,} of them longer than a row) fill"
            f" {100 * self.fill:.2f} % of {self.rows:,} rows of {self.seq_len:,};"
            f" {100 * self.cropped:.2g} % of the predictions are cropped"
        )


@dataclass(frozen=True, eq=False)
class Packing:
    """Pieces of documents in the order of rows; row r has the pieces first_piece[r] to first_piece[r + 1] - 1.

    starts: position of a piece's first token in the split; lengths: its slots. A piece of n slots reads n + 1 tokens,
    since the targets are the inputs shifted by one.
    """

    starts: Int64[np.ndarray, " pieces"]
    lengths: Int32[np.ndarray, " pieces"]
    first_piece: Int64[np.ndarray, " rows_plus_one"]
    statistics: PackingStatistics


def pack(ends: Int64[np.ndarray, " documents"], seq_len: int) -> Packing:
    """Pack the documents whose last tokens are at `ends` into rows of `seq_len` slots.

    A document of n tokens takes n - 1 slots. If these are more than seq_len, it is divided into pieces of seq_len slots
    and a remainder. Full pieces are rows of their own; remainders are packed by best-fit decreasing.

    For example, documents of 11, 3 and 2 tokens take 10, 2 and 1 slots. With seq_len=4 the first one has two full
    pieces and a remainder of 2. The remainders 2, 2 and 1 are packed into the rows [2, 2] and [1]; the full pieces
    are the rows after them.
    """
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    slots = ends - starts
    full_pieces, remainders = np.divmod(slots, seq_len)
    full_starts = ranges(starts, full_pieces, seq_len)
    remainder_starts = starts + full_pieces * seq_len

    has_remainder = remainders > 0
    row_of_remainder = best_fit_decreasing(remainders[has_remainder], seq_len)
    by_row = np.argsort(row_of_remainder, kind="stable")
    piece_starts = np.concatenate([remainder_starts[has_remainder][by_row], full_starts])
    lengths = np.concatenate([remainders[has_remainder][by_row], np.full(len(full_starts), seq_len)]).astype(np.int32)
    pieces_of_row = np.concatenate([np.bincount(row_of_remainder), np.ones(len(full_starts), np.int64)])
    first_piece = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces_of_row)])

    rows, filled, predictions = len(pieces_of_row), int(lengths.sum(dtype=np.int64)), int(slots.sum())
    statistics = PackingStatistics(
        seq_len=seq_len,
        documents=len(ends),
        divided=int((slots > seq_len).sum()),
        rows=rows,
        tokens=predictions + len(ends),
        fill=filled / max(1, rows * seq_len),
        cropped=1 - filled / max(1, predictions),
    )
    return Packing(piece_starts, lengths, first_piece, statistics)


def best_fit_decreasing(lengths: Int64[np.ndarray, " items"], capacity: int) -> Int64[np.ndarray, " items"]:
    """Return the bin of each item: longest items first, each into the fullest bin with room for it, or a new bin.

    This is the packing of Ding et al. 2024, "Fewer Truncations Improve Language Modeling". Items of equal length and
    bins of equal room are handled together: if the fullest bin that fits has room for k items of a length, best fit
    puts the next k of them there. Lengths are 1 to capacity; items of equal length keep their order.
    """
    # NumPy's stable sort of a small unsigned type is a radix sort, in linear time.
    order = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    counts = np.bincount(lengths)
    sorted_bins = np.empty(len(lengths), np.int64)
    open_bins = _OpenBins(capacity)
    placed = 0
    with progress_bar_if(len(lengths) >= _TAKES_SECONDS, "packing documents", len(lengths)) as advance:
        for length in np.flatnonzero(counts)[::-1].tolist():
            end = placed + int(counts[length])
            while placed < end:
                room, bins = open_bins.take(length, end - placed)
                items_per_bin = room // length
                items = min(end - placed, items_per_bin * len(bins))
                sorted_bins[placed : placed + items] = np.repeat(bins, items_per_bin)[:items]
                # 7 items at 3 per bin: two bins have 3 items, the last one has 1.
                complete, items_in_last = divmod(items, items_per_bin)
                open_bins.put(room - items_per_bin * length, bins[:complete])
                if items_in_last:
                    open_bins.put(room - items_in_last * length, bins[complete:])
                placed += items
            advance(counts[length])
    bin_of_item = np.empty_like(sorted_bins)
    bin_of_item[order] = sorted_bins
    return bin_of_item


class _OpenBins:
    """Bins with room left, in groups of equal room."""

    def __init__(self, capacity: int):
        self._capacity, self._count = capacity, 0
        self._rooms: list[int] = []  # in ascending order
        self._groups: dict[int, list[Int64[np.ndarray, " bins"]]] = {}

    def put(self, room: int, bins: Int64[np.ndarray, " bins"]) -> None:
        """Add bins that have this room left; full ones are dropped."""
        if room == 0 or len(bins) == 0:
            return
        if room not in self._groups:
            bisect.insort(self._rooms, room)
            self._groups[room] = []
        self._groups[room].append(bins)

    def take(self, length: int, items: int) -> tuple[int, Int64[np.ndarray, " bins"]]:
        """Remove and return (room, bins) of the fullest bins with room for an item, at most as many as `items` need."""
        place = bisect.bisect_left(self._rooms, length)
        if place == len(self._rooms):  # no bin has room: new ones
            needed = math.ceil(items / (self._capacity // length))
            self._count += needed
            return self._capacity, np.arange(self._count - needed, self._count)
        room = self._rooms[place]
        bins = self._groups[room].pop()
        if not self._groups[room]:
            del self._groups[room], self._rooms[place]
        needed = math.ceil(items / (room // length))
        self.put(room, bins[needed:])
        return room, bins[:needed]


def ranges(starts: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"], step: int = 1) -> Int64[np.ndarray, " m"]:
    """Concatenate ranges of `counts` numbers from each start: starts [5, 9] and counts [2, 1] give [5, 6, 9].

    In the result the range of 9 begins at index 2, so 9 - 2 = 7 is added to the indices of that range.
    """
    begins = np.cumsum(counts) - counts
    return np.repeat(starts - begins * step, counts) + np.arange(int(counts.sum())) * step
