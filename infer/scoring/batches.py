"""Put rows of many lengths into batches of few shapes, each of which is a program."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from infer.prompts import bucket

MOST_PROGRAMS = 4  # compiled by one call


class ScoredRow(NamedTuple):
    """The tokens that are read for a request, and those that are scored; both int32 arrays.

    number: of the request. tokens: after the row's prefix, if it has one. targets: the token after each of the last
    `len(targets)` tokens.
    """

    number: int
    tokens: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix that rows continue.

    stem: tokens before `tokens`, which several prefixes share; the same array object in all of them.
    """

    tokens: np.ndarray
    rows: list[ScoredRow]
    stem: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Groups of rows: group i continues prefix `parents[i]`. Without prefixes a group is one whole row."""

    groups: list[list[ScoredRow]]
    prefixes: list[Prefix] = dataclasses.field(default_factory=list)
    parents: list[int] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> list[ScoredRow]:
        """The rows of all groups, group by group."""
        return [row for group in self.groups for row in group]


class Limits(NamedTuple):
    """Limits on a batch.

    groups: most groups; the number of groups in a shape is a multiple of `multiple`. tokens: most tokens of a row, and
    of a prefix with its stem. size: most rows of a group.
    """

    groups: int
    multiple: int
    tokens: int
    size: int = 1


class BatchShape(NamedTuple):
    """The padded shape of a batch. The fields from `prefixes` on are 0 for whole rows.

    size: rows of a group. width: tokens of a row. targets: of a row. prefix_width: tokens of a prefix. capacity: tokens
    of a stem and a prefix together. stem_width: tokens of a stem.
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
        """Rows of all groups."""
        return self.groups * self.size

    @property
    def cost(self) -> int:
        """Tokens that the programs read, including padding, without the stem."""
        return self.rows * self.width + self.prefixes * self.prefix_width


BatchPlan = list[tuple[BatchShape, list[Batch]]]


