"""Compute the smallest difference of two models that a set of questions can show, and how many questions show one.

Always at a two-sided level of 5 % and a power of 80 %: a true difference of this size is found in four of five
comparisons.
"""

import numpy as np
from scipy import optimize, stats

from experiments.evaluate.statistics.paired import ALPHA, mcnemar
from model.errors import InputError, check_number, check_whole

POWER = 0.8


def discordant_share(accuracy: float, correlation: float) -> float:
    """Return the share of questions that only one of two models answers correctly: 2p(1 − p)(1 − ρ).

    accuracy: p, of both. correlation: ρ, of their scores of 0 and 1 over questions; 0.5 is common for models of one
    family, and runs of one recipe with other seeds reach 0.7.
    """
    check_number("accuracy", accuracy, least=0, most=1)
    check_number("correlation", correlation, least=-1, most=1)
    return 2 * accuracy * (1 - accuracy) * (1 - correlation)


def mcnemar_power(questions: int, discordant: float, difference: float) -> float:
    """Return the exact power of McNemar's mid-p test at 5 %.

    discordant: expected share of questions that only one model answers correctly, at least the `difference` of their
    accuracies.
    """
    spread = 8 * np.sqrt(questions * discordant) + 30
    low, high = max(0, int(questions * discordant - spread)), min(questions, int(questions * discordant + spread))
    counts = np.arange(low, high + 1)
    weights = stats.binom.pmf(counts, questions, discordant)
    # The largest smaller count that is rejected is that of the exact quantile or one beside it.
    edge = stats.binom.ppf(ALPHA / 2, counts, 0.5).astype(int)
    candidates = np.clip(edge[:, None] + np.array([1, 0, -1, -2]), -1, None)
    rejected = (candidates >= 0) & (2 * candidates < counts[:, None])
    rejected &= mcnemar(np.maximum(candidates, 0), np.maximum(counts[:, None] - candidates, 0)) < ALPHA
    limit = np.where(rejected.any(1), np.take_along_axis(candidates, rejected.argmax(1)[:, None], 1)[:, 0], -1)
    share = (1 + difference / discordant) / 2 if discordant > 0 else 0.5
    found = stats.binom.cdf(limit, counts, share) + stats.binom.sf(counts - limit - 1, counts, share)
    return float((weights * found).sum())


def detectable_share(questions: int, discordant: float) -> float | None:
    """Return the smallest difference of two accuracies that McNemar's test finds with 80 % probability.

    discordant: share of questions that only one model answers correctly, assumed (`discordant_share`) or observed. A
    difference that is larger than it is possible only with more of them, all in favour of one model. None: too few
    questions to show any difference.
    """
    check_whole("questions", questions, 1)
    check_number("discordant", discordant, least=0, most=1)

    def lacking(difference: float) -> float:
        return mcnemar_power(questions, max(discordant, difference), difference) - POWER

    if lacking(1.0) < 0:
        return None
    return float(optimize.brentq(lacking, 0.0, 1.0, xtol=1e-5))


def detectable_mean(standard_error: float, freedom: float) -> float:
    """Return the smallest mean difference that a t test finds with 80 % probability.

    standard_error: of the mean difference, observed, or expected (`expected_error`).
    """
    return float(stats.t.ppf(1 - ALPHA / 2, freedom) + stats.t.ppf(POWER, freedom)) * standard_error


def expected_error(standard_error: float, correlation: float) -> float:
    """Return the standard error to expect of the difference of two models, from that of one model's mean score.

    With clusters, the error of the one model already contains their effect. correlation: of the scores of the two over
    questions.
    """
    check_number("correlation", correlation, least=-1, most=1)
    return float(np.sqrt(2 * (1 - correlation))) * standard_error


def questions_needed(difference: float, discordant: float) -> int:
    """Return how many questions show a difference of accuracies with 80 % probability (Connor 1987).

    It is an approximation for the normal distribution; for fewer than 20 discordant questions it is too many by up to a
    tenth.
    """
    check_number("difference", difference, above=0, most=1)
    if difference > discordant:
        raise InputError(
            f"a difference of {difference:g} needs at least as many discordant questions, not {discordant:g}"
        )
    level, power = stats.norm.ppf(1 - ALPHA / 2), stats.norm.ppf(POWER)
    root = level * np.sqrt(discordant) + power * np.sqrt(discordant - difference**2)
    return int(np.ceil((root / difference) ** 2))
