"""`isoflop bench evaluate`: requests are read and given shots, and what is missing or wrong is named."""

import gzip
import json
import os
import shutil
import sys

import pytest

from experiments.bench.evaluate import bench_evaluate, draw_shots, read_requests
from experiments.bench.peers.child import python_has
from model import ModelConfig
from model.errors import InputError
from model.store import open_model

QUESTIONS = ["The people of", "Peace with", "Every nation"]
CHOICES = ["the states", "all", "war and peace"]


@pytest.fixture
def file(tmp_path):
    """Three documents of three choices after one shot each, and their copies without the questions."""
    rows = []
    for number, question in [*enumerate(QUESTIONS), (1_000_000, "Answer:")]:
        doc = {"query": question, "choices": CHOICES, "gold": number % 3}
        for choice in CHOICES:
            asked = {"context": f"We the people\n\n{question}", "continuation": f" {choice}"}
            rows.append({"request_type": "loglikelihood", "doc_id": number, "doc": doc, "request": asked})
    file = tmp_path / "requests.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return file


def test_requests_are_read_and_shots_drawn_for_each_document(file):
    assert [one.document for one in read_requests(file)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    two = read_requests(file, 2)
    assert two == read_requests(file)[:6]
    drawn = draw_shots(two, read_requests(file), 1, seed=0)
    last = "Every nation war and peace"
    shots = {0: {"Peace with all", last}, 1: {"The people of the states", last}}
    for before, after in zip(two, drawn, strict=True):
        shot, question = after.context.split("\n\n")
        assert shot in shots[after.document]
        assert (question, after.continuation) == (before.question, before.continuation)
    assert len({one.context for one in drawn}) == 2, "all requests of a document have the same shots"
    with pytest.raises(InputError, match="3 shots cannot be drawn from 2 other questions; lower --draw-shots"):
        draw_shots(two, read_requests(file), 3, seed=0)


def test_what_is_missing_or_wrong_is_named(file, tmp_path, monkeypatch):
    (tmp_path / "other.jsonl").write_text('{"text": "no request"}\n')
    with pytest.raises(InputError, match="is not a file of OLMES requests"):
        read_requests(tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="is not a file of OLMES requests"):
        read_requests(tmp_path / "absent.jsonl")
    monkeypatch.setenv("ISOFLOP_TORCH_PYTHON", "/nowhere/python")
    config = ModelConfig(vocab_size=32, d_model=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match=r"has no lm_eval: install isoflop\[peers\]"):
        bench_evaluate(config, {}, None, [file])


@pytest.mark.long
def test_both_answer_alike(file, llama_folder, tmp_path):
    python = os.environ.get("ISOFLOP_TORCH_PYTHON") or sys.executable
    for module in ("lm_eval", "torch", "transformers"):
        if not python_has(python, module):
            pytest.skip(f"{python} has no {module}")
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))  # no begin token is added
    opened = open_model(folder)
    result = bench_evaluate(*opened, [file], rounds=2, their_batch_sizes=(1, 2))
    (task,) = result.tasks
    assert (task.documents, task.requests, task.compiles >= 1) == (3, 9, True)
    assert task.largest_difference < 1e-3
    assert set(task.trial_seconds) == {"1", "2"}
    assert [row.name for row in task.contenders] == ["isoflop", "lm-eval"]
    own, theirs = (row.samples["seconds"] for row in task.contenders)
    assert sorted(other / mine for mine, other in zip(own, theirs, strict=True))[0] == pytest.approx(
        task.ratios["isoflop_over_lm_eval_lowest"]
    )
