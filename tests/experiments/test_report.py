"""What pages are made of: curves of runs, numbers as people write them."""

import numpy as np
import pytest

from experiments.report.page import number
from experiments.runs.curves import read_curve


def test_curves_are_thinned_not_bent(tmp_path, write_metrics):
    """A constant stays constant, noise shrinks, the end stays the end, and nothing after a divergence is shown."""
    assert read_curve(tmp_path / "nothing") is None
    write_metrics(tmp_path / "flat", [3.0] * 5000)
    flat = read_curve(tmp_path / "flat")
    assert len(flat.steps) <= 200
    assert flat.tokens[-1] == 1024 * 5000
    np.testing.assert_allclose(flat.loss, 3.0)
    write_metrics(tmp_path / "noisy", 3 + np.random.default_rng(0).standard_normal(5000))
    assert np.abs(read_curve(tmp_path / "noisy").loss[-50:] - 3).max() < 0.3
    write_metrics(tmp_path / "broken", [3.0, 2.0, float("inf"), 1.0])
    broken = read_curve(tmp_path / "broken")
    assert broken.diverged
    assert broken.steps[-1] == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("inf"), "–"),
        (0.0, "0"),
        (-0.05, "−0.0500"),
        (1234.5, "1,234"),
        (3.48e10, "3.48 × 10<sup>10</sup>"),
    ],
)
def test_numbers_as_people_write_them(value, text):
    assert number(value) == text
