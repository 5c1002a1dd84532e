"""Statistics of evaluations: tests keep their level, intervals cover, parts of a known variance are recovered."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.evaluate.statistics.mean import estimate_mean, linearised, wilson
from experiments.evaluate.statistics.paired import holm, mcnemar, paired_difference, verdict
from experiments.evaluate.statistics.power import (
    detectable_mean,
    detectable_share,
    discordant_share,
    expected_error,
    mcnemar_power,
    questions_needed,
)
from experiments.evaluate.statistics.signal_to_noise import TaskScores, choose_tasks, decision_accuracy, rank_tasks
from experiments.evaluate.statistics.variance import variance_parts
from model.errors import InputError
from train.clusters import cluster_ids, standard_error

SIMULATIONS = 5000
# MMLU's subjects, at a tenth of their size: very unequal clusters.
SUBJECTS = [
    10, 13, 15, 26, 14, 10, 10, 10, 17, 10, 10, 23, 11, 14, 37, 12, 10, 31, 20, 10, 16, 19, 19, 39, 27, 23, 15, 54, 21,
    20, 23, 22, 13, 12, 10, 16, 11, 10, 23, 10, 78, 34, 89, 31, 30, 32, 28, 153, 27, 61, 11, 24, 20, 10, 16, 17, 10,
]  # fmt: skip


def discordant(random, questions, share, difference=0.0):
    """Draw the counts of questions that only the first or only the second model answers correctly."""
    shares = [(share - difference) / 2, (share + difference) / 2, 1 - share]
    return random.multinomial(questions, shares, SIMULATIONS).T[:2]


@pytest.mark.parametrize(("questions", "share"), [(570, 0.1), (1172, 0.2), (2376, 0.15), (10042, 0.3)])
def test_equal_models_are_told_apart_in_one_of_twenty_comparisons(questions, share):
    p = mcnemar(*discordant(np.random.default_rng(questions), questions, share))
    assert 0.04 <= (p < 0.05).mean() <= 0.06


@pytest.mark.parametrize(("mean", "rate"), [(5, 0.024), (10, 0.041), (20, 0.046), (50, 0.049)])
def test_few_discordant_questions_make_the_test_conservative_as_its_docstring_says(mean, rate):
    assert mcnemar_power(1000, mean / 1000, 0.0) == pytest.approx(rate, abs=5e-4)
    assert f"{100 * rate:.1f} %" in mcnemar.__doc__


def test_mcnemar_against_sums_of_the_binomial_distribution():
    for first, second in [(0, 0), (3, 3), (0, 5), (2, 9), (40, 61)]:
        count = first + second
        outcomes = np.arange(count + 1)
        weights = stats.binom.pmf(outcomes, count, 0.5)
        distance, observed = abs(2 * outcomes - count), abs(first - second)
        expected = weights[distance > observed].sum() + weights[distance == observed].sum() / 2
        expected = 1.0 if count == 0 else expected
        assert mcnemar(np.array(first), np.array(second)) == pytest.approx(expected, abs=1e-12)
    assert mcnemar(np.array(0), np.array(4)) > 0.05 > mcnemar(np.array(0), np.array(5))


@pytest.mark.parametrize("effect", [0.0, 0.08])
@pytest.mark.parametrize("sizes", [[10] * 20, SUBJECTS], ids=["equal", "unequal"])
def test_the_clustered_test_keeps_its_level(sizes, effect):
    """Subjects move the difference of two equally good models, which the plain test takes for evidence."""
    random = np.random.default_rng(7)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    moved = 0.125 + effect * random.choice([-1.0, 1.0], (SIMULATIONS, len(sizes)))
    drawn = random.random((SIMULATIONS, len(ids)), np.float32)
    change = (drawn < moved[:, ids]).astype(float) - (drawn > 0.875)
    error, freedom = standard_error(change, ids)
    rejected = (2 * stats.t.sf(np.abs(change.mean(1)) / error, freedom) < 0.05).mean()
    assert 0.04 <= rejected <= 0.06
    if effect:
        plain, _ = standard_error(change)
        assert (np.abs(change.mean(1)) / plain > 1.96).mean() > 0.065
    if len(set(sizes)) == 1:
        assert freedom == pytest.approx(len(sizes) - 1)


def test_a_cluster_of_one_question_each_is_no_cluster():
    values = np.random.default_rng(0).normal(size=40)
    alone, freedom = standard_error(values, np.arange(40))
    assert (alone, freedom) == (pytest.approx(standard_error(values)[0]), pytest.approx(39))
    assert cluster_ids(["a", "b", ""]) is None
    assert cluster_ids(["a", "a", "a"]) is None
    assert cluster_ids(["b", "a", "b", ""]).tolist() == [2, 1, 2, 0]


def test_a_paired_difference_of_zeros_and_ones():
    first, second = np.repeat([1.0, 1.0, 0.0, 0.0], [60, 4, 16, 20]), np.repeat([1.0, 0.0, 1.0, 0.0], [60, 4, 16, 20])
    found = paired_difference(first, second)
    assert (found.mean, found.only_first, found.only_second, found.test) == (pytest.approx(0.12), 4, 16, "mcnemar")
    assert found.p == pytest.approx(float(mcnemar(np.array(4), np.array(16))))
    assert 0 < found.low < 0.12 < found.high
    back = paired_difference(second, first)
    assert (back.mean, back.low, back.p) == (-found.mean, pytest.approx(-found.high), found.p)
    same = paired_difference(first, first)
    assert (same.p, same.mean) == (1.0, 0.0)
    assert same.low < 0 < same.high


def test_the_interval_of_a_paired_difference_covers_the_truth():
    random = np.random.default_rng(3)
    covered = 0
    for only_first, only_second in discordant(random, 300, 0.2, 0.06).T[:1000]:
        second = np.repeat([0.0, 1.0, 1.0], [only_first, only_second, 300 - only_first - only_second])
        first = np.repeat([1.0, 0.0, 1.0], [only_first, only_second, 300 - only_first - only_second])
        found = paired_difference(first, second)
        covered += found.low <= 0.06 <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_scores_that_are_no_zeros_and_ones_get_a_t_test():
    random = np.random.default_rng(1)
    first = random.normal(size=50)
    second = first + random.normal(0.1, 0.3, 50)
    found, expected = paired_difference(first, second), stats.ttest_rel(second, first)
    interval = expected.confidence_interval(0.95)
    assert (found.test, found.p) == ("t", pytest.approx(expected.pvalue))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert paired_difference(first[:1], second[:1]).p is None


def test_pairing_finds_what_unpaired_scores_do_not():
    """Two correlated models: the error of the difference is smaller than that of independent scores."""
    random = np.random.default_rng(2)
    ability = random.random(1000)
    first, second = ((random.random(1000) < 0.2 + 0.6 * (ability > 0.5)).astype(float) for _ in range(2))
    separate = math.hypot(estimate_mean(first).standard_error, estimate_mean(second).standard_error)
    assert paired_difference(first, second).standard_error < 0.85 * separate


def test_holm_keeps_the_error_of_all_comparisons_together():
    assert holm([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]
    random = np.random.default_rng(5)
    p = mcnemar(*discordant(random, 1000, 0.2)).reshape(-1, 10)
    assert (p < 0.05).any(1).mean() > 0.3
    assert np.mean([min(holm(list(row))) < 0.05 for row in p]) < 0.08


def test_verdicts_in_words():
    assert verdict(0.1, 0.01) == "better"
    assert verdict(0.1, 0.01, higher_is_better=False) == "worse"
    assert verdict(0.1, 0.06) == "cannot be distinguished"
    assert verdict(0.1, None) == "not compared"


@pytest.mark.parametrize(("questions", "share"), [(100, 0.2), (570, 0.15), (1172, 0.25), (10042, 0.2), (300, 0.01)])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(questions, share):
    difference = detectable_share(questions, share)
    random = np.random.default_rng(questions)
    p = mcnemar(*discordant(random, questions, max(share, difference), difference))
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.02)
    assert questions_needed(difference, max(share, difference)) == pytest.approx(questions, rel=0.2)


def test_the_smallest_detectable_difference_before_an_evaluation():
    """From the baseline's answers and an assumed correlation; confirmed with answers that have it."""
    random = np.random.default_rng(11)
    questions, accuracy, correlation = 800, 0.4, 0.5
    baseline = (random.random(questions) < accuracy).astype(float)
    expected = expected_error(estimate_mean(baseline).standard_error, correlation)
    difference = detectable_mean(expected, questions - 1)
    share = discordant_share(accuracy, correlation)
    assert difference == pytest.approx(detectable_share(questions, share), rel=0.03)
    assert (mcnemar(*discordant(random, questions, share, difference)) < 0.05).mean() == pytest.approx(0.8, abs=0.03)
    values = random.normal(difference, expected * math.sqrt(questions), (SIMULATIONS, questions))
    error, freedom = standard_error(values)
    assert (2 * stats.t.sf(np.abs(values.mean(1)) / error, freedom) < 0.05).mean() == pytest.approx(0.8, abs=0.02)


