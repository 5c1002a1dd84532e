"""Approach 1: known curves give known exponents; sizes that never cross say so."""

import json

import numpy as np
import pytest

from experiments.scaling.envelope import fit_envelope
from experiments.scaling.rows.curves import TrainingCurve, curves_of_table
from model.errors import InputError

A = 0.28 / 0.62


def curves(sizes=None, noise=0.0, points=120, seed=0, schedule="constant"):
    """Curves of L = 1.7 + 400·N^-0.34 + 410·D^-0.28 at geometric sizes, all from 1e8 to 1e12 tokens."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(3e7, 3e9, 9) if sizes is None else sizes
    tokens = np.geomspace(1e8, 1e12, points)
    made = []
    for i, size in enumerate(sizes):
        loss = (1.7 + 400 * size**-0.34 + 410 * tokens**-0.28) * np.exp(rng.normal(0, noise, points))
        made.append(TrainingCurve(f"run{i}", float(size), tokens, loss, schedule))
    return made


def test_exponents_come_back():
    fit = fit_envelope(curves(), bootstraps=50)
    assert fit.a == pytest.approx(A, rel=2e-3)
    assert fit.b == pytest.approx(1 - A, rel=2e-3)
    assert len(fit.crossings) == 8
    assert fit.warnings == []
    assert 6 * fit.params_coefficient * fit.tokens_coefficient == pytest.approx(1)


def test_noise_is_smoothed_and_intervals_hold_the_truth():
    fit = fit_envelope(curves(noise=0.002, points=400), bootstraps=100)
    low, high = fit.intervals["a"][95]
    assert low <= A <= high
    assert high - low < 0.2
    document = json.loads(json.dumps(fit.document()))
    assert document["intervals"]["a"]["95"] == [low, high]


def test_smoothing_keeps_a_straight_line():
    tokens = np.geomspace(1e6, 1e9, 50)
    curve = TrainingCurve("line", 1.0, tokens, 5 - 0.1 * np.log(tokens))
    np.testing.assert_allclose(curve.smoothed(), curve.loss, rtol=1e-9)


def test_sizes_without_a_crossing_are_rejected_with_the_reason_and_decay_is_warned_of():
    made = curves(schedule="cosine")
    worse = TrainingCurve("worse", 5e8 * 1.01, made[0].tokens, made[0].loss + 3, "cosine")
    fit = fit_envelope([*made, worse], bootstraps=10)
    assert [(r.name, r.reason) for r in fit.rejected] == [
        ("worse", "never the best size at any compute that two runs share")
    ]
    assert "cosine" in fit.warnings[0]
    with pytest.raises(InputError, match="2 model sizes"):
        fit_envelope(made[:2])
    with pytest.raises(InputError, match=r"crossings? of neighbouring sizes found"):
        fit_envelope([TrainingCurve(c.name, c.params, c.tokens, c.loss + 10 * i) for i, c in enumerate(made)])


def test_curves_are_read_from_tables(tmp_path):
    made = curves(points=5)[:2]
    lines = ["run,params,tokens,loss"]
    lines += [f"{c.name},{c.params},{d},{value}" for c in made for d, value in zip(c.tokens, c.loss, strict=True)]
    table = tmp_path / "curves.csv"
    table.write_text("\n".join(lines))
    read = curves_of_table(table)
    assert [c.name for c in read] == ["run0", "run1"]
    np.testing.assert_allclose(read[1].loss, made[1].loss)
    table.write_text("\n".join([*lines, "run0,7,1,1"]))
    with pytest.raises(InputError, match="different values"):
        curves_of_table(table)
