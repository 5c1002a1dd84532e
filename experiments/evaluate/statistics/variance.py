"""Decompose the variance of a score into parts of seeds, questions and prompts, by the method of moments."""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from model.errors import InputError, UnknownNameError

FACETS = ("seeds", "questions", "prompts")


@dataclass(frozen=True)
class VarianceParts:
    """The variance of a single score, by facet and combination of facets ("seeds × questions").

    The part of all facets together contains the noise of a single answer.
    """

    sizes: dict[str, int]
    parts: dict[str, float | None]
    """None: not estimable, because a facet of the part has a size of 1; what it adds is in the other parts."""
    negative: tuple[str, ...]
    """Parts whose estimate was below zero and was set to zero."""

    def shares(self) -> dict[str, float | None]:
        """Return each part over the sum of those that are known; None where the sum is zero."""
        total = sum(part for part in self.parts.values() if part is not None)
        return {name: None if part is None or not total else part / total for name, part in self.parts.items()}

    def error_of_mean(self, over: Collection[str], sizes: Mapping[str, int] | None = None) -> float | None:
        """Return the standard error of the mean of all scores if the named facets are drawn again and the others stay.

        over: facets to which the mean should generalise. Example: over=("seeds",) is the error of a comparison of
        recipes on this very set of questions and prompts; over=("seeds", "questions") that on questions of this kind.
        sizes: other numbers of seeds, questions or prompts, to plan with. None: a named facet has a size of 1.
        """
        for name in [*over, *(sizes or ())]:
            if name not in self.sizes:
                raise UnknownNameError("facet", name, self.sizes, guess=False)
        if any(self.sizes[name] < 2 for name in over):
            return None
        planned = self.sizes | dict(sizes or {})
        variance = 0.0
        for name, part in self.parts.items():
            inside = name.split(" × ")
            if part is not None and set(inside) & set(over):
                variance += part / math.prod(planned[facet] for facet in inside)
        return math.sqrt(variance)


def variance_parts(scores: Float[np.ndarray, "seeds questions prompts"]) -> VarianceParts:
    """Decompose a complete table of scores, one for each seed, question and prompt, into random effects.

    Mean squares of the analysis of variance are set equal to their expectations (Henderson's method I; a decision
    study of Cronbach's generalizability theory). A facet of size 1 is left out: the parts with it are None, and its
    effect on a question, for example, is in the part of questions. Raises `InputError` if nothing varies, or a score
    is not finite.
    """
    if not np.isfinite(scores).all():
        raise InputError("a table of scores must be complete: every seed, question and prompt needs a finite score")
    sizes = dict(zip(FACETS, scores.shape, strict=True))
    varied = [axis for axis, size in enumerate(scores.shape) if size > 1]
    if not varied:
        raise InputError("the variance of a single score cannot be decomposed; give at least two seeds or questions")
    subsets = [set(part) for count in (1, 2, 3) for part in itertools.combinations(range(3), count)]
    estimable = [subset for subset in subsets if subset <= set(varied)]
    found: dict[frozenset[int], float] = {}
    for subset in sorted(estimable, key=len, reverse=True):
        square = _mean_square(scores, subset)
        above = sum(part * _repeats(scores.shape, other) for other, part in found.items() if subset < other)
        found[frozenset(subset)] = (square - above) / _repeats(scores.shape, subset)
    names = {frozenset(subset): " × ".join(FACETS[axis] for axis in sorted(subset)) for subset in subsets}
    return VarianceParts(
        sizes=sizes,
        parts={name: max(found[subset], 0.0) if subset in found else None for subset, name in names.items()},
        negative=tuple(names[subset] for subset, part in sorted(found.items(), key=_order) if part < 0),
    )


def _order(item: tuple[frozenset[int], float]) -> tuple[int, list[int]]:
    return len(item[0]), sorted(item[0])


def _repeats(shape: tuple[int, ...], subset: Collection[int]) -> int:
    """Return the number of scores that share one level of each facet of the subset."""
    return math.prod(size for axis, size in enumerate(shape) if axis not in subset)


def _mean_square(scores: np.ndarray, subset: Collection[int]) -> float:
    """Return the mean square of an effect: its own variation, without that of the facets that it is made of."""
    effect = scores.mean(tuple(axis for axis in range(scores.ndim) if axis not in subset), keepdims=True)
    for axis in subset:
        effect = effect - effect.mean(axis, keepdims=True)
    freedom = math.prod(scores.shape[axis] - 1 for axis in subset)
    return float((effect**2).sum() * _repeats(scores.shape, subset) / freedom)
