"""Measure contenders in interleaved rounds, so that other load slows all of them equally."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

TrainSteps = Callable[[int], tuple[float, list[float]]]
"""Train this many steps on fresh random tokens; returns (seconds in total, the loss of each)."""


def interleaved(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once in each round; the one that begins changes from round to round."""
    for index in range(rounds):
        first = index % len(names)
        yield from [*names[first:], *names[:first]]


def median_and_range(key: str, ratios: Sequence[float]) -> dict[str, float]:
    """Return the median, lowest and highest of the rounds' ratios under this key."""
    return {key: statistics.median(ratios), f"{key}_lowest": min(ratios), f"{key}_highest": max(ratios)}


def loss_difference(losses: Mapping[str, Sequence[float]], tolerance: float) -> float:
    """Return the largest relative difference of any contender's first losses from those of "isoflop".

    Raises RuntimeError if it is not below the tolerance: the contenders do not compute the same step.
    """
    own = np.array(losses["isoflop"])
    difference = max(float(np.max(np.abs(np.array(other) / own - 1))) for other in losses.values())
    if not difference < tolerance:
        raise RuntimeError(f"the contenders do not compute the same step: their first losses are {losses}")
    return difference


def tokens_per_second(
    contenders: Mapping[str, TrainSteps], steps: Mapping[str, int], rounds: int, tokens_per_step: int
) -> dict[str, list[float]]:
    """Return the tokens per second of every contender in every round."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for name in interleaved(list(contenders), rounds):
        seconds, _ = contenders[name](steps[name])
        speeds[name].append(tokens_per_step * steps[name] / seconds)
    return speeds
