"""Rows of many lengths in batches of few shapes, each a program: by length, and by the prefix that they branch from."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from infer.prompts import bucket

MOST_PROGRAMS = 4  # of one call


class Row(NamedTuple):
    """tokens: what is read of a request, after its prefix where it has one. targets: the token after each of the last.

    Both are int32 arrays.
    """

    number: int
    tokens: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix that rows branch from. stem: tokens before `tokens` that other prefixes have too, one array for all."""

    tokens: np.ndarray
    rows: list[Row]
    stem: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Groups of rows: each of rows after one prefix, parents[i] of `prefixes`, or of one whole row and no prefix."""

    groups: list[list[Row]]
    prefixes: list[Prefix] = dataclasses.field(default_factory=list)
    parents: list[int] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """All of them, group after group."""
        return [row for group in self.groups for row in group]


class Limits(NamedTuple):
    """groups: of a batch, at most, a multiple of `multiple`, each with `size` rows at most.

    tokens: of a row, and of a prefix with its stem.
    """

    groups: int
    multiple: int
    tokens: int
    size: int = 1


class Shape(NamedTuple):
    """The shape of the programs of a batch: groups and their rows, and lengths of rows, targets, prefixes, and stems.

    capacity: of a stem and a prefix together. All but the first four are 0 for whole rows.
    """

    groups: int
    size: int
    width: int
    targets: int
    prefixes: int = 0
    prefix_width: int = 0
    capacity: int = 0
    stem_width: int = 0

    @property
    def rows(self) -> int:
        """Return the rows of all groups."""
        return self.groups * self.size

    @property
    def cost(self) -> int:
        """Tokens that a batch has programs read, padding included, without its stem."""
        return self.rows * self.width + self.prefixes * self.prefix_width


Plan = list[tuple[Shape, list[Batch]]]


def padded_length(length: int, most: int) -> int:
    """The next of the few lengths that programs are compiled for: at most an eighth more, or one token."""
    whole = bucket(length)
    step = max(2, whole // 16)
    return min(whole if length <= 2 else -(-length // step) * step, most)


def tokens_read(plan: Plan) -> int:
    """Tokens that a plan has programs read, padding included."""
    total = 0
    for shape, batches in plan:
        stems = {id(prefix.stem) for batch in batches for prefix in batch.prefixes}
        total += shape.cost * len(batches) + shape.stem_width * len(stems)
    return total


def plan_rows(rows: Iterable[Row], limits: Limits, programs: int = MOST_PROGRAMS) -> Plan:
    """Whole rows, the longest first, in at most so many shapes."""
    ordered, size = [[row] for row in sorted(rows, key=_order)], limits.groups
    batches = [Batch(ordered[start : start + size]) for start in range(0, len(ordered), size)]
    return _in_few_shapes(batches, limits, programs)


def plan_branches(prefixes: Iterable[Prefix], rows: Sequence[Row], limits: Limits) -> Plan:
    """Rows that branch from prefixes, then whole rows.

    Where any prefix has a stem all of them are read after one, which may be empty.
    """
    prefixes, programs = list(prefixes), 2  # one that reads, one that scores
    if any(prefix.stem is not None for prefix in prefixes):
        nothing, programs = np.zeros(0, np.int32), 3
        prefixes = [one if one.stem is not None else dataclasses.replace(one, stem=nothing) for one in prefixes]
    shapes = (MOST_PROGRAMS - bool(rows)) // programs
    grouped = _grouped([len(prefix.rows) for prefix in prefixes], limits)
    plan = _in_few_shapes(list(_packed(prefixes, grouped)), grouped, shapes)
    return plan + plan_rows(rows, limits, MOST_PROGRAMS - shapes * programs)


def _order(row: Row) -> tuple:
    """The longest first, and by the tokens themselves: the order of requests changes no batch."""
    return -len(row.tokens), -len(row.targets), row.tokens.tobytes(), row.targets.tobytes()


def _grouped(counts: Sequence[int], limits: Limits) -> Limits:
    """Limits with the size of groups that suits prefixes of so many rows each.

    That with least padding, where a group itself, which needs a copy of its prefix, counts as a row. Groups are no
    larger than the rows of one device, and about as many rows as before fill a batch.
    """
    sizes = range(1, min(max(counts, default=1), limits.groups // limits.multiple) + 1)
    size = min(sizes, key=lambda size: sum(-(-count // size) for count in counts) * (size + 1))
    groups = -(-limits.groups // (size * limits.multiple)) * limits.multiple
    return limits._replace(groups=groups, size=size)


def _packed(prefixes: Sequence[Prefix], limits: Limits) -> Iterator[Batch]:
    """Prefixes of one stem after the other, the longest first; one with many rows goes on in the next batch."""
    stem = lambda prefix: b"" if prefix.stem is None else prefix.stem.tobytes()
    batch = Batch([])
    for prefix in prefixes:
        prefix.rows.sort(key=_order)
    order = lambda one: (stem(one), -len(one.tokens), one.tokens.tobytes(), _order(one.rows[0]))
    for prefix in sorted(prefixes, key=order):
        rows = prefix.rows
        while rows:
            if batch.groups and (len(batch.groups) == limits.groups or batch.prefixes[0].stem is not prefix.stem):
                yield batch
                batch = Batch([])
            if not batch.prefixes or batch.prefixes[-1] is not prefix:
                batch.prefixes.append(prefix)
            batch.parents.append(len(batch.prefixes) - 1)
            batch.groups.append(rows[: limits.size])
            rows = rows[limits.size :]
    if batch.groups:
        yield batch


def _shape(needs: Sequence[int], limits: Limits) -> Shape:
    """The smallest shape for `needs`, see `_needs`."""
    groups, width, targets, prefixes, *lengths = needs
    groups = min(-(-bucket(groups) // limits.multiple) * limits.multiple, limits.groups)
    width = padded_length(width, limits.tokens)
    shape = Shape(groups, limits.size, width, padded_length(targets, width))
    if not prefixes:
        return shape
    lengths = [padded_length(length, limits.tokens) if length else 0 for length in lengths]
    return Shape(*shape[:4], min(bucket(prefixes), groups), *lengths)


def _needs(batch: Batch) -> tuple[int, ...]:
    """The fields of `Shape` but `size`, without padding."""
    longest = lambda lengths: max(lengths, default=0)
    stem = lambda prefix: 0 if prefix.stem is None else len(prefix.stem)
    return (
        len(batch.groups),
        longest(len(row.tokens) for row in batch.rows),
        longest(len(row.targets) for row in batch.rows),
        len(batch.prefixes),
        longest(len(prefix.tokens) for prefix in batch.prefixes),
        longest(len(prefix.tokens) + stem(prefix) for prefix in batch.prefixes),
        longest(stem(prefix) for prefix in batch.prefixes),
    )


def _in_few_shapes(batches: Sequence[Batch], limits: Limits, shapes: int) -> Plan:
    """Consecutive batches of one shape, so that the padding is least.

    Shapes begin only where the length that the batches are ordered by goes to its next padded one.
    """
    together = lambda needs: tuple(map(max, zip(*needs, strict=True)))
    needs = list(map(_needs, batches))
    length = lambda index: padded_length(max(needs[index][4 if batches[index].prefixes else 1], 1), limits.tokens)
    runs = [list(run) for _, run in itertools.groupby(range(len(batches)), key=length)]
    needs = [together([needs[index] for index in run]) for run in runs]

    @functools.cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        """Tokens from this run on in at most `left` shapes, and where each of them ends."""
        if first == len(runs):
            return 0, ()
        found = []
        for end in range(first + 1, len(runs) + 1) if left > 1 else [len(runs)]:
            rest, ends = best(end, left - 1)
            cost = _shape(together(needs[first:end]), limits).cost
            found.append((cost * sum(map(len, runs[first:end])) + rest, (end, *ends)))
        return min(found)

    plan, first = [], 0
    for end in best(0, shapes)[1]:
        inside = [batches[index] for run in runs[first:end] for index in run]
        plan.append((_shape(together(needs[first:end]), limits), inside))
        first = end
    return plan
