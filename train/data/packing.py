"""Best-fit packing: which pieces of documents share a row, so that hardly a slot stays unfilled and none is cropped."""

import bisect
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from train.progress import progress_bar_if

_TAKES_SECONDS = 2**22  # documents


@dataclass(frozen=True)
class PackingStatistics:
    """How well the documents of a split fill rows of `seq_len` slots.

    documents: all of them; divided: those longer than a row. tokens: with the end tokens. fill: share of the slots
    that hold a prediction; cropped: share of the predictions that no slot holds.
    """

    seq_len: int
    documents: int
    divided: int
    rows: int
    tokens: int
    fill: float
    cropped: float

    def describe(self) -> str:
        """Return one sentence for people."""
        return (
            f"{self.documents:,} documents of {self.tokens:,} tokens ({self.divided:,} of them longer than a row) fill"
            f" {100 * self.fill:.2f} % of {self.rows:,} rows of {self.seq_len:,};"
            f" {100 * self.cropped:.2g} % of the predictions are cropped"
        )


@dataclass(frozen=True, eq=False)
class Packing:
    """The pieces of documents, row by row: row r has those from `first[r]` to `first[r + 1]`.

    starts: where a piece's first token lies in the split; lengths: its slots. A piece of n slots reads n + 1 tokens.
    """

    starts: Int64[np.ndarray, " pieces"]
    lengths: Int32[np.ndarray, " pieces"]
    first: Int64[np.ndarray, " rows_and_one"]
    statistics: PackingStatistics


def pack(ends: Int64[np.ndarray, " documents"], seq_len: int) -> Packing:
    """Pack the documents whose last tokens lie at `ends` into rows of `seq_len` slots.

    A document of n tokens takes n - 1 slots. One of more than seq_len slots is divided into pieces of seq_len and a
    shorter last one. Pieces of seq_len are rows of their own; all others are packed by best-fit decreasing.
    """
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    slots = ends - starts
    whole, rest = np.divmod(slots, seq_len)
    shorter = rest > 0
    row_of_rest = best_fit_decreasing(rest[shorter], seq_len)
    order = np.argsort(row_of_rest, kind="stable")
    whole_starts = ranges(starts, whole, seq_len)
    piece_starts = np.concatenate([(starts + whole * seq_len)[shorter][order], whole_starts])
    lengths = np.concatenate([rest[shorter][order], np.full(len(whole_starts), seq_len)]).astype(np.int32)
    pieces_of_row = np.concatenate([[0], np.bincount(row_of_rest), np.ones(len(whole_starts), np.int64)])
    rows, filled, predictions = len(pieces_of_row) - 1, int(lengths.sum(dtype=np.int64)), int(slots.sum())
    statistics = PackingStatistics(
        seq_len=seq_len,
        documents=len(ends),
        divided=int((slots > seq_len).sum()),
        rows=rows,
        tokens=predictions + len(ends),
        fill=filled / max(1, rows * seq_len),
        cropped=1 - filled / max(1, predictions),
    )
    return Packing(piece_starts, lengths, np.cumsum(pieces_of_row), statistics)


def best_fit_decreasing(lengths: Int64[np.ndarray, " items"], capacity: int) -> Int64[np.ndarray, " items"]:
    """Return the bin of each item: the longest first, each into the fullest bin that has room for it, else a new one.

    Bin packing of Ding et al. 2024, "Fewer Truncations Improve Language Modeling". Items of one length, and bins of
    one room, are handled together: if the fullest bin that fits has room for k items of a length, best fit gives it k
    of them. Lengths are 1 to capacity; equal items keep their order.
    """
    # A small unsigned type is sorted by counting, in linear time.
    order = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    counts = np.bincount(lengths)
    bins = np.empty(len(lengths), np.int64)  # in that order
    open_bins = _OpenBins(capacity)
    placed = 0
    with progress_bar_if(len(lengths) >= _TAKES_SECONDS, "packing documents", len(lengths)) as advance:
        for length in np.flatnonzero(counts)[::-1].tolist():
            end = placed + int(counts[length])
            while placed < end:
                room, found = open_bins.take(length, end - placed)
                each = room // length
                items = min(end - placed, each * len(found))
                bins[placed : placed + items] = np.repeat(found, each)[:items]
                filled, left = divmod(items, each)
                open_bins.put(room - each * length, found[:filled])
                if left:
                    open_bins.put(room - left * length, found[filled:])
                placed += items
            advance(counts[length])
    result = np.empty_like(bins)
    result[order] = bins
    return result


class _OpenBins:
    """Bins by the room that is left in them, in groups of equal room."""

    def __init__(self, capacity: int):
        self._capacity, self._made = capacity, 0
        self._rooms: list[int] = []  # in ascending order
        self._groups: dict[int, list[Int64[np.ndarray, " bins"]]] = {}

    def put(self, room: int, bins: Int64[np.ndarray, " bins"]) -> None:
        """Keep bins that have this room left; those that are full or none are dropped."""
        if room == 0 or len(bins) == 0:
            return
        if room not in self._groups:
            bisect.insort(self._rooms, room)
            self._groups[room] = []
        self._groups[room].append(bins)

    def take(self, length: int, items: int) -> tuple[int, Int64[np.ndarray, " bins"]]:
        """(the least room in which an item fits, bins of that room): no more of them than so many items need."""
        place = bisect.bisect_left(self._rooms, length)
        if place == len(self._rooms):
            needed = -(-items // (self._capacity // length))
            self._made += needed
            return self._capacity, np.arange(self._made - needed, self._made)
        room = self._rooms[place]
        bins = self._groups[room].pop()
        if not self._groups[room]:
            del self._groups[room], self._rooms[place]
        needed = -(-items // (room // length))
        self.put(room, bins[needed:])
        return room, bins[:needed]


def ranges(starts: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"], step: int = 1) -> Int64[np.ndarray, " m"]:
    """Concatenate start, start + step, … of each start, so many as its count: [5, 9] and [2, 1] give [5, 6, 9]."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before * step, counts) + np.arange(int(counts.sum())) * step
