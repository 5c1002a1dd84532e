"""Batches of a run with phases and weighted sources: pure arithmetic on the step, so that a resume costs nothing."""

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int64

from model.errors import InputError, UnknownNameError
from train.data.loader import check_seed, open_split
from train.data.noise import Noise
from train.data.permutation import permute
from train.data.rows import Batch, PackedDocuments, Rows, RowsOf, Windows, draw
from train.data.same_ids import have_same_ids
from train.data.shards import TokenShards
from train.plan import Plan, Stage

LONGEST_BLOCK = 1000
_SHORTEST_BLOCK = 100  # the permutation of a few rows costs more than that of a hundred
_NOISE = 2**31  # a seed channel that no source of a stream has
_WEIGHT_TOLERANCE = 1e-4  # of a block's shares


class Mixture:
    """Assignment of the rows of an endless stream to sources, by weight.

    Rows are grouped in blocks. Every block has `counts[i]` rows of source i, shuffled by the seed and the block's
    number. A block has at least 100 rows and is the shortest that represents the weights to 1e-4. If none below 1000
    rows does, it has 1000, divided by the largest-remainder method. Raises InputError if a source gets no row.
    """

    def __init__(self, weights: Mapping[str, float], seed: int):
        check_seed(seed)
        self.names, self.seed = tuple(weights), seed
        self.counts = _counts(weights)
        self.block = int(self.counts.sum())
        self._ends = np.cumsum(self.counts)

    def split(self, rows: Int64[np.ndarray, " rows"]) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Return (source index, row index within that source) for each row of the stream.

        With counts [3, 1] the slots of a block are A A A B before they are shuffled. Row 9 is the second row of block
        2; if the shuffle puts it in slot 2, it is row 2 · 3 + 2 = 8 of source A. Every block uses the next `counts[i]`
        rows of source i, each once.
        """
        if len(self.names) == 1:
            return np.zeros_like(rows), rows
        block, row_in_block = np.divmod(rows, self.block)
        slot = permute(row_in_block, self.block, self.seed, block)
        source = np.searchsorted(self._ends, slot, side="right").astype(np.int64)
        first_slot = (self._ends - self.counts)[source]
        return source, block * self.counts[source] + (slot - first_slot)

    def drawn(self, rows: int) -> dict[str, int]:
        """Return how many of the first `rows` rows of the stream are from each source."""
        blocks = rows // self.block
        source, _ = self.split(np.arange(blocks * self.block, rows, dtype=np.int64))
        counts = blocks * self.counts + np.bincount(source, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


class PhasedLoader:
    """Batches of a plan; each a pure function of (seed, step).

    sources: opened training splits by name, prepared with one tokenizer. All stages with the same mixture and seq_len
    draw from one stream of rows, which continues where it stopped; each other (mixture, seq_len) has a stream with its
    own shuffle. Within a stream every row of a source is drawn once per epoch. With one source and one stage the
    batches are those of `Loader`. rows: (source, seq_len) → rows. transform: (batch, noise) → batch, applied to the
    drawn rows. Raises InputError for sources of different tokenizers and UnknownNameError for a mixture's unknown
    source.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenShards],
        plan: Plan,
        *,
        seed: int,
        rows: RowsOf = Windows,
        transform: Callable[[Batch, Noise], Batch] | None = None,
    ):
        check_seed(seed)
        if not sources:
            raise InputError("a run needs at least one source of data")
        self.sources, self.plan, self.seed, self._transform = dict(sources), plan, seed, transform
        self._first = next(iter(self.sources))
        first = self.sources[self._first]
        for name, shards in self.sources.items():
            if shards is not first and not have_same_ids(first, shards):
                raise InputError(
                    f"the sources {self._first!r} and {name!r} were prepared with different tokenizers; "
                    "prepare both with one"
                )
        self._rows: dict[tuple[str, int], Rows] = {}
        self._mixtures: list[Mixture] = []  # by stream
        self._stream_of: list[int] = []  # by stage
        self._first_row: list[int] = []  # of each stage, in its stream
        streams: dict[tuple[tuple[tuple[str, float], ...], int], int] = {}
        drawn: list[int] = []  # rows of each stream in the stages so far
        for stage in plan.stages:
            mixture = stage.mixture or ((self._first, 1.0),)
            stream = streams.setdefault((mixture, stage.seq_len), len(streams))
            if stream == len(self._mixtures):  # a new one
                self._check(stage, mixture)
                for name, _ in mixture:
                    if (name, stage.seq_len) not in self._rows:
                        self._rows[name, stage.seq_len] = rows(self.sources[name], stage.seq_len)
                self._mixtures.append(Mixture(dict(mixture), _derived_seed(self.seed, stream, 0)))
                drawn.append(0)
            self._stream_of.append(stream)
            self._first_row.append(drawn[stream])
            drawn[stream] += stage.steps * stage.batch_size

    def batch(self, step: int, rows: slice | None = None, *, skipped_rows: int = 0) -> Batch:
        """Return the batch of a step, counted from 0; keys and shapes as in `Rows.take`.

        rows: part of the batch that is returned, for runs on several hosts. skipped_rows: rows of the stream to skip
        before this batch, for example after a loss spike; shapes, mixture and learning rate remain those of the step.
        """
        stage = self.plan.stage(step)
        stream = self._stream_of[stage.index]
        first = self._first_row[stage.index] + (step - stage.first_step) * stage.batch_size + skipped_rows
        index = np.arange(first, first + stage.batch_size, dtype=np.int64)[rows or slice(None)]
        drawn = self._draw(stream, stage.seq_len, index)
        if self._transform is None:
            return drawn
        return self._transform(drawn, Noise.of_rows(_derived_seed(self.seed, stream, _NOISE), index, stage.seq_len))

    def _draw(self, stream: int, seq_len: int, index: Int64[np.ndarray, " rows"]) -> Batch:
        """Return the rows at these positions of a stream, each from its source."""
        mixture = self._mixtures[stream]
        sources, rows_of_source = mixture.split(index)
        batch: Batch = {}
        for source in np.unique(sources).tolist():
            selected = sources == source
            rows = self._rows[mixture.names[source], seq_len]
            drawn = draw(rows, rows_of_source[selected], self._seed(stream, source), self.plan.order)
            for name, values in drawn.items():
                if name not in batch:
                    batch[name] = np.empty((len(index), *values.shape[1:]), values.dtype)
                batch[name][selected] = values
        return batch

    def epoch(self, step: int) -> float:
        """Return the epochs of the first source drawn before the step, a fraction included."""
        epochs = [
            drawn[self._first] / len(self._rows[self._first, seq_len])
            for seq_len, drawn in self._rows_drawn(step)
            if self._first in drawn
        ]
        return sum(epochs, 0.0)

    def sources_drawn(self, step: int) -> dict[str, int]:
        """Return the tokens drawn from each source before the step, padding included."""
        tokens = dict.fromkeys(self.sources, 0)
        for seq_len, drawn in self._rows_drawn(step):
            for name, rows in drawn.items():
                tokens[name] += seq_len * rows
        return tokens

    def describe_packing(self) -> list[str]:
        """Return one sentence on the fill of the rows for each packed source and row length."""
        packed = [(name, rows) for (name, _), rows in self._rows.items() if isinstance(rows, PackedDocuments)]
        return [f"packing of {name}: {rows.statistics.describe()}" for name, rows in packed]

    def _rows_drawn(self, step: int) -> list[tuple[int, dict[str, int]]]:
        """Return (seq_len, rows of each source drawn before the step) for each stream."""
        now = self.plan.stage(step)
        streams: dict[int, tuple[int, int]] = {}
        for stage in self.plan.stages[: now.index + 1]:
            steps = step - stage.first_step if stage is now else stage.steps
            seen = self._first_row[stage.index] + steps * stage.batch_size
            streams[self._stream_of[stage.index]] = stage.seq_len, seen
        return [(seq_len, self._mixtures[stream].drawn(seen)) for stream, (seq_len, seen) in streams.items()]

    def _check(self, stage: Stage, mixture: tuple[tuple[str, float], ...]) -> None:
        for name, _ in mixture:
            if name not in self.sources:
                raise UnknownNameError(f"source of phase {stage.phase!r}", name, self.sources)
            open_split(self.sources[name], "train", stage.batch_size, stage.seq_len)

    def _seed(self, stream: int, source: int) -> int:
        """Return the seed of a source's shuffle; the first source of the first stream has the run's, as in `Loader`."""
        return self.seed if stream == source == 0 else _derived_seed(self.seed, stream, 1 + source)