def test_too_few_questions_show_nothing():
    assert detectable_share(4, 0.3) is None
    assert detectable_share(5, 0.0) > 0.9
    with pytest.raises(InputError, match="needs at least as many discordant questions"):
        questions_needed(0.3, 0.1)


def test_an_interval_of_shares_covers_the_truth():
    right = np.random.default_rng(0).binomial(40, 0.9, SIMULATIONS)
    low, high = wilson(right.astype(float), np.full(SIMULATIONS, 40.0))
    assert 0.93 <= ((low <= 0.9) & (high >= 0.9)).mean() <= 0.98
    assert estimate_mean(np.ones(30)).high == pytest.approx(1)
    assert 0.85 < estimate_mean(np.ones(30)).low < 0.9
    clustered = estimate_mean(np.repeat([1.0, 0.0, 1.0, 1.0], 10), np.repeat(np.arange(4), 10))
    assert clustered.high - clustered.low > 0.6  # four clusters that agree within are four questions


def test_the_error_of_a_ratio():
    """Bits per byte of documents of unequal length: the error is that of repeated draws of documents."""
    random = np.random.default_rng(4)
    weights = random.lognormal(6, 1, (2000, 200))
    values = 1 + 0.2 * random.normal(size=weights.shape)
    means = (weights * values).sum(1) / weights.sum(1)
    errors = [standard_error(linearised(*row))[0] for row in zip(values, weights, strict=True)]
    assert linearised(values[0], weights[0]).mean() == pytest.approx(means[0])
    assert np.mean(errors) == pytest.approx(means.std(), rel=0.1)


