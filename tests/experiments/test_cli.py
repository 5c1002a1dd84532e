"""Every wrong call is one clear sentence on stderr and exit code 2, with nothing half-written."""

import errno
import json
import subprocess
import sys

import pytest

from experiments import cli
from train.checksums import CHECKSUMS, checksums
from train.files import write_json


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    code, _, error = outcome
    assert code == 2, error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error
    for word in words:
        assert word in error


TRAIN = ("--steps", 2, "--batch-size", 2, "--seq-len", 16, "--evaluate-tokens", 64)


def test_help_at_every_level(isoflop):
    def visit(tree, path=()):
        for name, entry in tree.items():
            code, out, _ = isoflop(*path, name, "--help")
            assert code == 0
            assert "usage: isoflop" in out
            if isinstance(entry, tuple):
                visit(entry[1], (*path, name))
            else:
                assert "Example: isoflop" in out
                assert "Args:" not in out, "an argument that the docstring names is not one of the function's"

    visit(cli.COMMANDS)


def test_unknown_preset_names_the_close_ones(isoflop, data, tmp_path):
    refused(isoflop("train", "study-33", "--data", data, "--out", tmp_path / "run", *TRAIN), "study-33", "study-32")
    assert not (tmp_path / "run").exists()


def test_contradictory_config_names_the_field(isoflop, data, tmp_path):
    call = ("train", "tiny", "--data", data, "--out", tmp_path / "run", *TRAIN, "--set", "num_heads=3")
    refused(isoflop(*call), "num_heads=3", "d_model=16")
    call = ("train", "tiny", "--data", data, "--out", tmp_path / "run", *TRAIN, "--set", "num_heds=2")
    refused(isoflop(*call), "num_heds", "num_heads")
    call = ("train", "tiny", "--data", data, "--out", tmp_path / "run", *TRAIN, "--set", "learning_rate=fast")
    refused(isoflop(*call), "learning_rate", "fast")
    assert not (tmp_path / "run").exists()


def test_sequence_longer_than_the_context(isoflop, data, tmp_path):
    call = ("train", "tiny", "--data", data, "--out", tmp_path / "run", "--steps", 2, "--seq-len", 65)
    refused(isoflop(*call), "seq_len=65", "max_seq_len=64")


def test_run_made_with_another_config(isoflop, data, tmp_path):
    call = ("train", "tiny", "--data", data, "--out", tmp_path / "run", *TRAIN)
    assert isoflop(*call)[0] == 0
    refused(isoflop(*call, "--seed", 5), "seed=0 there, 5 here")
    make_older(tmp_path / "run" / "checkpoints" / "2")
    refused(isoflop("generate", tmp_path / "run", "--prompt", "x"), "checkpoints/2 is of another version", "there")


def make_older(checkpoint):
    """As earlier versions wrote it: nothing says what it holds, and the state has another name."""
    (checkpoint / "state").rename(checkpoint / "default")
    (checkpoint / "checkpoint.json").unlink()
    write_json(checkpoint / CHECKSUMS, checksums(checkpoint))


def test_bad_corpora(isoflop, corpus, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    refused(isoflop("data", "prepare", empty, "--out", out), str(empty))
    refused(isoflop("data", "prepare", tmp_path / "nowhere", "--out", out), "nowhere")
    (empty / "a.txt").write_text("A short text. " * 20)
    (empty / "b.txt").write_text("Another one. " * 20)
    refused(isoflop("data", "prepare", empty, "--out", out, "--validation-fraction", 0.5, "--vocab-size", 9000))
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_bytes_that_are_not_utf8_are_counted(isoflop, corpus, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes() + b"\xff\xfe")
    code, out, _ = isoflop(
        "data", "prepare", folder, "--out", tmp_path / "out", "--vocab-size", 320, "--validation-fraction", 0.2
    )
    assert code == 0
    assert "24 bytes that are no UTF-8 were replaced" in out


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "/x"), RuntimeError("write: No space left on device")]
)
def test_full_disk(isoflop, monkeypatch, error, tmp_path):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("train.data.prepare", full)
    refused(isoflop("data", "prepare", "--out", tmp_path / "out"), "no space left on the disk")


def test_ctrl_c(isoflop, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.data.prepare", stop)
    code, _, error = isoflop("data", "prepare", "--out", tmp_path / "out")
    assert code == 130
    assert "goes on from there" in error


def test_a_bug_is_not_dressed_up_as_bad_input(isoflop, monkeypatch, tmp_path):
    def bug(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr("train.data.prepare", bug)
    with pytest.raises(ValueError, match="a bug"):
        isoflop("data", "prepare", "--out", tmp_path / "out")


@pytest.mark.slow
def test_life_of_a_model(isoflop, data, tmp_path):
    """train → eval → generate → bench, each with its numbers as JSON."""
    out = tmp_path / "run"
    call = ("train", "tiny", "--data", data, "--out", out, "--steps", 30, "--batch-size", 4, "--seq-len", 32)
    assert isoflop(*call, "--json", tmp_path / "train.json")[0] == 0
    trained = json.loads((tmp_path / "train.json").read_text())
    code, text, _ = isoflop("eval", out, "--data", data, "--seq-len", 32, "--json", tmp_path / "eval.json")
    assert code == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert "bits per byte" in text
    assert evaluated["tokens"] > 1000
    assert evaluated["loss"] == pytest.approx(trained["validation_loss"], rel=0.05)  # not the same share of the split
    prompts = ("--prompt", "The people of", "We")
    code, text, _ = isoflop("generate", out, *prompts, "--max-new-tokens", 8, "--json", tmp_path / "text.json")
    assert code == 0
    assert "The people of" in text
    assert len(json.loads((tmp_path / "text.json").read_text())["completions"]) == 2
    grid = ("--batch", 1, 2, "--context", 8, "--steps", 4, "--repeats", 2)
    assert isoflop("bench", "decode", out, *grid, "--json", tmp_path / "bench.json")[0] == 0
    cells = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert [(cell["batch"], cell["context"]) for cell in cells] == [(1, 8), (2, 8)]
    assert all(cell["recompiles"] == 0 and cell["decode_tokens_per_second_aggregate"] > 0 for cell in cells)
    refused(isoflop("bench", "decode", out, "--context", 64), "max_seq_len=64")
    refused(isoflop("generate", tmp_path, "--prompt", "x"), "is no model")


def test_models_are_shown(isoflop, tmp_path):
    code, out, _ = isoflop("model", "show", "gpt2-small", "--json", tmp_path / "model.json")
    assert code == 0
    assert "124,439,808" in out
    assert json.loads((tmp_path / "model.json").read_text())["parameters"]["total"] == 124_439_808
    code, out, _ = isoflop("model", "list")
    assert "gpt2-small" in out


def test_importing_the_floors_pulls_in_nothing_heavy():
    heavy = {"matplotlib", "tyro", "sentencepiece", "pandas", "torch", "optuna", "grain", "train"}
    code = f"import sys, model, infer; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