def padded_length(length: int, most: int) -> int:
    """Round a length up to one of few: at most an eighth more, or one token; never above `most`.

    Example: 33 … 64 are rounded up to multiples of 4, and 65 … 128 to multiples of 8.
    """
    power = bucket(length)
    step = max(2, power // 16)
    rounded = power if length <= 2 else -(-length // step) * step
    return min(rounded, most)


def plan_rows(rows: Iterable[ScoredRow], limits: Limits, programs: int = MOST_PROGRAMS) -> BatchPlan:
    """Put whole rows into batches, longest first, in at most `programs` shapes."""
    ordered, size = [[row] for row in sorted(rows, key=_row_order)], limits.groups
    batches = [Batch(ordered[start : start + size]) for start in range(0, len(ordered), size)]
    return _in_few_shapes(batches, limits, programs)


def plan_branches(prefixes: Iterable[Prefix], rows: Sequence[ScoredRow], limits: Limits) -> BatchPlan:
    """Put the rows that continue prefixes into batches, then the whole rows.

    If any prefix has a stem, those without one get an empty stem, so that all use the same programs.
    """
    prefixes, programs = list(prefixes), 2  # one reads prefixes, one scores rows
    if any(prefix.stem is not None for prefix in prefixes):
        empty, programs = np.zeros(0, np.int32), 3  # one more reads stems
        prefixes = [one if one.stem is not None else dataclasses.replace(one, stem=empty) for one in prefixes]
    shapes = (MOST_PROGRAMS - bool(rows)) // programs
    grouped = _with_group_size([len(prefix.rows) for prefix in prefixes], limits)
    plan = _in_few_shapes(list(_packed(prefixes, grouped)), grouped, shapes)
    return plan + plan_rows(rows, limits, MOST_PROGRAMS - shapes * programs)


def _row_order(row: ScoredRow) -> tuple:
    """Return a sort key: longest first, then by the tokens, so that the order of requests changes no batch."""
    return -len(row.tokens), -len(row.targets), row.tokens.tobytes(), row.targets.tobytes()


def _stem_length(prefix: Prefix) -> int:
    return 0 if prefix.stem is None else len(prefix.stem)


def _with_group_size(counts: Sequence[int], limits: Limits) -> Limits:
    """Return the limits with the group size that pads least, for prefixes with these numbers of rows.

    A group costs one row more than its size, since its prefix is copied for it. Example: prefixes with 4 and 5 rows
    cost (2 + 3) · (2 + 1) = 15 in groups of 2, and 2 · (5 + 1) = 12 in groups of 5. A group is on one device, so its
    size is at most the rows of a device; the number of groups is chosen to keep the rows of a batch about the same.
    """
    most = min(max(counts, default=1), limits.groups // limits.multiple)
    best_size, best_cost = 1, None
    for size in range(1, most + 1):
        groups = sum(-(-count // size) for count in counts)
        cost = groups * (size + 1)
        if best_cost is None or cost < best_cost:
            best_size, best_cost = size, cost
    groups = -(-limits.groups // (best_size * limits.multiple)) * limits.multiple
    return limits._replace(groups=groups, size=best_size)


def _packed(prefixes: Sequence[Prefix], limits: Limits) -> Iterator[Batch]:
    """Yield batches of prefixes with the same stem, longest first; a prefix with many rows continues in the next."""
    for prefix in prefixes:
        prefix.rows.sort(key=_row_order)

    def order(prefix: Prefix) -> tuple:
        stem = b"" if prefix.stem is None else prefix.stem.tobytes()
        return stem, -len(prefix.tokens), prefix.tokens.tobytes(), _row_order(prefix.rows[0])

    batch = Batch([])
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


class _Needs(NamedTuple):
    """The fields of `BatchShape` that one or several batches need, without padding."""

    groups: int
    width: int
    targets: int
    prefixes: int
    prefix_width: int
    capacity: int
    stem_width: int


def _needs(batch: Batch) -> _Needs:
    return _Needs(
        groups=len(batch.groups),
        width=max((len(row.tokens) for row in batch.rows), default=0),
        targets=max((len(row.targets) for row in batch.rows), default=0),
        prefixes=len(batch.prefixes),
        prefix_width=max((len(prefix.tokens) for prefix in batch.prefixes), default=0),
        capacity=max((len(prefix.tokens) + _stem_length(prefix) for prefix in batch.prefixes), default=0),
        stem_width=max((_stem_length(prefix) for prefix in batch.prefixes), default=0),
    )


def _largest(needs: Sequence[_Needs]) -> _Needs:
    return _Needs(*map(max, zip(*needs, strict=True)))


def _shape(needs: _Needs, limits: Limits) -> BatchShape:
    """Return the smallest padded shape that meets the needs."""
    groups = min(-(-bucket(needs.groups) // limits.multiple) * limits.multiple, limits.groups)
    width = padded_length(needs.width, limits.tokens)
    targets = padded_length(needs.targets, width)
    if not needs.prefixes:
        return BatchShape(groups, limits.size, width, targets)

    def padded(length: int) -> int:
        return padded_length(length, limits.tokens) if length else 0

    return BatchShape(
        groups,
        limits.size,
        width,
        targets,
        prefixes=min(bucket(needs.prefixes), groups),
        prefix_width=padded(needs.prefix_width),
        capacity=padded(needs.capacity),
        stem_width=padded(needs.stem_width),
    )


def _in_few_shapes(batches: Sequence[Batch], limits: Limits, shapes: int) -> BatchPlan:
    """Give consecutive batches one of at most `shapes` shapes, so that padding is least.

    Batches are in descending order of a length: of prefixes, or of whole rows. Consecutive batches for which it rounds
    up to the same padded length form a run, and a shape begins only where a run does.
    """
    batch_needs = list(map(_needs, batches))

    def ordering_length(index: int) -> int:
        needs = batch_needs[index]
        length = needs.prefix_width if batches[index].prefixes else needs.width
        return padded_length(max(length, 1), limits.tokens)

    runs = [list(run) for _, run in itertools.groupby(range(len(batches)), key=ordering_length)]
    run_needs = [_largest([batch_needs[index] for index in run]) for run in runs]

    @functools.cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        """Return the fewest tokens of runs `first` … in at most `left` shapes, and the run at which each shape ends."""
        if first == len(runs):
            return 0, ()
        options = []
        for end in range(first + 1, len(runs) + 1) if left > 1 else [len(runs)]:
            cost_after, ends_after = best(end, left - 1)
            num_batches = sum(map(len, runs[first:end]))
            cost = _shape(_largest(run_needs[first:end]), limits).cost * num_batches
            options.append((cost + cost_after, (end, *ends_after)))
        return min(options)

    plan, first = [], 0
    _, ends = best(0, shapes)
    for end in ends:
        members = [batches[index] for run in runs[first:end] for index in run]
        plan.append((_shape(_largest(run_needs[first:end]), limits), members))
        first = end
    return plan