def test_variance_parts_of_a_known_table():
    random = np.random.default_rng(0)
    shape, deviations = (12, 60, 8), (0.3, 0.5, 0.2, 0.4)
    estimates, errors, means = [], [], []
    for _ in range(200):
        seeds, questions, prompts = (
            deviation * random.normal(size=[size if axis == facet else 1 for axis, size in enumerate(shape)])
            for facet, deviation in enumerate(deviations[:3])
        )
        scores = seeds + questions + prompts + deviations[3] * random.normal(size=shape)
        parts = variance_parts(scores)
        estimates.append([parts.parts[name] for name in ("seeds", "questions", "prompts")])
        errors.append(parts.error_of_mean(("seeds", "questions", "prompts")))
        means.append(scores.mean())
    assert np.mean(estimates, 0) == pytest.approx([0.09, 0.25, 0.04], rel=0.1)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.12)
    assert set(parts.parts) == {
        "seeds", "questions", "prompts", "seeds × questions", "seeds × prompts", "questions × prompts",
        "seeds × questions × prompts",
    }  # fmt: skip
    assert sum(parts.shares().values()) == pytest.approx(1)


def test_a_facet_of_one_is_not_estimable():
    random = np.random.default_rng(1)
    questions = random.normal(size=(1, 500, 1))
    scores = questions + random.normal(size=(4, 500, 1))  # no effect of seeds: its estimate is near zero
    parts = variance_parts(scores)
    assert parts.parts["prompts"] is None
    assert parts.parts["questions × prompts"] is None
    assert parts.parts["questions"] == pytest.approx(1, rel=0.2)
    assert parts.parts["seeds × questions"] == pytest.approx(1, rel=0.1)
    assert parts.error_of_mean(("prompts",)) is None
    assert parts.error_of_mean(("questions",)) == pytest.approx(math.sqrt((1 + 1 / 4) / 500), rel=0.1)
    fewer = parts.error_of_mean(("questions",), sizes={"questions": 125})
    assert fewer == pytest.approx(2 * parts.error_of_mean(("questions",)))
    one_way = variance_parts(scores[:1, :, :])
    assert one_way.error_of_mean(("questions",)) == pytest.approx(float(standard_error(scores[0, :, 0])[0]))
    with pytest.raises(InputError, match="at least two"):
        variance_parts(np.zeros((1, 1, 1)))
    with pytest.raises(InputError, match="supported are 'seeds', 'questions', 'prompts'"):
        parts.error_of_mean(("items",))


