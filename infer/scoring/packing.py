"""Pack requests with what they share into rows of a few widths, so that almost nothing is padding.

A tree is a prefix and the branches that continue it; a packed row holds several trees one after another. A token sees
its stem, the prefix of its tree, and the earlier tokens of its branch. Example: a question of 30 tokens with four
answers of 10 is a tree of 70 tokens, instead of four rows of 40, and three such trees fill a row of 210.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from infer.scoring.batches import Limits, ScoredRow, padded_length
from infer.scoring.prefixes import SharedPrefix

_WIDEST = 2048  # tokens of a packed row: its attention is not computed in pieces
_MOST_PAIRS = 2**24  # of a query and a key in a batch, per head
_WORTH_A_PROGRAM = 0.9  # a second width leaves at most this fraction of the cost
_NARROWEST = 128  # tokens of a packed row, if the trees are small
_MOST_REPEATED = 512  # tokens of a tree, or twice those of its prefix and longest branch: a larger one is divided
_INT32 = 4  # bytes
_TOKENS_PER_KEY = 1 / 4096  # cost of a key that a query attends to, in tokens that are read


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """A prefix and the rows that continue it, after a stem.

    prefix: tokens after the stem. rows: with the tokens after the prefix.
    """

    prefix: np.ndarray
    rows: list[ScoredRow]

    @property
    def size(self) -> int:
        """Tokens of the prefix and all branches."""
        return len(self.prefix) + sum(len(row.tokens) for row in self.rows)

    @property
    def targets(self) -> int:
        """Scored tokens of all branches."""
        return sum(len(row.targets) for row in self.rows)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """Packed rows after one stem, which may be empty; batches with the same stem hold the same array object."""

    rows: list[list[Tree]]
    stem: np.ndarray


class PackedShape(NamedTuple):
    """The padded shape of a packed batch.

    parts: equal numbers of consecutive rows, which a mesh keeps apart. targets: of a part. stem_width: tokens of a
    stem; 0: no stems.
    """

    rows: int
    width: int
    targets: int
    stem_width: int = 0
    parts: int = 1

    def part(self, row: int) -> tuple[int, int]:
        """Return the part of a row, and the index of the row's first token in the part."""
        rows = self.rows // self.parts
        return row // rows, row % rows * self.width

    @property
    def cost(self) -> int:
        """Tokens that the program reads, including padding, without the stem."""
        return self.rows * self.width


PackedPlan = list[tuple[PackedShape, list[PackedBatch]]]


def plan_packed(rows: Sequence[ScoredRow], shared: Sequence[SharedPrefix], limits: Limits) -> PackedPlan:
    """Return packed batches in at most two widths; [] if there are no rows or the largest tree is too long for one.

    rows: whole ones, sorted lexicographically. shared: disjoint prefixes of all of them (`packed_prefixes`). A batch
    has at most as many tokens as `limits.groups` of the longest whole rows.
    """
    trees = _trees(rows, shared)
    largest = max((tree.size for of_stem in trees.values() for tree in of_stem), default=0)
    if not 0 < largest <= _WIDEST:
        return []
    longest = max(map(len, trees)) // _INT32
    stem_width = padded_length(longest, limits.tokens) if longest else 0
    most_tokens = batch_tokens(rows, limits)
    plans = [_plan(trees, width, largest, most_tokens, limits, stem_width) for width in _widths(largest)]

    def cost(plan: PackedPlan) -> float:
        tokens = sum(shape.cost * len(batches) * (1 + shape.width * _TOKENS_PER_KEY) for shape, batches in plan)
        return tokens if len(plan) == 1 else tokens / _WORTH_A_PROGRAM

    return min(plans, key=cost)


def batch_tokens(rows: Sequence[ScoredRow], limits: Limits) -> int:
    """Return the most tokens of a batch: those of a batch of the longest whole rows."""
    return limits.groups * max((len(row.tokens) for row in rows), default=0)


def _trees(rows: Sequence[ScoredRow], shared: Sequence[SharedPrefix]) -> dict[bytes, list[Tree]]:
    """Return the trees after each stem, largest first; one that is too large is several with the same prefix."""
    trees: dict[bytes, list[Tree]] = {}
    for one in shared:
        tokens = rows[one.low].tokens
        prefix, stem = tokens[one.stem_length : one.length], tokens[: one.stem_length]
        branches = [
            rows[number]._replace(tokens=rows[number].tokens[one.length :]) for number in range(one.low, one.high)
        ]
        longest = len(prefix) + max(len(branch.tokens) for branch in branches)
        most = max(_MOST_REPEATED, min(2 * longest, _WIDEST))
        of_stem = trees.setdefault(stem.tobytes(), [])
        tree = Tree(prefix, [])
        for branch in branches:
            if tree.rows and tree.size + len(branch.tokens) > most:
                of_stem.append(tree)
                tree = Tree(prefix, [])
            tree.rows.append(branch)
        of_stem.append(tree)
    for of_stem in trees.values():
        of_stem.sort(key=lambda tree: -tree.size)  # stable: equal sizes stay in lexicographic order
    return trees


def _widths(largest: int) -> list[int]:
    """Return the widths to choose from: powers of two, and what the largest tree needs."""
    widths, width = {padded_length(largest, _WIDEST)}, _NARROWEST
    while width < min(2 * largest, _WIDEST) or width == _NARROWEST:
        widths.add(width)
        width *= 2
    return sorted(widths)


