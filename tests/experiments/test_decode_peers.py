"""`isoflop bench decode --against`: the same weights under another program's names, turns, ratios, and refusals."""

import jax
import numpy as np
import pytest

from experiments.bench.decode import against_peers as decode_bench
from experiments.bench.decode.against_peers import TimedGeneration, answers_by_round, bench_against, summarize
from experiments.bench.decode.cells import Cell
from experiments.bench.peers.gguf_out import check_is_llama, write_gguf
from model import ModelConfig, presets
from model.convert import fold, load_gguf
from model.errors import InputError

TINY = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=16)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "attention_bias": True, "rope_base": 5e5}])
def test_a_gguf_file_reads_back_as_it_was_written(changes, random_params, tmp_path):
    config = TINY.replace(**changes)
    params = random_params(config)
    write_gguf(config, params, tmp_path / "model.gguf")
    again, weights = load_gguf(tmp_path / "model.gguf")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_a_gguf_file_of_a_mup_model_holds_its_multipliers(random_params, tmp_path):
    config = TINY.replace(parameterization="mup", base_d_model=6, base_num_layers=1)
    params = random_params(config)
    write_gguf(config, params, tmp_path / "model.gguf")
    again, weights = load_gguf(tmp_path / "model.gguf")
    standard, folded = fold(config, params)
    assert again == standard
    jax.tree.map(np.testing.assert_array_equal, weights, folded)


@pytest.mark.parametrize("changes", [{"norm": "layernorm"}, {"qk_norm": True}, {"sliding_window": 4}])
def test_what_is_no_llama_is_refused_by_the_field(changes):
    (name,) = changes
    with pytest.raises(InputError, match=f"{name}=.* is not supported"):
        check_is_llama(TINY.replace(**changes))


def test_llamas_are_llamas():
    for name in ("llama3-8b", "llama2-7b", "tiny"):
        if name in presets.names() and presets.get(name).rope_scaling is None:
            check_is_llama(presets.get(name))


def test_everyone_begins_in_turn_and_who_fails_is_left_out():
    order = []

    def turn(name):
        def run():
            order.append(name)
            if name == "b" and order.count("b") == 2:
                raise InputError("it broke")
            return TimedGeneration(1.0, 2.0, [])

        return run

    answers, failed = answers_by_round({name: turn(name) for name in ("isoflop", "a", "b")}, 3)
    assert "".join(name[0] for name in order) == "iab" + "abi" + "ia"
    assert {name: len(each) for name, each in answers.items()} == {"isoflop": 3, "a": 3, "b": 1}
    assert failed == {"b": "it broke"}


def test_ratios_are_of_rounds_and_tokens_are_compared():
    answer = lambda first, whole, tokens: TimedGeneration(first, whole, [tokens])
    ours = [answer(1.0, 3.0, [4, 5, 6]), answer(1.0, 5.0, [4, 5, 6])]
    theirs = [answer(2.0, 6.0, [4, 5, 7]), answer(4.0, 8.0, [4, 5, 7])]
    row = summarize("them", {"isoflop": ours, "them": theirs})
    assert row["samples"]["seconds_per_step"] == [2.0, 2.0]
    assert (row["isoflop_over_this_decode"], row["isoflop_over_this_decode_lowest"]) == (1.5, 1.0)
    assert (row["isoflop_over_this_first_token"], row["isoflop_over_this_first_token_highest"]) == (3.0, 4.0)
    assert (row["tokens_equal"], row["tokens"], row["first_difference"]) == (2, 3, 2)
    assert summarize("isoflop", {"isoflop": ours})["first_difference"] is None


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (Cell(1, 4, weights="int8"), "float32 or bfloat16 weights, not int8"),
        (Cell(1, 4, context=8), "leave out --context"),
        (Cell(1, 4, cache="int8"), "leave out --context, --cache"),
        (Cell(1, 4), "/nowhere/python has no llama_cpp: .* ISOFLOP_LLAMA_PYTHON"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(cell, words, monkeypatch):
    monkeypatch.setenv("ISOFLOP_LLAMA_PYTHON", "/nowhere/python")
    with pytest.raises(InputError, match=words):
        bench_against((TINY, {}), [cell], ["llama.cpp"], steps=4, rounds=1)


ECHO = """
import json, sys
print(json.dumps({"ready": True, "versions": {"echo": "1"}}), flush=True)
for line in sys.stdin:
    told = json.loads(line)
    if told["do"] == "cell":
        tokens, steps = told["tokens"], told["steps"]
        answer = {"error": "ValueError: too long"} if len(tokens[0]) > 4 else {"seconds": 1.0, "note": "as it is"}
    else:
        answer = {"first": 1e3, "all": 2e3, "tokens": [tokens[0][:1] * steps]}
    print(json.dumps(answer), flush=True)
"""


def test_a_program_that_cannot_run_a_cell_is_a_row_and_the_others_are_compared(random_params, monkeypatch, tmp_path):
    program = tmp_path / "echo.py"
    program.write_text(ECHO)
    monkeypatch.setattr(decode_bench, "PEER", program)
    monkeypatch.setattr(decode_bench, "PEERS", {"torch": ("json", "ISOFLOP_TORCH_PYTHON")})
    monkeypatch.delenv("ISOFLOP_TORCH_PYTHON", raising=False)
    rows = bench_against((TINY, random_params(TINY)), [Cell(1, 4), Cell(1, 5)], ["torch"], steps=3, rounds=2)
    assert [(row["prompt"], row["contender"]) for row in rows] == [
        (4, "isoflop"),
        (4, "torch"),
        (5, "isoflop"),
        (5, "torch"),
    ]
    assert rows[1]["echo"] == "1"
    assert rows[1]["seconds_per_step"] == 500
    assert rows[1]["isoflop_over_this_decode"] > 1
    assert (rows[0]["tokens"], rows[0]["tokens_equal"]) == (3, 3)
    assert rows[3]["error"] == "ValueError: too long"
    assert rows[2]["seconds_per_step"] > 0