@functools.lru_cache(maxsize=1024)
def _derived_seed(seed: int, stream: int, channel: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(stream, channel)).generate_state(1, np.uint64)[0])


def _counts(weights: Mapping[str, float]) -> Int64[np.ndarray, " sources"]:
    """Return the rows of each source in a block: weights 0.75 and 0.25 give 75 and 25, which is 25 times 3 and 1."""
    shares = np.array(list(weights.values()), np.float64)
    shares /= shares.sum()
    for block in range(1, LONGEST_BLOCK):
        counts = np.rint(shares * block)
        represented = (np.abs(counts - shares * block) <= _WEIGHT_TOLERANCE * block).all()
        if counts.sum() == block and counts.min() > 0 and represented:
            return counts.astype(np.int64) * math.ceil(_SHORTEST_BLOCK / block)
    # Largest-remainder method: round down, then give the missing rows to the largest remainders.
    counts = np.floor(shares * LONGEST_BLOCK)
    remainders = shares * LONGEST_BLOCK - counts
    missing = LONGEST_BLOCK - int(counts.sum())
    counts[np.argsort(-remainders, kind="stable")[:missing]] += 1
    for name, count in zip(weights, counts, strict=True):
        if count == 0:
            raise InputError(f"the weight of {name!r} is less than 1/{LONGEST_BLOCK} of the mixture; raise it")
    return counts.astype(np.int64)
