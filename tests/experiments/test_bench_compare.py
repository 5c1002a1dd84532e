"""`isoflop bench compare`: what is noise and what is not."""

import copy
import json

import numpy as np
import pytest

from experiments.bench.compare import compare, ratio, regressions
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
    assert [row.found.verdict for row in result.rows] == ["within noise"] * 2
    assert all(row.found.ratio == 1 for row in result.rows)
    assert [row.found.verdict for row in compare(document(), document(seed=1)).rows] == ["within noise"] * 2


@pytest.mark.parametrize(("scale", "verdict"), [(1.1, "slower"), (0.9, "faster")])
def test_a_shift_beyond_the_spread_is_seen_and_measured(scale, verdict):
    for row in compare(document(), document(scale, seed=1)).rows:
        low, high = row.found.interval_95
        assert row.found.verdict == verdict
        assert low < scale < high
        assert low <= row.found.ratio <= high


def test_a_change_smaller_than_the_spread_is_noise_however_many_samples_say_so():
    random = np.random.default_rng(0)
    before, after = (random.normal(mean, 0.1, 1_500).tolist() for mean in (1.0, 1.02))
    found = ratio(before, after)
    assert not found.interval_95[0] <= 1 <= found.interval_95[1]
    assert found.verdict == "within noise"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [
        ratio(random.normal(1, 0.05, 30).tolist(), random.normal(1, 0.05, 30).tolist(), seed).interval_95
        for seed in range(200)
    ]
    assert 0.9 < np.mean([low <= 1 <= high for low, high in intervals]) <= 1


def test_cells_are_joined_by_their_coordinates():
    before, after = document(), document()
    after["cells"].reverse()
    after["cells"][0]["samples"]["seconds_per_step"] = [
        2 * value for value in after["cells"][0]["samples"]["seconds_per_step"]
    ]
    verdicts = {row.coordinates["batch"]: row.found.verdict for row in compare(before, after).rows}
    assert verdicts == {1: "within noise", 4: "slower"}
    after["cells"][0] = after["cells"][0] | {"error": "MemoryError: no room"}
    result = compare(before, after)
    assert [row.coordinates["batch"] for row in result.rows] == [1]
    assert [(row.coordinates["batch"], row.before, row.after) for row in result.alone] == [
        (4, "measured", "MemoryError: no room")
    ]


def test_documents_that_differ_in_an_axis_are_compared_across_it():
    after = document(1.1, seed=1)
    for cell in after["cells"]:
        cell["weights"] = "int8"
    with pytest.raises(InputError, match="or compare what differs: --across weights"):
        compare(document(), after)
    result = compare(document(), after, across=["weights"])
    assert [(row.coordinates["batch"], row.found.verdict) for row in result.rows] == [(1, "slower"), (4, "slower")]
    assert "weights" not in result.rows[0].coordinates
    with pytest.raises(InputError, match="several cells that differ in weights, batch alone"):
        compare(document(), after, across=["weights", "batch"])
    with pytest.raises(InputError, match="did you mean 'weights'"):
        compare(document(), after, across=["weight"])


def test_different_models_or_devices_are_refused():
    other = copy.deepcopy(document())
    other["config_hash"] = "xyz"
    with pytest.raises(InputError, match="different models"):
        compare(document(), other)
    assert compare(document(), other, anything=True).rows
    other = copy.deepcopy(document())
    other["device"]["kind"] = "gpu"
    with pytest.raises(InputError, match="different devices"):
        compare(document(), other)
    empty = document()
    empty["cells"] = []
    with pytest.raises(InputError, match="no measured cell in common"):
        compare(document(), empty)


def test_only_what_is_slower_by_more_than_the_limit_is_a_regression():
    rows = compare(document(), document(1.1, seed=1)).rows
    assert len(regressions(rows, 0.05)) == 2
    assert regressions(rows, 0.2) == []
    assert regressions(compare(document(), document(0.8, seed=1)).rows, 0.05) == []


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


def ceilings(read, product=1e11, read_measured=(), product_measured=()):
    return {
        "ceilings": {
            "read_bytes_per_second": read,
            "read_bytes_per_second_measured": list(read_measured) or [read],
            "matmul_flops_per_second": product,
            "matmul_flops_per_second_measured": list(product_measured) or [product],
            "matmul_dtype": "float32",
        }
    }