def _plan(
    trees: dict[bytes, list[Tree]], width: int, largest: int, most_tokens: int, limits: Limits, stem_width: int
) -> PackedPlan:
    """Return the plan in which trees up to a width are in rows of it, and larger ones in rows of the largest's."""
    classes = [(width, lambda tree: tree.size <= width)]
    if largest > width:
        classes.append((padded_length(largest, _WIDEST), lambda tree: tree.size > width))
    plan: PackedPlan = []
    for row_width, belongs in classes:
        packed = {
            stem: _packed([tree for tree in of_stem if belongs(tree)], row_width) for stem, of_stem in trees.items()
        }
        packed = {stem: rows for stem, rows in packed.items() if rows}
        if not packed:
            continue
        tokens = min(most_tokens, _MOST_PAIRS // (row_width + stem_width))
        most = max(1, tokens // row_width // limits.multiple) * limits.multiple
        size = _rows_of_a_batch([len(rows) for rows in packed.values()], most, limits.multiple)
        batches = [
            PackedBatch(rows[start : start + size], array)
            for stem, rows in sorted(packed.items())
            for array in [np.frombuffer(stem, np.int32)]
            for start in range(0, len(rows), size)
        ]
        in_part = size // limits.multiple
        targets = max(
            sum(tree.targets for row in batch.rows[start : start + in_part] for tree in row)
            for batch in batches
            for start in range(0, size, in_part)
        )
        most_targets = in_part * row_width
        shape = PackedShape(size, row_width, padded_length(targets, most_targets), stem_width, limits.multiple)
        plan.append((shape, batches))
    return plan


def _packed(trees: Sequence[Tree], width: int) -> list[list[Tree]]:
    """Put trees, largest first, into rows, each into the row where it leaves the least room (best fit)."""
    rows: list[list[Tree]] = []
    room: list[tuple[int, int]] = []  # sorted (tokens left, row)
    for tree in trees:
        place = bisect.bisect_left(room, (tree.size, -1))
        if place == len(room):
            rows.append([tree])
            left, row = width - tree.size, len(rows) - 1
        else:
            left, row = room.pop(place)
            rows[row].append(tree)
            left -= tree.size
        bisect.insort(room, (left, row))
    return rows


def _rows_of_a_batch(counts: Sequence[int], most: int, multiple: int) -> int:
    """Return the rows of a batch, at most `most`, that leave the fewest empty for stems with these numbers of rows.

    Example: 13 rows in batches of at most 6 are three batches of 5, with two empty rows, not three of 6 with five.
    """
    sizes = range(multiple, most + 1, multiple)
    few = [size for size in sizes if 2 * size > most] or [most]
    return min(few, key=lambda size: (sum(-(-count // size) for count in counts) * size, -size))


class Place(NamedTuple):
    """Where a request's scores are in the outputs of a batch: `scored` targets of a row or part, from `first` on."""

    number: int
    row: int
    first: int
    scored: int


class PackedArrays(NamedTuple):
    """A packed batch as int32 arrays [rows, width], and [parts, targets] for the last two.

    positions: in the text, the stem included. trees: number of a token's tree in its row, from 1; 0: padding. branches:
    of its branch in the tree, from 1; 0: the prefix. predicting: index in its part of the token that predicts a target.
    """

    tokens: np.ndarray
    positions: np.ndarray
    trees: np.ndarray
    branches: np.ndarray
    targets: np.ndarray
    predicting: np.ndarray


def packed_arrays(batch: PackedBatch, shape: PackedShape) -> tuple[PackedArrays, list[Place]]:
    """Return the arrays of a batch, and where each request's scores will be."""
    wide = [np.zeros((shape.rows, shape.width), np.int32) for _ in range(4)]
    tokens, positions, trees, branches = wide
    targets, predicting = (np.zeros((shape.parts, shape.targets), np.int32) for _ in range(2))
    places = []
    scored_in = [0] * shape.parts
    for number, row in enumerate(batch.rows):
        part, offset = shape.part(number)
        for begin, length, position, tree, branch, source in _parts(row, len(batch.stem)):
            here = slice(begin, begin + length)
            tokens[number, here] = row[tree - 1].prefix if source is None else source.tokens
            positions[number, here] = np.arange(position, position + length)
            trees[number, here], branches[number, here] = tree, branch
            if source is not None:
                count, scored = len(source.targets), scored_in[part]
                targets[part, scored : scored + count] = source.targets
                end = offset + begin + length  # the last token predicts the last target
                predicting[part, scored : scored + count] = np.arange(end - count, end)
                places.append(Place(source.number, part, scored, count))
                scored_in[part] += count
    return PackedArrays(tokens, positions, trees, branches, targets, predicting), places


def _parts(row: Sequence[Tree], stem: int) -> Iterator[tuple[int, int, int, int, int, ScoredRow | None]]:
    """Yield (first index, length, first position, tree, branch, its request) of every prefix and branch of a row."""
    begin = 0
    for number, tree in enumerate(row, 1):
        length = len(tree.prefix)
        yield begin, length, stem, number, 0, None
        begin += length
        for branch, source in enumerate(tree.rows, 1):
            yield begin, len(source.tokens), stem + length, number, branch, source
            begin += len(source.tokens)