def test_a_negative_part_is_set_to_zero_and_named():
    cells = np.array([[[1.0], [0.0]], [[0.0], [1.0]]])  # seeds have equal means: less variation than by chance
    parts = variance_parts(cells)
    assert parts.negative == ("seeds", "questions")
    assert (parts.parts["seeds"], parts.parts["seeds × questions"]) == (0.0, 1.0)


def test_signal_to_noise_ranks_tasks():
    """The definition of the paper, and a task with a larger spread of models at the same noise is ranked higher."""
    final = np.array([0.30, 0.40, 0.35, 0.45, 0.50])
    repeated = final[:, None] + np.array([-0.01, 0.0, 0.01])
    clear = TaskScores(final, repeated, larger=final + 0.2)
    random = np.random.default_rng(0)
    vague = TaskScores(0.25 + 0.01 * random.normal(size=5), 0.25 + 0.01 * random.normal(size=(5, 3)), larger=-final)
    ranked = rank_tasks({"vague": vague, "clear": clear})
    assert [row.task for row in ranked] == ["clear", "vague"]
    assert (ranked[0].signal, ranked[0].noise) == (pytest.approx(0.2 / 0.4), pytest.approx(0.01 / 0.4))
    assert ranked[0].ratio == pytest.approx(20)
    assert ranked[0].ratio_interval[0] < 20
    assert ranked[0].decision_accuracy == 1.0
    assert ranked[1].decision_interval[0] < ranked[1].decision_accuracy + 1e-9
    assert choose_tasks(ranked, 4) == ["clear"]
    assert choose_tasks(ranked, 0, surely=False) == ["clear", "vague"]
    with pytest.raises(InputError, match="needs three models"):
        rank_tasks({"few": TaskScores(final[:2], repeated[:2])})


def test_decision_accuracy_counts_ties_as_one_half():
    large = np.array([1.0, 2.0, 3.0])
    assert decision_accuracy(np.array([1.0, 2.0, 3.0]), large) == 1.0
    assert decision_accuracy(np.array([1.0, 1.0, 3.0]), large) == pytest.approx(2.5 / 3)
    assert decision_accuracy(np.array([3.0, 2.0, 1.0]), large) == 0.0
    assert math.isnan(decision_accuracy(large, np.ones(3)))
