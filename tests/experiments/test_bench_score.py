"""`isoflop bench score`: contenders score alike, ratios are of rounds, and what it refuses."""

import json
import statistics

import jax
import pytest

from experiments.bench.score import bench_score
from experiments.commands.bench.compare import compare
from experiments.commands.bench.score import score
from model import init, presets
from model.errors import InputError

TINY = presets.get("tiny")


def test_contenders_score_alike_and_ratios_are_of_rounds(tmp_path, capsys):
    file = tmp_path / "score.json"
    score("tiny", prefix=(40,), continuations=3, contexts=2, batch_size=4, rounds=2, json=file)
    assert "40 + 4" in capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["schema_version"] == 1
    (row,) = document["lengths"]
    assert (row["prefix"], row["continuation"], row["requests"]) == (40, 4, 6)
    assert row["largest_difference"] < 1e-3
    for name, own, other in (
        ("shared_over_unshared", "shared", "unshared"),
        ("unshared_over_apply", "unshared", "apply"),
    ):
        ratios = [theirs / ours for ours, theirs in zip(row["samples"][own], row["samples"][other], strict=True)]
        assert row[name] == pytest.approx(statistics.median(ratios))
        assert (row[f"{name}_lowest"], row[f"{name}_highest"]) == (min(ratios), max(ratios))
    with pytest.raises(InputError, match="not a document of"):
        compare(file, file)


def test_a_pass_with_too_many_logits_is_left_out(monkeypatch):
    monkeypatch.setattr("experiments.bench.score.MOST_LOGITS", 4 * 40 * 64)
    params = init(TINY, jax.random.key(0))
    (row,) = bench_score(TINY, params, prefixes=(40,), continuations=3, contexts=2, batch_size=4, rounds=1)
    assert set(row["samples"]) == {"shared", "unshared"}
    assert "unshared_over_apply" not in row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 0}, "rounds=0 must be a whole number of at least 1"),
        ({"prefixes": (40, 0)}, "prefix=0 must be a whole number of at least 1"),
        ({"continuation": 0}, "continuation=0 must be a whole number of at least 1"),
        (
            {"prefixes": (60,)},
            "a prefix of 60 tokens and 6 more, .* do not fit max_seq_len=64; give",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        bench_score(TINY, {}, **{"prefixes": (40,), **options})
    with pytest.raises(InputError, match="decoder language models"):
        bench_score(TINY.replace(head="scalar"), {}, prefixes=(40,))
