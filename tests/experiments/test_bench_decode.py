"""`isoflop bench decode`: its grid, its books of bytes and FLOPs, its formats, and what it refuses."""

import csv
import dataclasses
import functools
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from experiments.bench.ceilings import Ceilings, best_of, measure_ceilings
from experiments.bench.decode.cells import Cell, grid, measure
from experiments.bench.decode.grid import bench_decode, check_grid, read_grid, run_grid
from experiments.bench.decode.roofline import add_shares, shares, step_cost
from experiments.bench.document import config_hash, describe
from experiments.bench.render import cell_tables, render
from infer import decode_step, prepare
from model import Experts, Latent, ModelConfig, accounting
from model.errors import InputError

TINY = ModelConfig(vocab_size=16, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=12, max_seq_len=16)
CEILINGS = Ceilings(1e9, "any", 1, {}, 1e10, "float32")


def shapes(config):
    return jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))


@pytest.fixture(scope="module")
def rows(random_params):
    """One cell that runs, between two that cannot: their model is too large."""

    def build(kv_heads):
        if kv_heads == 2:
            raise MemoryError("no room")
        return TINY, random_params(TINY)

    cells = [Cell(2, 4, kv_heads=2), Cell(2, 4, 6), Cell(1, 4, kv_heads=2)]
    measured = run_grid(build, TINY, cells, steps=3, repeats=2)
    add_shares(measured, CEILINGS)
    return measured


def test_a_failing_cell_is_a_row_and_ends_nothing(rows):
    assert [row.get("error") for row in rows] == ["MemoryError: no room", None, "MemoryError: no room"]
    assert [(row["batch"], row["prompt"], row["context"]) for row in rows] == [(2, 4, 4), (2, 4, 6), (1, 4, 4)]


def test_a_cell_says_how_long_everything_took(rows):
    row, samples = rows[1], rows[1]["samples"]
    assert row["recompiles"] == 0
    assert all(row[f"compile_seconds_{name}"] > 0 for name in ("prefill", "decode_step", "decode"))
    assert {name: len(values) for name, values in samples.items()} == {
        "time_to_first_token_seconds": 2,
        "seconds_per_step": 2,
        **dict.fromkeys(("time_per_output_token_seconds", "host_seconds_per_step", "device_seconds_per_step"), 6),
    }
    for name, values in samples.items():
        assert row[name] == pytest.approx(np.median(values))
    assert row["time_per_output_token_seconds_p99"] == pytest.approx(
        np.percentile(samples["time_per_output_token_seconds"], 99)
    )
    assert row["decode_tokens_per_second_aggregate"] == pytest.approx(2 / row["seconds_per_step"])
    assert row["decode_tokens_per_second_per_sequence"] == pytest.approx(1 / row["seconds_per_step"])
    assert row["prefill_tokens_per_second"] == pytest.approx(2 * 4 / row["time_to_first_token_seconds"])
    assert row["peak_memory_bytes"] > 0
    assert row["peak_memory_source"]


def test_ctrl_c_keeps_what_is_done(monkeypatch):
    done = iter([{"seconds_per_step": 1.0}, KeyboardInterrupt])

    def measured(*_):
        if (next_one := next(done)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return next_one

    monkeypatch.setattr("experiments.bench.decode.grid.measure", measured)
    monkeypatch.setattr("experiments.bench.decode.grid.prepare", lambda config, params, weights: shapes(config))
    called = []
    build = lambda _: (TINY, None)
    cells = [Cell(1, 4), Cell(2, 4), Cell(3, 4)]
    kept = run_grid(build, TINY, cells, steps=2, repeats=1, stopped=lambda: called.append(True))
    assert [row["batch"] for row in kept] == [1]
    assert called == [True]


def test_the_grid_is_every_combination_and_keeps_models_together():
    cells = grid(batch=(1, 2), prompt=(4,), context=(), weights=("float32", "bfloat16"), kv_heads=(1,))
    assert [(cell.weights, cell.batch) for cell in cells] == [
        ("float32", 1),
        ("float32", 2),
        ("bfloat16", 1),
        ("bfloat16", 2),
    ]
    assert all(cell.depth == cell.prompt == 4 and cell.kv_heads == 1 and cell.cache is None for cell in cells)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (Cell(0, 4), "batch=0 must be a whole number of at least 1"),
        (Cell(1, 15), "prompt 15 and 2 steps exceed the model's context, max_seq_len=16"),
        (Cell(1, 4, 15), "context 15 and 2 steps"),
        (Cell(1, 4, weights="float8"), "unknown weight type 'float8'"),
        (Cell(1, 4, cache="int9"), "unknown cache dtype 'int9'; supported are 'float32', 'bfloat16', 'int8'"),
        (Cell(1, 4, kv_heads=3), "kv_heads=3 must divide num_heads=2"),
    ],
)
def test_a_cell_that_cannot_run_is_refused_before_anything_is_measured(cell, words):
    with pytest.raises(InputError, match=words):
        check_grid(TINY, [Cell(1, 4), cell], 2, 1)


