"""`open_model` opens every kind of model, reads only what it needs, and changes nothing."""

import ctypes
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import model.checkpoint
from experiments.models import need_tokenizer
from model import InputError, ModelConfig
from model.convert import load_hf
from model.quantized import save_quantized
from model.records import CHECKSUMS, checksums, json_text
from model.store import open_model
from train import HParams, Shell, TrainConfig, init_state, load_run, train
from train.run.checkpoint import Checkpoints

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=16, max_seq_len=32, rope_base=9_400.0)
TRAIN = TrainConfig(batch_size=2, seq_len=16, schedule="constant", norms=False)
LLAMA = Path(__file__).parents[1] / "fixtures" / "hf" / "llama"


def go(data, run, steps):
    shell = Shell(evaluate_tokens=32, checkpoint_every=1)
    return train(CONFIG, TRAIN, HParams(), data=data, run=run, steps=steps, shell=shell)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run with the checkpoints 1 and 2, and the whole state of both."""
    run = tmp_path_factory.mktemp("store") / "run"
    go(data, run, 2)
    like = jax.eval_shape(lambda: init_state(CONFIG, TRAIN, HParams()))
    checkpoints = Checkpoints(run, read_only=True)
    return run, {step: checkpoints.restore(step, like) for step in (1, 2)}


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(one, jax.Array)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def rewrite(checkpoint):
    """Seal a checkpoint again after it was changed."""
    (checkpoint / CHECKSUMS).write_text(json_text(checksums(checkpoint)))


def make_former(run, states):
    """The run as earlier versions left it: one item of Orbax holds the whole state."""
    for step, state in states.items():
        checkpoint = run / "checkpoints" / str(step)
        for item in ("params", "state"):
            shutil.rmtree(checkpoint / item)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(checkpoint / "state", state)
        rewrite(checkpoint)


class Opened:
    """Names of the files below a folder that any code of this process opens, by inotify."""

    def __init__(self, folder):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._queue = self._libc.inotify_init1(os.O_NONBLOCK)
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        opens = 0x20
        self._watched = {self._libc.inotify_add_watch(self._queue, os.fsencode(path), opens): path for path in folders}
        self.folder = folder

    def names(self):
        found, content, place = set(), os.read(self._queue, 2**20), 0
        os.close(self._queue)
        while place < len(content):
            watch, mask, _, length = struct.unpack_from("iIII", content, place)
            name = content[place + 16 : place + 16 + length].rstrip(b"\0").decode()
            if not mask & 0x40000000:  # a folder that is listed
                found.add(str((self._watched[watch] / name).relative_to(self.folder)))
            place += 16 + length
        return found


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_no_file_of_the_optimizer_is_opened(run, trained):
    opened = Opened(run / "checkpoints")
    params = open_model(run).params
    names = opened.names()
    assert_same(params, trained[1][2].params)
    assert {"2/checkpoint.json", "2/checksums.json", "2/params/manifest.ocdbt"} <= names
    assert not [name for name in names if not name.startswith(("2/checkpoint.json", "2/checksums.json", "2/params/"))]


@pytest.mark.parametrize("damage", ["garbled", "gone"])
def test_parameters_are_read_where_the_optimizer_is_lost_and_training_refuses_them(run, trained, data, damage, caplog):
    newest = run / "checkpoints" / "2"
    if damage == "gone":
        shutil.rmtree(newest / "state")
    else:
        for path in (newest / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"garbled")
    for params in (open_model(run).params, load_run(run)[1]):
        assert_same(params, trained[1][2].params)
    assert not caplog.records
    assert go(data, run, 3).steps == 3
    assert "checkpoints/2 is not used" in caplog.text
    assert (run / "damaged" / "2").is_dir()


def test_damaged_parameters_are_named_and_those_before_are_used(run, trained, caplog):
    newest = run / "checkpoints" / "2"
    file = max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = sorted(run.rglob("*"))
    with caplog.at_level(logging.WARNING, "isoflop"):
        assert_same(open_model(run).params, trained[1][1].params)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        f"checkpoint {newest} is not used: its file {file.relative_to(newest)} is damaged (checksum differs)"
    )
    assert sorted(run.rglob("*")) == before
    shutil.rmtree(run / "checkpoints" / "1")
    with pytest.raises(InputError, match=f"{run} has no intact checkpoint; train it first"):
        open_model(run)


def test_checkpoints_of_former_versions_open_and_resume(run, trained, data, caplog):
    make_former(run, trained[1])
    assert_same(open_model(run).params, trained[1][2].params)
    state = max((run / "checkpoints" / "2" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = state.read_bytes()
    state.write_bytes(content[:-1] + b"?")
    assert_same(open_model(run).params, trained[1][1].params)
    assert "checkpoints/2 is not used" in caplog.text
    state.write_bytes(content)
    caplog.clear()
    assert go(data, run, 3).steps == 3
    assert not caplog.records
    assert (run / "checkpoints" / "3" / "params").is_dir()


def test_a_checkpoint_that_is_replaced_while_it_is_read_costs_nothing(run, trained, monkeypatch):
    """The process that trains a run removes its older checkpoints at any moment."""
    read = model.checkpoint._restore_params

    def replaced(path, like):
        if path.name == "2":
            path.rename(path.with_name("3"))
        return read(path, like)

    monkeypatch.setattr(model.checkpoint, "_restore_params", replaced)
    assert_same(open_model(run).params, trained[1][2].params)


def test_parameters_of_another_shape_are_refused(run):
    about = run / "checkpoints" / "2" / "checkpoint.json"
    content = json.loads(about.read_text())
    content["leaves"]["params/embedding/tokens"] = "float32[100,16]"
    about.write_text(json_text(content))
    rewrite(about.parent)
    with pytest.raises(
        InputError,
        match=r"checkpoints/2 .*params/embedding/tokens is float32\[100,16\] there and float32\[320,16\] here",
    ):
        open_model(run)


def test_settings_of_jax_change_nothing(run, trained):
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow"):
        params = open_model(run).params
    assert_same(params, trained[1][2].params)


def test_a_tokenizer_is_found_given_or_none(run, data, tmp_path):
    assert open_model(run).tokenizer.vocab_size == 320
    shutil.copytree(LLAMA, tmp_path / "hf")
    assert open_model(tmp_path / "hf").tokenizer is None
    assert open_model(tmp_path / "hf", data).tokenizer.vocab_size == 320
    shutil.copy(data / "tokenizer.model", tmp_path / "hf")
    assert open_model(tmp_path / "hf").tokenizer.vocab_size == 320
    record = json.loads((run / "run.json").read_text())
    del record["checksum"]
    (run / "run.json").write_text(json.dumps(record | {"data": "/gone/data", "data_beside": None}))
    config, _, tokenizer = open_model(run)
    assert (config, tokenizer) == (CONFIG, None)
    with pytest.raises(InputError, match=f"the data folder of {run}, /gone/data, is gone; .* with --tokenizer"):
        need_tokenizer(tokenizer, run)
    with pytest.raises(InputError, match=f"{LLAMA} has no tokenizer; give one with --tokenizer"):
        need_tokenizer(None, LLAMA)
    assert open_model(run, data).tokenizer.vocab_size == 320


def test_folders_open_as_their_own_readers_do(tmp_path):
    config, params, _ = open_model(LLAMA)
    wanted = load_hf(LLAMA)
    assert config == wanted[0]
    assert_same(params, wanted[1])
    save_quantized(config, params, tmp_path / "small", "int8")
    opened = open_model(tmp_path / "small")
    assert (opened.config, opened.tokenizer) == (config, None)
    assert_same(opened.params, params)


def test_what_is_no_model_is_said_in_a_sentence(tmp_path, run):
    with pytest.raises(InputError, match=f"there is no model at {tmp_path}/nowhere; give a run directory, a Hugging"):
        open_model(tmp_path / "nowhere")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    for path in (tmp_path / "texts", tmp_path / "texts" / "a.txt"):
        with pytest.raises(InputError, match=r"is not a model: give a run directory \(run.json\)"):
            open_model(path)
    (run / "run.json").write_text((run / "run.json").read_text().replace('"d_model": 16', '"d_model": 18'))
    with pytest.raises(InputError, match=r"run\.json is not what was written"):
        open_model(run)


@pytest.mark.slow
def test_few_modules_are_passed_and_none_of_training_or_decoding(trained):
    code = f"""
import sys
from model.store import open_model
ours = lambda: [name for name in sys.modules if name.split(".")[0] in ("model", "infer", "train", "experiments")]
print(len(ours()), "orbax" in sys.modules)
assert open_model({str(trained[0])!r}).tokenizer is not None
print(len(ours()), [name for name in ours() if not name.startswith("model")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, opened = done.stdout.splitlines()
    assert int(imported.split()[0]) <= 10
    assert imported.endswith("False")
    assert int(opened.split()[0]) <= 44
    assert opened.endswith("[]")