def test_one_code_on_a_machine_that_changed_is_neither_faster_nor_slower(isoflop, tmp_path):
    """Steps of 0.26 of the time where the bandwidth is 2.7 times as high: the code may have nothing to do with it."""
    before, after = document() | ceilings(1.5e10), document(0.26, seed=1) | ceilings(4.05e10)
    for one in (before, after):
        for cell in one["cells"]:
            cell["bound"] = "memory"
    result = compare(before, after)
    assert {row.found.verdict for row in result.rows} == {"machine changed"}
    assert all(row.ratio_per_ceiling == pytest.approx(2.7 * row.found.ratio) for row in result.rows)
    assert [(row.ceiling, row.changed) for row in result.machine] == [
        ("read bandwidth", True),
        ("product rate", False),
    ]
    assert {row.found.verdict for row in compare(before, after, anything=True).rows} == {"faster"}
    paths = tmp_path / "before.json", tmp_path / "after.json"
    for path, one in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(one))
    code, out, _ = isoflop("bench", "compare", *paths)
    assert code == 0
    assert "read bandwidth 15 → 40.5 (2.70 times)" in out
    assert "faster" not in out.replace("below 1 is faster", "")
    for pair in (paths, paths[::-1]):
        code, _, error = isoflop("bench", "compare", *pair, "--fail-above", "5%")
        assert (code, len(error.strip().splitlines())) == (2, 1)
        assert "the machine changed between the documents" in error


def test_a_change_of_the_product_rate_or_of_a_hidden_tenth_counts_too():
    changed = lambda **other: compare(document() | ceilings(1e10), document(1.3, seed=1) | ceilings(**other))
    verdicts = lambda result: {row.found.verdict for row in result.rows}
    assert verdicts(changed(read=1e10, product=0.7e11)) == {"machine changed"}
    assert verdicts(changed(read=0.95e10)) == {"slower"}
    assert verdicts(changed(read=1e10, read_measured=(1e10, 0.7e10))) == {"within noise"}, "the machine moved by 1.43"
    assert verdicts(compare(document(), document(1.3, seed=1) | ceilings(1e9))) == {"slower"}, "one has no ceilings"


def training(scale=1.0, seed=0, **shape):
    random = np.random.default_rng(seed)
    rows = [
        {"lanes": lanes, "samples": {"step_seconds": (scale * random.normal(0.02, 0.0003, 30)).tolist()}}
        for lanes in (1, 4)
    ]
    about = {key: value for key, value in document().items() if key != "cells"}
    return about | {"batch_size": 8, "seq_len": 128, "rows": rows} | ceilings(1e10) | shape


def test_training_documents_are_compared_alike(isoflop, tmp_path):
    paths = {name: tmp_path / f"{name}.json" for name in ("one", "slow", "poor", "wide", "decode", "against", "load")}
    documents = (
        training(),
        training(1.1, seed=1),
        training(1.3, seed=1) | ceilings(1e10, 0.5e11),
        training(seq_len=256),
        document(),
        {"contenders": [], "device": {}},
        document() | {"load": [{}]},
    )
    for path, one in zip(paths.values(), documents, strict=True):
        path.write_text(json.dumps(one))
    out = tmp_path / "out.json"
    call = lambda name, *more: isoflop("bench", "compare", paths["one"], paths[name], "--json", out, *more)
    assert call("slow", "--fail-above", "5%")[0] == 1
    rows = json.loads(out.read_text())["rows"]
    assert [(row["lanes"], row["metric"], row["verdict"]) for row in rows] == [
        (1, "step_seconds", "slower"),
        (4, "step_seconds", "slower"),
    ]
    assert call("one", "--fail-above", "5%")[0] == 0
    assert call("poor", "--fail-above", "5%")[0] == 2
    for name, words in (
        ("wide", "no measured cell in common"),
        ("decode", "of bench decode"),
        ("against", "turns in one run"),
        ("load", "--load"),
    ):
        code, _, error = call(name)
        assert (code, len(error.strip().splitlines())) == (2, 1)
        assert words in error
