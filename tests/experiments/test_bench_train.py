"""`isoflop bench train`: ratios to one lane; --against torch: what it refuses, and the arithmetic of its rounds."""

import json

import jax
import pytest

from experiments.bench.ceilings import Ceilings
from experiments.bench.peers.twin import check_has_twin
from experiments.bench.rounds import tokens_per_second
from experiments.bench.train.against_torch import bench_against_torch, summarize
from experiments.commands.bench.train import train
from model import Experts, RopeScaling, presets
from model.errors import InputError
from train import TrainConfig

TINY = presets.get("tiny")
TRAIN = TrainConfig(batch_size=2, seq_len=16)
CEILINGS = Ceilings(1e9, "any", 1, {}, 10.0, "float32", (1e9,), (10.0, 8.0, 4.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_placement": "post"}, "norm_placement='post' has no twin in PyTorch to compare with; it must be 'pre'"),
        ({"position": "alibi"}, "position='alibi' .* 'rotary' or 'learned'"),
        ({"experts": Experts(count=4, top_k=2, d_ff=8)}, "experts=.* must be None"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling="),
        ({"stack": "encoder"}, "stack='encoder'"),
        ({"parameterization": "mup", "base_d_model": 8}, "parameterization='mup'"),
        ({"final_softcap": 3.0}, "final_softcap=3.0"),
        ({"final_norm": False}, "final_norm=False .* must be True"),
    ],
)
def test_a_model_without_a_twin_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        check_has_twin(TINY.replace(**changes), TRAIN)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "muon"}, "optimizer='muon' .* 'adamw'"),
        ({"dropout": True}, "dropout=True"),
        ({"segment_documents": True}, "segment_documents=True"),
        ({"seq_len": 65}, "seq_len=65 exceeds max_seq_len=64"),
    ],
)
def test_a_step_without_a_twin_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        check_has_twin(TINY, TRAIN.replace(**changes))


def test_lanes_are_compared_with_one(tmp_path, monkeypatch):
    speeds = ("tokens_per_second", "tokens_per_second_slowest", "tokens_per_second_fastest")
    others = ("flops_6nd_per_second", "flops_exact_per_second", "step_seconds", "compile_seconds")

    def measured(config, train_config, lanes, seconds, execution):
        row = {"lanes": lanes, "samples": {"step_seconds": [0.9, 1.0, 1.1]}}
        return row | dict.fromkeys(speeds, 100.0 * lanes**0.5) | dict.fromkeys(others, 1.0)

    monkeypatch.setattr("experiments.sweep.speed.measure_step", measured)
    monkeypatch.setattr("experiments.bench.ceilings.measure_ceilings", lambda dtype: CEILINGS)
    for lanes, ratios in (((4, 1, 16), [2, 1, 4]), ((4, 16), [None, None])):
        train("tiny", lanes=lanes, json=tmp_path / "lanes.json")
        rows = json.loads((tmp_path / "lanes.json").read_text())["rows"]
        assert [row["tokens_per_second_over_one_lane"] for row in rows] == ratios
        for row in rows:  # 1 FLOP in a second, of at most 10, 8 or 4 in another's
            low, high = row["share_of_matmul_peak_interval_95"]
            assert row["share_of_matmul_peak"] == 0.1
            assert low == pytest.approx(1 / 1.1 / 10, rel=0.02)
            assert high == pytest.approx(1 / 0.9 / 4, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_sixteen_lanes_of_a_small_model_are_nearly_free(optimised, tmp_path):
    """One lane of ten million parameters leaves most of a GPU idle."""
    options = {"batch_size": 8, "seq_len": 128, "lanes": (1, 16), "seconds": 5.0}
    train("study-256", **options, set=("num_layers=12", "compute_dtype=bfloat16"), json=tmp_path / "lanes.json")
    rows = json.loads((tmp_path / "lanes.json").read_text())["rows"]
    assert rows[1]["tokens_per_second_over_one_lane"] >= 6


@pytest.mark.parametrize("name", ["study-128", "gpt2-small", "llama3-8b", "tiny"])
def test_plain_decoders_have_one(name):
    check_has_twin(presets.get(name), TRAIN)


def test_a_refusal_comes_before_anything_is_compiled_or_started(monkeypatch):
    with pytest.raises(InputError, match="rounds=0"):
        bench_against_torch(TINY, TRAIN, rounds=0)
    monkeypatch.setenv("ISOFLOP_TORCH_PYTHON", "/nowhere/python")
    with pytest.raises(InputError, match="/nowhere/python has no torch"):
        bench_against_torch(TINY, TRAIN)


def test_everyone_begins_in_turn_and_speeds_are_tokens_over_seconds():
    order: list[str] = []

    def contender(name: str, seconds_per_step: list[float]):
        rounds = iter(seconds_per_step)

        def turn(count: int) -> tuple[float, list[float]]:
            order.append(name)
            return count * next(rounds), []

        return turn

    turns = {
        "isoflop": contender("isoflop", [0.1, 0.2, 0.4]),
        "a": contender("a", [0.2, 0.2, 0.1]),
        "b": contender("b", [0.4, 0.8, 1.6]),
    }
    speeds = tokens_per_second(turns, {"isoflop": 10, "a": 5, "b": 1}, 3, tokens_per_step=8)
    assert order == ["isoflop", "a", "b", "a", "b", "isoflop", "b", "isoflop", "a"]
    assert speeds["isoflop"] == pytest.approx([80, 40, 20])
    assert speeds["b"] == pytest.approx([20, 10, 5])
    row = summarize("a", speeds, {"6N": 6.0, "exact": 7.0})
    assert row.tokens_per_second == pytest.approx(40)
    assert (row.tokens_per_second_slowest, row.tokens_per_second_fastest) == pytest.approx((40, 80))
    assert row.isoflop_over_this == pytest.approx(1)  # 80/40, 40/40, 20/80: of rounds, not of medians
    assert (row.isoflop_over_this_lowest, row.isoflop_over_this_highest) == pytest.approx((0.25, 2))
    assert row.isoflop_over_this_at_best == pytest.approx(1)
    assert row.flops_6nd_per_second == pytest.approx(240)
    assert row.flops_exact_per_second == pytest.approx(280)
    assert summarize("b", speeds, {"6N": 6.0, "exact": 7.0}).isoflop_over_this_lowest == pytest.approx(4)
