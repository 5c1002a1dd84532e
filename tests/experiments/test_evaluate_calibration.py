"""Calibration: equal to scikit-learn's where it is installed; a calibrated model is not called uncalibrated."""

import numpy as np
import pytest

from experiments.evaluate.statistics.calibration import (
    brier,
    calibrate,
    choice_probabilities,
    expected_calibration_error,
    noise_floor,
    reliability,
)


def predictions(questions=600, choices=4, sharpness=1.5, truth=1.0, seed=0):
    """Probabilities of a model and correct choices; truth: the sharpness that would be calibrated, over its own."""
    random = np.random.default_rng(seed)
    logits = sharpness * random.normal(size=(questions, choices))
    drawn = (truth * logits + random.gumbel(size=logits.shape)).argmax(1)  # each choice with its true probability
    probabilities, gold = [choice_probabilities(row) for row in logits], [(int(choice),) for choice in drawn]
    return probabilities, gold


def test_the_error_of_a_calibrated_model_is_below_the_noise_floor():
    below = []
    for seed in range(40):
        found = calibrate(*predictions(seed=seed))
        below.append(found.ece <= found.ece_if_calibrated)
    assert np.mean(below) >= 0.85
    overconfident = calibrate(*predictions(truth=0.4))
    assert overconfident.ece > 2 * overconfident.ece_if_calibrated
    assert overconfident.confidence > overconfident.accuracy
    assert overconfident.ece == pytest.approx(overconfident.confidence - overconfident.accuracy, abs=0.02)


def test_bins_have_equal_mass_and_their_intervals_hold_the_truth():
    confidence = np.random.default_rng(0).random(5000) ** 2
    correct = np.random.default_rng(1).random(5000) < confidence
    bins = reliability(confidence, correct)
    assert [row.questions for row in bins] == [500] * 10
    assert sum(row.low <= row.confidence <= row.high for row in bins) >= 9
    error = sum(abs(row.accuracy - row.confidence) * row.questions for row in bins) / 5000
    assert expected_calibration_error(confidence, correct) == pytest.approx(error)
    assert error < noise_floor(confidence)
    tied = np.repeat([0.25, 0.5], [90, 10])  # equal confidences share a bin
    assert [row.questions for row in reliability(tied, tied > 0.3, 10)] == [90, 10]


def test_brier_scores_by_hand():
    rows = [np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.5])]
    assert brier(rows, [(0,), (1,)]) == pytest.approx(((0.3**2 + 0.2**2 + 0.1**2) + 2 * 0.5**2) / 2)
    assert brier([np.array([0.7, 0.2, 0.1])], [(0, 1)]) == pytest.approx(0.1**2 + 0.1**2)
    found = calibrate(rows, [(0,), (1,)])
    assert found.brier_predicted == pytest.approx((0.3**2 + 0.5**2) / 2)
    assert len(found.bins) == 1  # too few questions for more
    assert choice_probabilities([-1000.0, -1000.0]) == pytest.approx([0.5, 0.5])


def test_numbers_are_those_of_scikit_learn():
    pytest.importorskip("sklearn")
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    probabilities, gold = predictions(truth=0.7)
    table, labels = np.stack(probabilities), np.array([right[0] for right in gold])
    confidence, correct = table.max(1), table.argmax(1) == labels
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10, strategy="quantile")
    bins = reliability(confidence, correct, 10)
    assert [row.accuracy for row in bins] == pytest.approx(accuracy, abs=1e-12)
    assert [row.confidence for row in bins] == pytest.approx(mean, abs=1e-12)
    found = calibrate(probabilities, gold)
    assert found.brier_predicted == pytest.approx(brier_score_loss(correct, confidence), abs=1e-12)
    assert found.brier == pytest.approx(brier_score_loss(labels, table, scale_by_half=False), abs=1e-12)
    assert found.brier == pytest.approx(brier_score_loss(labels, table), abs=1e-12)  # its default for several classes
    two, right = predictions(choices=2)
    pairs = np.stack(two)
    half = brier_score_loss(np.array([label == 1 for (label,) in right]), pairs[:, 1])  # its default for two
    assert brier(two, right) == pytest.approx(2 * half, abs=1e-12)
