"""Find rows that begin with the same tokens, and where reading those once and branching costs fewest tokens."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from infer.prompts import WORTH_SHARING


@dataclasses.dataclass(frozen=True)
class Branch:
    """Rows low … high − 1, of which the first `prefix` tokens are read once; `stem` of these are other branches' too.

    stem: 0 where no other branch has them.
    """

    low: int
    high: int
    prefix: int
    stem: int = 0


@dataclasses.dataclass(frozen=True)
class _Node:
    """Rows low … high − 1 have exactly `depth` tokens in common.

    place: in postorder; the nodes below are those from `first` to there.
    """

    depth: int
    low: int
    high: int
    first: int
    place: int


def branches(rows: Sequence[np.ndarray], shareable: Sequence[int]) -> tuple[list[Branch], list[Branch]]:
    """Return branches without stems, and branches of which some have stems: disjoint, of the rows that gain by it.

    rows: int32 arrays in the order of their words. shareable: how many of each row's first tokens may be read once for
    several rows. Both answers are those with the fewest tokens to read, the second one among few choices of stems.
    """
    nodes = _tree(_in_common(rows, shareable), len(rows))
    tokens = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    _, chosen = _cover(nodes, tokens, 0, len(rows), 0)
    return [Branch(node.low, node.high, node.depth) for node in chosen], _with_stems(nodes, tokens)


def _in_common(rows: Sequence[np.ndarray], shareable: Sequence[int]) -> list[int]:
    """Return how many shareable tokens each row has in common with the one before it."""
    found = []
    for index in range(1, len(rows)):
        most = min(shareable[index - 1], shareable[index])
        differ = rows[index - 1][:most] != rows[index][:most]
        first = int(differ.argmax()) if most else 0
        found.append(first if most and differ[first] else most)
    return found


def _tree(in_common: Sequence[int], rows: int) -> list[_Node]:
    """Every set of neighbours that have more in common than with any other row, in postorder."""
    nodes: list[_Node] = []
    open_nodes = [(0, 0, 0)]  # (depth, low, first); the first one stays: it has nothing in common
    for index in range(1, rows + 1):
        depth = in_common[index - 1] if index < rows else 0
        low, first = index - 1, len(nodes)
        while open_nodes[-1][0] > depth:
            closed, low, first = open_nodes.pop()
            nodes.append(_Node(closed, low, index, first, len(nodes)))
        if open_nodes[-1][0] < depth:
            open_nodes.append((depth, low, first))
    return nodes


def _cover(nodes: Sequence[_Node], tokens: np.ndarray, low: int, high: int, base: int) -> tuple[int, list[_Node]]:
    """Return the fewest tokens to read of rows low … high − 1, and the nodes whose prefix is read once.

    base: so many tokens of each are there already. nodes: all of those rows that are to be considered, in postorder.
    """
    done: list[tuple[int, int, int, list[_Node]]] = []  # (low, high, cost, chosen) of disjoint nodes

    def apart(low: int, high: int) -> tuple[int, list[_Node]]:
        """Rows on their own, or under the nodes that were chosen for them."""
        cost, chosen = int(tokens[high] - tokens[low]) - (high - low) * base, []
        while done and done[-1][0] >= low:
            start, end, own, below = done.pop()
            cost += own - int(tokens[end] - tokens[start]) + (end - start) * base
            chosen += below
        return cost, chosen

    for node in nodes:
        cost, chosen = apart(node.low, node.high)
        shared = int(tokens[node.high] - tokens[node.low]) - (node.high - node.low - 1) * node.depth - base
        if shared <= cost - WORTH_SHARING:
            cost, chosen = shared, [node]
        done.append((node.low, node.high, cost, chosen))
    return apart(low, high)


def _with_stems(nodes: Sequence[_Node], tokens: np.ndarray) -> list[Branch]:
    """Return for each set of rows with enough in common for a stem that set, or those that a cover chooses of it."""
    found: list[Branch] = []
    end = int(tokens.size)
    for node in reversed(nodes):
        if node.depth < WORTH_SHARING or node.high > end:
            continue
        end = node.low  # whatever is below this node is decided here
        _, chosen = _cover(nodes[node.first : node.place + 1], tokens, node.low, node.high, 0)
        ways = [[_from(nodes, one, tokens) for one in stems] for stems in (chosen, [node])]
        best = max(ways, key=lambda way: sum(saved for saved, _ in way))
        found += [branch for _, below in best for branch in below]
    return found


def _from(nodes: Sequence[_Node], node: _Node, tokens: np.ndarray) -> tuple[int, list[Branch]]:
    """Return the tokens that a node saves as a stem, and its branches; as a prefix where no rows below share more."""
    cost, chosen = _cover(nodes[node.first : node.place], tokens, node.low, node.high, node.depth)
    saved = int(tokens[node.high] - tokens[node.low]) - cost - node.depth
    if not chosen:
        return saved, [Branch(node.low, node.high, node.depth)]
    below = [Branch(one.low, one.high, one.depth, node.depth) for one in chosen]
    covered = {row for one in below for row in range(one.low, one.high)}
    alone = [row for row in range(node.low, node.high) if row not in covered]
    return saved, below + [Branch(row, row + 1, node.depth, node.depth) for row in alone]
