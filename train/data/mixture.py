"""Batches of a run in phases, drawn from several sources by weight: pure arithmetic, so that a resume costs nothing."""

import functools
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
_NOISE = 2**31  # beyond the numbers of a stream's sources
_EXACT = 1e-4  # a shorter block will do where its shares are that near to the weights


class Mixture:
    """Which source each row of an endless stream is drawn from.

    The rows come in blocks; in every block each source has the same number of them (`counts`), in an order of the
    block's own from the seed. A block has 100 rows or more, as few as represent the weights to 1e-4, and at most 1000:
    then the counts are those of largest remainder. Raises InputError for a weight too small to be counted so.
    """

    def __init__(self, weights: Mapping[str, float], seed: int):
        check_seed(seed)
        self.names, self.seed = tuple(weights), seed
        self.counts = _counts(weights)
        self.block = int(self.counts.sum())
        self._ends = np.cumsum(self.counts)

    def split(self, rows: Int64[np.ndarray, " rows"]) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """(the source's number, the row's number among that source's own rows) of each row of the stream.

        In whole blocks a source's own rows come without gap or repeat; within a block in an order of their own.
        """
        if len(self.names) == 1:
            return np.zeros_like(rows), rows
        block, place = np.divmod(rows, self.block)
        slot = permute(place, self.block, self.seed, block)
        source = np.searchsorted(self._ends, slot, side="right").astype(np.int64)
        rank = slot - (self._ends - self.counts)[source]
        return source, block * self.counts[source] + rank

    def drawn(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows each source has."""
        whole = rows - rows % self.block
        source, _ = self.split(np.arange(whole, rows, dtype=np.int64))
        counts = whole // self.block * self.counts + np.bincount(source, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


class PhasedLoader:
    """The batches of a plan; each a pure function of (seed, step).

    sources: opened training splits by name, all of one tokenizer. Stages of one mixture and one seq_len are one
    stream of rows, which goes on where it stopped; another mixture or seq_len is a stream with orders of its own. Of a
    source every row is drawn once per epoch of each stream, as `Loader` does, which is the case of one source and
    one stage.
    rows: (source, seq_len) → the rows that it is read in. transform: what is made of the rows of a batch, with random
    numbers of their own for each of their tokens; None: they are the batch.
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
        self._mixtures: list[Mixture] = []
        numbers: dict[tuple[tuple[tuple[str, float], ...], int], int] = {}
        self._stream_of, self._first_row, drawn = [], [], []
        for stage in plan.stages:
            mixture = stage.mixture or ((self._first, 1.0),)
            number = numbers.setdefault((mixture, stage.seq_len), len(numbers))
            if number == len(self._mixtures):
                self._check(stage, mixture)
                for name, _ in mixture:
                    if (name, stage.seq_len) not in self._rows:
                        self._rows[name, stage.seq_len] = rows(self.sources[name], stage.seq_len)
                self._mixtures.append(Mixture(dict(mixture), _fold(self.seed, number, 0)))
                drawn.append(0)
            self._stream_of.append(number)
            self._first_row.append(drawn[number])
            drawn[number] += stage.steps * stage.batch_size

    def batch(self, step: int, rows: slice | None = None, *, skipped_rows: int = 0) -> Batch:
        """The batch of update number `step`, from 0; keys and shapes as of `Rows.take`.

        rows: only these of the batch, as one host of several loads. skipped_rows: of the stream, passed over before
        this batch, as after a spike in the loss; shapes, mixture and rate stay those of the step.
        """
        stage = self.plan.stage(step)
        number = self._stream_of[stage.index]
        first = self._first_row[stage.index] + (step - stage.first_step) * stage.batch_size + skipped_rows
        index = np.arange(first, first + stage.batch_size, dtype=np.int64)[rows or slice(None)]
        drawn = self._draw(number, stage.seq_len, index)
        if self._transform is None:
            return drawn
        return self._transform(drawn, Noise.of_rows(_fold(self.seed, number, _NOISE), index, stage.seq_len))

    def _draw(self, number: int, seq_len: int, index: Int64[np.ndarray, " rows"]) -> Batch:
        """The rows of a stream with these numbers, each from its source."""
        mixture = self._mixtures[number]
        sources, own_rows = mixture.split(index)
        batch: Batch = {}
        for source in np.unique(sources).tolist():
            here = sources == source
            rows = self._rows[mixture.names[source], seq_len]
            for name, values in draw(rows, own_rows[here], self._seed(number, source)).items():
                batch.setdefault(name, np.empty((len(index), *values.shape[1:]), values.dtype))[here] = values
        return batch

    def epoch(self, step: int) -> float:
        """Rows of the first source drawn before the step, over the rows that there are."""
        drawn = self._rows_drawn(step)
        shares = (rows[self._first] / len(self._rows[self._first, seq]) for seq, rows in drawn if self._first in rows)
        return sum(shares, 0.0)

    def sources_drawn(self, step: int) -> dict[str, int]:
        """Tokens of each source in the batches before the step, unfilled slots of their rows included."""
        drawn = self._rows_drawn(step)
        return {name: sum(seq_len * rows.get(name, 0) for seq_len, rows in drawn) for name in self.sources}

    def describe_packing(self) -> list[str]:
        """Say of each source in rows of each length how well its documents fill them; nothing of windows."""
        packed = [(name, rows) for (name, _), rows in self._rows.items() if isinstance(rows, PackedDocuments)]
        return [f"packing of {name}: {rows.statistics.describe()}" for name, rows in packed]

    def _rows_drawn(self, step: int) -> list[tuple[int, dict[str, int]]]:
        """(seq_len, rows drawn of each source before the step) of each stream."""
        now = self.plan.stage(step)
        streams: dict[int, tuple[int, int]] = {}
        for stage in self.plan.stages[: now.index + 1]:
            steps = step - stage.first_step if stage is now else stage.steps
            seen = self._first_row[stage.index] + steps * stage.batch_size
            streams[self._stream_of[stage.index]] = stage.seq_len, seen
        return [(seq_len, self._mixtures[number].drawn(seen)) for number, (seq_len, seen) in streams.items()]

    def _check(self, stage: Stage, mixture: tuple[tuple[str, float], ...]) -> None:
        for name, _ in mixture:
            if name not in self.sources:
                raise UnknownNameError(f"source of phase {stage.phase!r}", name, self.sources)
            open_split(self.sources[name], "train", stage.batch_size, stage.seq_len)

    def _seed(self, stream: int, source: int) -> int:
        """The first source of the first stream keeps the run's seed, as `Loader` does."""
        return self.seed if stream == source == 0 else _fold(self.seed, stream, 1 + source)


@functools.lru_cache(maxsize=1024)
def _fold(seed: int, stream: int, number: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(stream, number)).generate_state(1, np.uint64)[0])


def _counts(weights: Mapping[str, float]) -> Int64[np.ndarray, " sources"]:
    """Rows of each source in a block."""
    shares = np.array(list(weights.values()), np.float64)
    shares /= shares.sum()
    for block in range(1, LONGEST_BLOCK):
        counts = np.rint(shares * block)
        if counts.sum() == block and counts.min() > 0 and (np.abs(counts - shares * block) <= _EXACT * block).all():
            return counts.astype(np.int64) * -(-_SHORTEST_BLOCK // block)
    counts = np.floor(shares * LONGEST_BLOCK)
    remainder = shares * LONGEST_BLOCK - counts
    counts[np.argsort(-remainder, kind="stable")[: LONGEST_BLOCK - int(counts.sum())]] += 1
    for name, count in zip(weights, counts, strict=True):
        if count == 0:
            raise InputError(f"the weight of {name!r} is less than 1/{LONGEST_BLOCK} of the mixture; raise it")
    return counts.astype(np.int64)