def test_what_is_no_decoder_is_refused():
    config = TINY.replace(stack="encoder", head="masked-language-model", position="learned")
    with pytest.raises(InputError, match="stack='encoder'"):
        bench_decode(config, {}, batches=(1,), contexts=(4,), steps=2)


def test_bytes_and_flops_of_a_step_by_hand():
    """d 8, two query heads and one KV head of 4, feed-forward 12 gated, vocabulary 16 tied, two layers."""
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    cost = step_cost(TINY, shapes(TINY), Cell(batch=3, prompt=4, context=6), steps=3)
    length = 6 + 2
    assert cost["weight_bytes_read_per_step"] == 4 * (2 * (layer + 2 * 8) + 8 + 16 * 8 + 3 * 8)
    assert cost["kv_cache_bytes_filled"] == 3 * 2 * length * 2 * 4 * 4
    assert cost["bytes_read_per_step_filled"] == cost["weight_bytes_read_per_step"] + cost["kv_cache_bytes_filled"]
    assert cost["flops_exact_per_step"] == 3 * (2 * 2 * layer + 2 * 2 * length * 2 * 8 + 2 * 16 * 8)
    untied = TINY.replace(tie_embeddings=False)
    assert step_cost(untied, shapes(untied), Cell(3, 4, 6), 3) == cost


def test_what_is_read_follows_how_it_is_stored():
    whole = lambda config, dtype: accounting.kv_cache_bytes(config, 3, 10, dtype)
    assert whole(TINY, "float32") == 4 * 3 * 2 * 10 * 8
    assert whole(TINY, "int8") == 3 * 2 * 10 * (8 + 2 * 4)
    latent = TINY.replace(num_kv_heads=None, latent=Latent(kv_rank=6, nope_dim=4, rope_dim=2, v_dim=4))
    assert whole(latent, "int8") == 3 * 2 * 10 * (6 + 2 + 2 * 4)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes(TINY))
    read = [accounting.decode_step_bytes(TINY, tree, 1, 5) for tree in (half, shapes(TINY))]
    assert 2 * read[0]["weights"] == read[1]["weights"]


def test_routed_experts_are_read_as_far_as_they_are_expected_to_be_chosen():
    config = TINY.replace(experts=Experts(count=4, top_k=2, d_ff=6, shared_d_ff=5))
    routed = 2 * 4 * 3 * 8 * 6 * 4
    read = lambda batch: accounting.decode_step_bytes(config, shapes(config), batch, 5)["weights"]
    everything = read(10_000)
    assert everything - read(1) == pytest.approx(routed / 2)
    assert everything - read(3) == pytest.approx(routed / 8)


def test_exact_flops_of_a_step_are_those_of_a_row_without_its_other_tokens(decoder):
    """Decoding the last token costs what the whole row costs per token, where nothing is latent or windowed."""
    if decoder.latent is not None or decoder.sliding_window is not None:
        pytest.skip("its cached path computes other products")
    assert accounting.decode_step_flops(decoder, 3, 7) == 3 * accounting.flops_per_token(decoder, 7, training=False)


def test_shares_of_the_ceilings():
    cost = {"bytes_read_per_step_filled": 2e8, "flops_exact_per_step": 1e9}
    slow = shares(cost, 0.5, CEILINGS)
    assert (slow["share_of_read_bandwidth"], slow["share_of_matmul_peak"]) == pytest.approx((0.4, 0.2))
    assert (slow["bound"], slow["share_of_bound"], slow["flops_per_byte"]) == ("memory", 0.4, 5.0)
    assert shares(cost | {"flops_exact_per_step": 4e9}, 0.5, CEILINGS)["bound"] == "compute"


def test_the_probe_takes_the_fastest_form():
    found = measure_ceilings("float32", size=1 << 20, seconds=0.001)
    assert found.read_bytes_per_second == max(found.read_bytes_per_second_by_form.values())
    assert found.read_bytes_per_second_by_form[found.read_form] == found.read_bytes_per_second
    assert found.matmul_flops_per_second > 0


def test_a_ceiling_is_measured_several_times_and_keeps_all_of_them():
    found = measure_ceilings("float32", size=1 << 20, seconds=0.003, rounds=3)
    both = best_of(found, measure_ceilings("float32", size=1 << 20, seconds=0.003, rounds=2))
    for ceilings, count in ((found, 3), (both, 5)):
        for name in ("read_bytes_per_second", "matmul_flops_per_second"):
            measured = getattr(ceilings, f"{name}_measured")
            assert len(measured) == count
            assert getattr(ceilings, name) == max(measured)


