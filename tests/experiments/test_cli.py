"""Every wrong call is one clear sentence on stderr and exit code 2, with nothing half-written."""

import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from experiments import cli
from experiments.commands import doctor
from train.checksums import CHECKSUMS, checksums
from train.files import write_json


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    code, _, error = outcome
    assert code == 2, error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error
    for word in words:
        assert word in error


SWEEP = ("--steps", 2, "--batch-size", 2, "--seq-len", 32)
TRAIN = ("--steps", 8, "--batch-size", 4, "--seq-len", 32, "--evaluate-tokens", 8192)


@pytest.fixture(scope="module")
def trained(isoflop, data, tmp_path_factory):
    """A run, the call that made it, and what it wrote with --json."""
    folder = tmp_path_factory.mktemp("trained")
    call = ("train", "tiny", "--data", data, "--out", folder / "run", *TRAIN)
    code, _, error = isoflop(*call, "--json", folder / "train.json")
    assert code == 0, error
    return folder / "run", call, json.loads((folder / "train.json").read_text())


def test_help_at_every_level(isoflop):
    code, out, _ = isoflop("--help")
    assert code == 0
    assert "Example" not in out, "the list of commands has a sentence of each"

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


def test_run_made_with_another_config(isoflop, trained, tmp_path):
    run, call, _ = trained
    refused(isoflop(*call, "--seed", 5), "seed=0 there, 5 here")
    shutil.copytree(run, tmp_path / "run")
    make_older(tmp_path / "run" / "checkpoints" / "8")
    refused(isoflop("generate", tmp_path / "run", "--prompt", "x"), "checkpoints/8 is of another version", "there")


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
    assert "24 bytes that are not valid UTF-8 were replaced" in out


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "/x"), RuntimeError("write: No space left on device")]
)
def test_full_disk(isoflop, monkeypatch, error, tmp_path):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("train.data.prepare", full)
    code, _, said = isoflop("data", "prepare", "--out", tmp_path / "out")
    assert (code, said.count("\n")) == (1, 1)
    assert "no space left on the disk" in said


