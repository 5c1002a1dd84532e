"""Find prefixes that rows share, and choose those that leave the fewest tokens to read.

Rows are sorted lexicographically, so that rows with a common prefix are neighbours. All sets of rows with a common
prefix form a tree; a set of disjoint nodes, whose prefixes are read once, is a cover of it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from infer.prompts import WORTH_SHARING


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """The first `length` tokens of rows low … high − 1, to be read once.

    stem_length: how many of these tokens are the stem, which is read once for several shared prefixes; 0: no stem.
    """

    low: int
    high: int
    length: int
    stem_length: int = 0


@dataclasses.dataclass(frozen=True)
class _Node:
    """Rows low … high − 1, which have exactly `depth` tokens in common.

    index: position in postorder. Its subtree is the nodes `first` … `index`, the node itself last.
    """

    depth: int
    low: int
    high: int
    first: int
    index: int


def shared_prefixes(
    rows: Sequence[np.ndarray], shareable: Sequence[int]
) -> tuple[list[SharedPrefix], list[SharedPrefix]]:
    """Return disjoint shared prefixes without stems, and others of which some have stems.

    rows: int32 arrays, sorted lexicographically. shareable: number of each row's first tokens that may be shared. Rows
    that gain nothing are in no shared prefix. The first result has the fewest tokens to read without stems, the second
    the fewest among a few choices of stems.
    """
    nodes = _tree(_common_lengths(rows, shareable), len(rows))
    tokens = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    _, chosen = _cover(nodes, tokens, 0, len(rows), 0)
    return [SharedPrefix(node.low, node.high, node.depth) for node in chosen], _with_stems(nodes, tokens)


def packed_prefixes(rows: Sequence[np.ndarray], shareable: Sequence[int], batch_tokens: int) -> list[SharedPrefix]:
    """Return disjoint shared prefixes of all rows for packing, where sharing any token pays.

    rows, shareable: as in `shared_prefixes`. A row that shares nothing is a prefix of no tokens. batch_tokens: most
    tokens of a batch. All rows of a batch have one stem, so that a stem leaves up to half a batch of padding, which it
    must save; and as many tokens as it has must follow it.
    """
    nodes = _tree(_common_lengths(rows, shareable), len(rows))
    tokens = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    decided: list[tuple[int, int, list[_Node]]] = []  # (low, tokens saved, stems) of disjoint nodes, left to right
    for node in nodes:
        below_saved = 0
        below: list[_Node] = []
        while decided and decided[-1][0] >= node.low:
            _, saved, stems = decided.pop()
            below_saved, below = below_saved + saved, stems + below
        saved = 0
        longer = int(tokens[node.high] - tokens[node.low]) - (node.high - node.low) * node.depth
        if node.depth >= WORTH_SHARING and longer >= node.depth:
            without, _ = _cover(nodes[node.first : node.index + 1], tokens, node.low, node.high, 0, worth=1)
            after, _ = _cover(nodes[node.first : node.index], tokens, node.low, node.high, node.depth, worth=1)
            if after >= node.depth:
                saved = without - after - node.depth - min(batch_tokens, after) // 2
        if saved > below_saved:
            below_saved, below = saved, [node]
        decided.append((node.low, below_saved, below))
    found: list[SharedPrefix] = []
    end = 0
    for stem in [stem for _, _, stems in decided for stem in stems]:
        found += _packed(nodes, tokens, end, stem.low, 0)
        found += _packed(nodes[stem.first : stem.index], tokens, stem.low, stem.high, stem.depth)
        end = stem.high
    return found + _packed(nodes, tokens, end, len(rows), 0)


def _packed(nodes: Sequence[_Node], tokens: np.ndarray, low: int, high: int, stem: int) -> list[SharedPrefix]:
    """Return the shared prefixes of rows low … high − 1 that leave the fewest tokens to read after a stem."""
    inside = [node for node in nodes if low <= node.low and node.high <= high]
    _, chosen = _cover(inside, tokens, low, high, stem, worth=1)
    found, done = [], low
    for node in sorted(chosen, key=lambda node: node.low):
        found += [SharedPrefix(row, row + 1, stem, stem) for row in range(done, node.low)]
        found.append(SharedPrefix(node.low, node.high, node.depth, stem))
        done = node.high
    return found + [SharedPrefix(row, row + 1, stem, stem) for row in range(done, high)]


def _common_lengths(rows: Sequence[np.ndarray], shareable: Sequence[int]) -> list[int]:
    """Return the number of shareable tokens that each row but the first has in common with the row before it."""
    lengths = []
    for index in range(1, len(rows)):
        most = min(shareable[index - 1], shareable[index])
        differ = rows[index - 1][:most] != rows[index][:most]
        lengths.append(int(differ.argmax()) if differ.any() else most)
    return lengths


def _tree(common_lengths: Sequence[int], rows: int) -> list[_Node]:
    """Return a node for every maximal set of neighbours with a common prefix, in postorder.

    Example: four rows with common lengths [5, 2, 0]. Rows 0 … 1 share 5 tokens and rows 0 … 2 share 2, so the nodes are
    (depth 5, rows 0 … 1) and then its parent (depth 2, rows 0 … 2).
    """
    nodes: list[_Node] = []
    open_nodes = [(0, 0, 0)]  # stack of (depth, low, first) of increasing depth; the first one, of depth 0, stays
    for index in range(1, rows + 1):
        depth = common_lengths[index - 1] if index < rows else 0
        low, first = index - 1, len(nodes)
        while open_nodes[-1][0] > depth:  # row `index` has less in common: these nodes end before it
            closed_depth, low, first = open_nodes.pop()
            nodes.append(_Node(closed_depth, low, index, first, len(nodes)))
        if open_nodes[-1][0] < depth:
            open_nodes.append((depth, low, first))
    return nodes


def _cover(
    nodes: Sequence[_Node], tokens: np.ndarray, low: int, high: int, base: int, worth: int = WORTH_SHARING
) -> tuple[int, list[_Node]]:
    """Return the fewest tokens to read for rows low … high − 1, and the disjoint nodes whose prefixes are read once.

    nodes: the candidates, in postorder. tokens[i]: number of tokens in the rows before row i. base: tokens at the
    beginning of each row that have been read already. worth: tokens that a node must save.
    """
    decided: list[tuple[int, int, int, list[_Node]]] = []  # (low, high, cost, chosen) of disjoint nodes, left to right

    def unshared_cost(low: int, high: int) -> int:
        return int(tokens[high] - tokens[low]) - (high - low) * base

    def without_node(low: int, high: int) -> tuple[int, list[_Node]]:
        """Return the cost of the rows if only nodes below are chosen, and those; removes them from `decided`."""
        cost, chosen = unshared_cost(low, high), []
        while decided and decided[-1][0] >= low:
            start, end, cost_below, chosen_below = decided.pop()
            cost += cost_below - unshared_cost(start, end)
            chosen += chosen_below
        return cost, chosen

    for node in nodes:
        cost, chosen = without_node(node.low, node.high)
        # The prefix is read once instead of in every row: three rows of 10 tokens that share 6 cost 30 − 2 · 6.
        saved = (node.high - node.low - 1) * node.depth
        shared_cost = int(tokens[node.high] - tokens[node.low]) - saved - base
        if shared_cost <= cost - worth:
            cost, chosen = shared_cost, [node]
        decided.append((node.low, node.high, cost, chosen))
    return without_node(low, high)


def _with_stems(nodes: Sequence[_Node], tokens: np.ndarray) -> list[SharedPrefix]:
    """Return shared prefixes of the topmost nodes that are deep enough for a stem.

    The stems are either such a node itself, or the nodes that a cover of its subtree chooses: whichever saves more
    tokens.
    """
    found: list[SharedPrefix] = []
    end = int(tokens.size)
    for node in reversed(nodes):  # parents before children
        if node.depth < WORTH_SHARING or node.high > end:
            continue
        end = node.low  # its subtree is decided here
        _, chosen = _cover(nodes[node.first : node.index + 1], tokens, node.low, node.high, 0)
        best_saved, best_prefixes = _as_stems(nodes, chosen, tokens)
        saved, prefixes = _as_stems(nodes, [node], tokens)
        if saved > best_saved:
            best_prefixes = prefixes
        found += best_prefixes
    return found


def _as_stems(nodes: Sequence[_Node], stems: Sequence[_Node], tokens: np.ndarray) -> tuple[int, list[SharedPrefix]]:
    """Return the tokens that these stems save together, and the shared prefixes after them."""
    saved, prefixes = 0, []
    for stem in stems:
        saved_by_stem, prefixes_after = _as_stem(nodes, stem, tokens)
        saved += saved_by_stem
        prefixes += prefixes_after
    return saved, prefixes


def _as_stem(nodes: Sequence[_Node], node: _Node, tokens: np.ndarray) -> tuple[int, list[SharedPrefix]]:
    """Return the tokens that a node saves as a stem, and the shared prefixes after it.

    Rows that share no more than the stem get a shared prefix each that is the stem alone. If no rows share more, the
    node is a plain shared prefix.
    """
    cost, chosen = _cover(nodes[node.first : node.index], tokens, node.low, node.high, node.depth)
    saved = int(tokens[node.high] - tokens[node.low]) - cost - node.depth
    if not chosen:
        return saved, [SharedPrefix(node.low, node.high, node.depth)]
    prefixes = [SharedPrefix(one.low, one.high, one.depth, node.depth) for one in chosen]
    covered = {row for one in prefixes for row in range(one.low, one.high)}
    for row in range(node.low, node.high):
        if row not in covered:
            prefixes.append(SharedPrefix(row, row + 1, node.depth, node.depth))
    return saved, prefixes
