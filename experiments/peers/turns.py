"""Contenders that take turns, so that whatever else the machine does meets all of them alike."""

import statistics
from collections.abc import Iterator, Sequence


def in_turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once in each round; who begins changes from round to round."""
    for index in range(rounds):
        first = index % len(names)
        yield from [*names[first:], *names[:first]]


def middle_and_ends(key: str, ratios: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios under this key, and the lowest and highest beside it."""
    return {key: statistics.median(ratios), f"{key}_lowest": min(ratios), f"{key}_highest": max(ratios)}