def test_what_cannot_be_written_is_one_sentence(isoflop, data, tmp_path):
    """A path below a file, and file systems that take no folders, whoever asks."""
    file = tmp_path / "file"
    file.write_text("mine")
    train = ("train", "tiny", "--data", data, *TRAIN)
    for place in (file / "x", "/proc/x", "/sys/x"):
        for call in (train, ("data", "prepare", "sotu"), ("sweep", "run", "tiny", "--data", data, *SWEEP)):
            refused(isoflop(*call, "--out", place), str(place))
    refused(isoflop(*train, "--out", file / "x"), "Not a directory", "choose one made of folders")
    # What is written at the end is looked at before the work begins.
    for option, place, reason in (("--json", file / "x.json", "Not a directory"), ("--json", tmp_path, "a folder")):
        refused(isoflop(*train, "--out", tmp_path / "run", option, place), str(place), reason)
    assert sorted(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


def test_numbers_that_cannot_be_written_are_printed(isoflop, monkeypatch, tmp_path):
    def refuse(path, _):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("train.files.write_json", refuse)
    code, out, error = isoflop("model", "show", "tiny", "--json", tmp_path / "x.json")
    assert code == 2
    assert "Read-only file system" in error
    assert json.loads(out[out.index('{\n "schema_version"') :])["schema_version"] == 1
    monkeypatch.undo()
    _, out, _ = isoflop("model", "show", "tiny", "--json", "/dev/null")
    assert not (tmp_path / "x.json").exists()


def test_ctrl_c(isoflop, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.data.prepare", stop)
    code, _, error = isoflop("data", "prepare", "--out", tmp_path / "out")
    assert code == 130
    assert "continues from there" in error


def test_a_bug_is_not_dressed_up_as_bad_input(isoflop, monkeypatch, tmp_path):
    def bug(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr("train.data.prepare", bug)
    with pytest.raises(ValueError, match="a bug"):
        isoflop("data", "prepare", "--out", tmp_path / "out")


@pytest.mark.slow
def test_life_of_a_model(isoflop, trained, data, tmp_path):
    """train → eval → generate → convert, each with its numbers as JSON; `bench decode` is test_bench_decode's."""
    run, _, result = trained
    code, text, _ = isoflop("eval", run, "--data", data, "--seq-len", 32, "--json", tmp_path / "eval.json")
    assert code == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert "bits per byte" in text
    assert evaluated["tokens"] > 1000
    assert evaluated["loss"] == pytest.approx(result["validation_loss"], rel=0.05)  # not the same share of the split
    prompts = ("--prompt", "The people of", "We")
    code, text, _ = isoflop("generate", run, *prompts, "--max-new-tokens", 4, "--json", tmp_path / "text.json")
    assert code == 0
    assert "The people of" in text
    assert len(json.loads((tmp_path / "text.json").read_text())["completions"]) == 2
    assert isoflop("model", "convert", run, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert (tmp_path / "half" / "tokenizer.model").is_file()
    with safe_open(tmp_path / "half" / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.offset_keys()} == {"BF16"}
    refused(isoflop("bench", "decode", run, "--context", 64), "max_seq_len=64")
    refused(isoflop("generate", tmp_path, "--prompt", "x"), "is not a model")


def test_models_are_shown(isoflop, tmp_path):
    code, out, _ = isoflop("model", "show", "gpt2-small", "--json", tmp_path / "model.json")
    assert code == 0
    assert "124,439,808" in out
    assert json.loads((tmp_path / "model.json").read_text())["parameters"]["total"] == 124_439_808
    code, out, _ = isoflop("model", "list")
    assert "gpt2-small" in out


def test_help_waits_for_nothing_heavy_and_floors_pull_in_nothing_optional():
    code = """
import sys
from experiments import cli
print(sorted({"jax", "numpy", "model", "rich", "matplotlib"} & set(sys.modules)))
import model, infer
print(sorted({"matplotlib", "sentencepiece", "pandas", "torch", "optuna", "grain", "train"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_the_doctor_tells_what_is_missing_and_what_it_is_for(isoflop, monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setenv("JAX_DEFAULT_PRNG_IMPL", "rbg")  # JAX is imported already: only told
    code, text, _ = isoflop("doctor", "--json", tmp_path / "doctor.json")
    assert code == 0
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["devices"] == {"error": "RuntimeError: no driver"}
    assert "RuntimeError: no driver" in text
    assert found["check"]["right"]
    assert found["settings"] == {"ignored": {"JAX_DEFAULT_PRNG_IMPL": "rbg"}}
    assert "settings: JAX_DEFAULT_PRNG_IMPL=rbg: runs and commands ignore this" in text
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert found["extras"]["test"]["packages"]["pytest"] == pytest.__version__
    assert {name: extra["enables"] for name, extra in found["extras"].items()} == doctor.ENABLES
    for extra in found["extras"].values():
        for package in (name for name, version in extra["packages"].items() if version is None):
            assert re.search(rf"missing .*{package}", text)


def test_a_shell_completes_commands_and_flags(isoflop, tmp_path):
    (tmp_path / "isoflop.bash").write_text(isoflop("completion", "bash")[1])
    ask = 'source isoflop.bash; COMP_WORDS=({words}); COMP_CWORD={place}; _tyro_isoflop; echo "${{COMPREPLY[@]}}"'
    for words, found in (("isoflop sweep re", "replay report resume"), ("isoflop train --keep-b", "--keep-best")):
        call = ["bash", "-c", ask.format(words=words, place=words.count(" "))]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == found.split(), done.stderr


@pytest.mark.parametrize("program", ["sweep plan", "sweep run", "eval", "model compress", "scaling fit"])
def test_a_former_flag_means_what_its_present_name_does(isoflop, program):
    words, renamed = program.split(), cli.FORMER_FLAGS[f"isoflop {program}"]
    _, out, _ = isoflop(*words, "--help")
    shown = re.findall(r"--[\w.-]+", out)
    for former, present in renamed.items():
        assert present in shown
        assert former not in shown
        assert cli.find([*words, "X", former, "7"])[2] == ["X", present, "7"]
        assert cli.find([*words, f"--{former[2:].replace('-', '_')}=7"])[2] == [f"{present}=7"]
    assert cli.find([*words, "X", "--json", "--data"])[2] == ["X", "--json", "--data"]


def test_tokens_that_are_validated_on_have_one_name(isoflop):
    for words in ("train", "cool", "sweep plan", "sweep run", "eval", "model compress"):
        assert "--evaluate-tokens" in isoflop(*words.split(), "--help")[1], words


def test_a_script_of_a_former_release_fits_the_same_law(isoflop, tmp_path):
    rows = [f"{n},{d},{1.7 + 400 * n**-0.34 + 410 * d**-0.28}" for n in (1e7, 3e7, 1e8, 3e8) for d in (1e9, 3e9, 9e9)]
    table = tmp_path / "runs.csv"
    table.write_text("size,seen,final\n" + "\n".join(rows))
    documents = []
    for prefix in ("--", "--columns."):
        flags = (f"{prefix}params", "size", f"{prefix}tokens", "seen", f"{prefix}loss", "final")
        out = tmp_path / f"fit{len(documents)}.json"
        assert isoflop("scaling", "fit", table, *flags, "--bootstraps", 5, "--json", out)[0] == 0
        documents.append(json.loads(out.read_text()))
    assert documents[0]["parametric"] == documents[1]["parametric"]
    assert documents[1]["parametric"]["alpha"] == pytest.approx(0.34, rel=1e-3)