def test_a_share_has_an_interval_of_the_steps_and_of_the_ceiling():
    """200 MB in a step of 0.4 to 0.6 s: 40 % of 1 GB/s, and up to 80 % of what was there when it was 0.5 GB/s."""
    row = {"bytes_read_per_step_filled": 2e8, "flops_exact_per_step": 1e9, "seconds_per_step": 0.5}
    row["samples"] = {"seconds_per_step": [0.5] * 20}
    moving = dataclasses.replace(CEILINGS, read_bytes_per_second_measured=(1e9, 0.9e9, 0.5e9))
    still, moved = [dict(row), {"error": "MemoryError"}], [dict(row)]
    add_shares(still, CEILINGS)
    add_shares(moved, moving)
    assert still[0]["share_of_bound_interval_95"] == pytest.approx([0.4, 0.4])
    assert moved[0]["share_of_bound"] == still[0]["share_of_bound"] == pytest.approx(0.4)
    assert moved[0]["share_of_bound_interval_95"] == pytest.approx([0.4, 0.8])
    noisy = [row | {"samples": {"seconds_per_step": [0.4, 0.5, 0.6]}}]
    add_shares(noisy, CEILINGS)
    assert noisy[0]["share_of_bound_interval_95"] == pytest.approx([2 / 6, 2 / 4])
    assert "40% (40 … 80) memory" in str(cell_tables([_measured(moved[0])]))


def _measured(row):
    """With all that the tables show besides."""
    speeds = ("aggregate", "slowest", "fastest", "per_sequence")
    times = ("time_to_first_token_seconds", "time_per_output_token_seconds", "host_seconds_per_step")
    shown = dict.fromkeys(
        (*times, "prefill_tokens_per_second", "recompiles", "steps", "repeats", "batch", "context"), 1
    )
    shown |= {f"decode_tokens_per_second_{name}": 1.0 for name in speeds}
    return dict.fromkeys(("kv_heads", "weights", "cache", "prompt"), 1) | shown | row


def test_the_higher_of_two_measurements_is_the_ceiling():
    slow_read = dataclasses.replace(CEILINGS, read_bytes_per_second=5e8, read_form="slow", matmul_flops_per_second=2e10)
    for found in (best_of(CEILINGS, slow_read), best_of(slow_read, CEILINGS)):
        assert (found.read_bytes_per_second, found.read_form, found.matmul_flops_per_second) == (1e9, "any", 2e10)


def test_formats_hold_the_same_numbers(rows):
    document = {"cells": rows}
    assert json.loads(render(document, "json"))["cells"] == rows
    assert [json.loads(line) for line in render(document, "jsonl").splitlines()] == rows
    table = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert float(table[1]["seconds_per_step"]) == rows[1]["seconds_per_step"]
    assert table[0]["error"] == "MemoryError: no room"
    for table in render(document, "md").split("\n\n"):
        lines = table.splitlines()
        assert len(lines) == 2 + len(rows)
        assert len({line.count("|") for line in lines}) == 1
        assert "MemoryError" in lines[2]


def test_the_picture_has_a_point_per_cell(rows):
    from experiments.bench.decode.figures import draw

    document = {"cells": rows, "ceilings": dataclasses.asdict(CEILINGS)}
    frontier, roof = draw(document).axes
    assert frontier.lines[0].get_xydata().tolist() == [
        [rows[1]["decode_tokens_per_second_per_sequence"], rows[1]["decode_tokens_per_second_aggregate"]]
    ]
    roofline = roof.lines[0].get_ydata()
    assert math.isclose(max(roofline), 1e10)
    with pytest.raises(InputError, match="no cell was measured"):
        draw({"cells": rows[:1], "ceilings": {}})


def test_a_context_beyond_the_prompt_is_filled_with_chunks_of_it(random_params, monkeypatch):
    seen = []
    real = decode_step

    def spy(config, params, token, cache):
        seen.append(np.asarray(cache.lengths).tolist())
        return real(config, params, token, cache)

    spy.lower = real.lower
    monkeypatch.setattr("experiments.bench.decode.cells.decode_step", spy)
    measure(TINY, prepare(TINY, random_params(TINY)), Cell(2, 4, 6), 3, 1)
    assert seen == [[6, 6], [7, 7], [8, 8]] * 2


def test_the_command_refuses_in_one_sentence(isoflop, tmp_path):
    cells = tmp_path / "cells.json"
    for arguments, words in (
        (("no-such-preset",), "no-such-preset"),
        (("tiny", "--batch", 0), "batch=0"),
        (("tiny", "--prompt", 60), "max_seq_len=64"),
        (("tiny", "--plot", "x.gif"), "the suffix should be one of .svg, .png, .pdf"),
        (("tiny", "--grid", cells), "unknown axis"),
    ):
        cells.write_text('[{"bach": 1}]')
        code, _, error = isoflop("bench", "decode", *arguments)
        assert code == 2
        assert words in error
        assert len(error.strip().splitlines()) == 1


def test_a_grid_file_is_a_list_of_cells():
    cells = [{"batch": 2, "prompt": 3, "cache": "int8"}, {"kv_heads": 1}]
    assert read_grid(cells, "it") == [Cell(2, 3, cache="int8"), Cell(kv_heads=1)]
    for wrong, words in (({"batch": 1}, "it must be a JSON list"), ([{"batch": "2"}], "it: batch='2' must be a whole")):
        with pytest.raises(InputError, match=words):
            read_grid(wrong, "it")


def test_a_document_says_where_it_is_from():
    found = describe(TINY, "tiny", random_weights=True)
    assert found["config_hash"] == config_hash(TINY) != config_hash(TINY.replace(d_ff=16))
    assert found["device"]["platform"] == "cpu"
    assert all(found[name] for name in ("commit", "command", "versions"))
