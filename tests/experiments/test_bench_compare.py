"""`isoflop bench compare`: what is noise and what is not."""

import copy
import json

import numpy as np
import pytest

from experiments.decode.compare import compare, ratio, regressions
from model.errors import InputError


def document(scale: float = 1.0, seed: int = 0):
    random = np.random.default_rng(seed)
    cells = []
    for batch in (1, 4):
        place = {"kv_heads": 1, "weights": "float32", "cache": "float32", "batch": batch, "prompt": 8, "context": 8}
        times = (scale * random.normal(0.01, 0.0002, 40)).tolist()
        cells.append(place | {"steps": 4, "samples": {"seconds_per_step": times}})
    device = {"platform": "cpu", "kind": "cpu", "count": 1}
    return {"config_hash": "abc", "device": device, "cells": cells}


def test_the_same_numbers_are_within_noise():
    result = compare(document(), document())
    assert [row["verdict"] for row in result["rows"]] == ["within noise"] * 2
    assert all(row["ratio"] == 1 for row in result["rows"])
    assert [row["verdict"] for row in compare(document(), document(seed=1))["rows"]] == ["within noise"] * 2


@pytest.mark.parametrize(("scale", "verdict"), [(1.1, "slower"), (0.9, "faster")])
def test_a_shift_beyond_the_spread_is_seen_and_measured(scale, verdict):
    for row in compare(document(), document(scale, seed=1))["rows"]:
        low, high = row["interval_95"]
        assert row["verdict"] == verdict
        assert low < scale < high
        assert low <= row["ratio"] <= high


def test_a_change_smaller_than_the_spread_is_noise_however_many_samples_say_so():
    random = np.random.default_rng(0)
    before, after = (random.normal(mean, 0.1, 1_500).tolist() for mean in (1.0, 1.02))
    found = ratio(before, after)
    assert not found["interval_95"][0] <= 1 <= found["interval_95"][1]
    assert found["verdict"] == "within noise"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [
        ratio(random.normal(1, 0.05, 30).tolist(), random.normal(1, 0.05, 30).tolist(), seed)["interval_95"]
        for seed in range(200)
    ]
    assert 0.9 < np.mean([low <= 1 <= high for low, high in intervals]) <= 1


def test_cells_are_joined_by_their_coordinates():
    before, after = document(), document()
    after["cells"].reverse()
    after["cells"][0]["samples"]["seconds_per_step"] = [
        2 * value for value in after["cells"][0]["samples"]["seconds_per_step"]
    ]
    verdicts = {row["batch"]: row["verdict"] for row in compare(before, after)["rows"]}
    assert verdicts == {1: "within noise", 4: "slower"}
    after["cells"][0] = after["cells"][0] | {"error": "MemoryError: no room"}
    result = compare(before, after)
    assert [row["batch"] for row in result["rows"]] == [1]
    assert [(row["batch"], row["before"], row["after"]) for row in result["alone"]] == [
        (4, "measured", "MemoryError: no room")
    ]


def test_documents_that_differ_in_an_axis_are_compared_across_it():
    after = document(1.1, seed=1)
    for cell in after["cells"]:
        cell["weights"] = "int8"
    with pytest.raises(InputError, match="or compare what differs: --across weights"):
        compare(document(), after)
    result = compare(document(), after, across=["weights"])
    assert [(row["batch"], row["verdict"]) for row in result["rows"]] == [(1, "slower"), (4, "slower")]
    assert "weights" not in result["rows"][0]
    with pytest.raises(InputError, match="several cells that differ in weights, batch alone"):
        compare(document(), after, across=["weights", "batch"])
    with pytest.raises(InputError, match="did you mean 'weights'"):
        compare(document(), after, across=["weight"])


def test_different_models_or_devices_are_refused():
    other = copy.deepcopy(document())
    other["config_hash"] = "xyz"
    with pytest.raises(InputError, match="different models"):
        compare(document(), other)
    assert compare(document(), other, anything=True)["rows"]
    other = copy.deepcopy(document())
    other["device"]["kind"] = "gpu"
    with pytest.raises(InputError, match="different devices"):
        compare(document(), other)
    empty = document()
    empty["cells"] = []
    with pytest.raises(InputError, match="no measured cell in common"):
        compare(document(), empty)


def test_only_what_is_slower_by_more_than_the_limit_is_a_regression():
    rows = compare(document(), document(1.1, seed=1))["rows"]
    assert len(regressions(rows, 0.05)) == 2
    assert regressions(rows, 0.2) == []
    assert regressions(compare(document(), document(0.8, seed=1))["rows"], 0.05) == []


def test_the_command_exits_with_1_on_a_regression_alone(isoflop, tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(document()))
    after.write_text(json.dumps(document(1.1, seed=1)))
    code, out, _ = isoflop("bench", "compare", before, after, "--json", tmp_path / "out.json")
    assert code == 0
    assert "slower" in out
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["verdict"] == "slower"
    assert isoflop("bench", "compare", before, after, "--fail-above", "5%")[0] == 1
    assert isoflop("bench", "compare", before, after, "--fail-above", "20%")[0] == 0
    assert isoflop("bench", "compare", after, before, "--fail-above", "5%")[0] == 0
    code, _, error = isoflop("bench", "compare", before, after, "--fail-above", "many")
    assert (code, len(error.strip().splitlines())) == (2, 1)
    (tmp_path / "none.json").write_text("[]")
    assert isoflop("bench", "compare", before, tmp_path / "none.json")[0] == 2
