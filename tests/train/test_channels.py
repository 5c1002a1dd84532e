"""TensorBoard, Weights & Biases and what is said on stderr: none of them can stop or hold up a run."""

import errno
import gc
import io
import json
import os
import struct
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from model import ModelConfig
from train import HParams, Shell, TrainConfig, channels, train
from train.channels import Channel, TensorBoard
from train.progress import Patient, patient, progress_bar, say
from train.run import read_record
from train.run.metrics import read_metrics

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=16, rope_base=9_004.0)
TRAIN = TrainConfig(batch_size=4, seq_len=16, norms=False)
STEPS = 6


@pytest.fixture
def go(data, tmp_path):
    """Train, in a folder of that name; the run's folder."""

    def start(name="run", **shell):
        shell = Shell(evaluate_every=2, evaluate_tokens=64, **shell)
        result = train(CONFIG, TRAIN, HParams(), data=data, run=tmp_path / name, steps=STEPS, shell=shell)
        assert result.status == "finished"
        assert [line["step"] for line in read_metrics(tmp_path / name)] == list(range(1, STEPS + 1))
        return tmp_path / name

    return start


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(channels, "CLOSE_SECONDS", 0.1)


def only_warning(caplog):
    (record,) = caplog.records
    return record.getMessage()


def events(folder):
    """What TensorBoard reads: records of a length, the events, and the checksums of both."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            length, body = content[:8], content[12 : 12 + size]
            assert content[8:12] == struct.pack("<I", masked_crc32c(length))
            assert content[12 + size : 16 + size] == struct.pack("<I", masked_crc32c(body))
            found.append(Event.FromString(body))
            content = content[16 + size :]
    return found


def test_tensorboard_gets_the_numbers_of_the_record(go, caplog):
    run = go()
    first, start, *steps = events(run)
    assert (first.file_version, start.session_log.status, start.step) == ("brain.Event:2", 1, 1)
    lines = {line["step"]: line for line in read_metrics(run)}
    assert [event.step for event in steps] == sorted(lines)
    for event in steps:
        told = {value.tag: value.simple_value for value in event.summary.value}
        wanted = {name: value for name, value in lines[event.step].items() if name != "step"}
        assert told == pytest.approx(wanted, rel=1e-6)
    assert not caplog.records


@pytest.mark.parametrize("moment", ["open", "write", "close"])
def test_a_tensorboard_that_raises_is_dropped(go, caplog, monkeypatch, moment):
    """Such as for a clock that jumps, a full disk, a file where its folder should be."""

    def fail(*_, **__):
        raise OverflowError("the clock has jumped")

    monkeypatch.setattr(TensorBoard, {"open": "__init__"}.get(moment, moment), fail)
    go()
    assert "TensorBoard gets no more of this run (OverflowError: the clock has jumped)" in only_warning(caplog)


def test_a_clock_that_jumps_ends_nothing(go, caplog, monkeypatch):
    times = iter([1.7e9, -5.0, 4e18, float("nan"), 0.0, 1e300])
    monkeypatch.setattr(channels.time, "time", lambda: next(times, 3.0))
    assert [event.step for event in events(go())] == [1, 1, *range(1, STEPS + 1)]
    assert not caplog.records


class Service:
    """In place of the library: notes what it gets; raises or hangs at one moment."""

    def __init__(self, moment=None, act=None):
        self.opened, self.logged, self._moment, self._act = [], [], moment, act

    def _reach(self, moment):
        if moment == self._moment:
            self._act()

    def init(self, **options):
        self.opened.append(options)
        self._reach("init")
        return SimpleNamespace(log=self.log, finish=lambda: self._reach("finish"))

    def log(self, numbers, step):
        self._reach("log")
        self.logged.append(step)


def fail():
    raise ConnectionError("no network")


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_service_that_raises_or_hangs_is_dropped(go, caplog, monkeypatch, impatient, moment, hangs):
    release = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", Service(moment, release.wait if hangs else fail))
    go(wandb="a project")
    release.set()
    reason = "it has not finished within" if hangs else r"ConnectionError: no network"
    assert f"Weights & Biases gets no more of this run ({reason}" in only_warning(caplog)


def test_a_queue_that_fills_drops_its_channel(caplog, monkeypatch):
    monkeypatch.setattr(channels, "_WAITING", 3)
    release, begin = threading.Event(), time.monotonic()
    channel = Channel("the channel", lambda: SimpleNamespace(write=lambda *_: release.wait(), close=lambda: None))
    for step in range(100):
        channel.write(step, {})
    channel.close()
    assert time.monotonic() - begin < 5
    assert "the channel gets no more of this run (it has taken nothing for 3 steps)" in only_warning(caplog)
    release.set()


def test_the_id_at_a_service_is_of_the_folder(go, data, tmp_path, monkeypatch):
    """Two folders of one recipe are two runs there; a folder that goes on is one; an old one keeps the hash it had."""
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    runs = [go("one", wandb="p"), go("two", wandb="p")]
    records = [read_record(run) for run in runs]
    assert records[0]["run_id"] == records[1]["run_id"]
    content = json.loads((runs[0] / "run.json").read_text())
    (runs[0] / "run.json").write_text(json.dumps(content | {"status": "interrupted"}))
    go("one", wandb="p")  # finished but for the note that it is
    old = {name: value for name, value in content.items() if name not in ("wandb_id", "checksum", "metrics")}
    (runs[1] / "run.json").write_text(json.dumps(old | {"status": "interrupted"}))
    go("two", wandb="p")
    channels.WandB("p", runs[0])
    channels.WandB("p", runs[1])
    one, two, again, before = (options["id"] for options in service.opened)
    assert (one, two) == (records[0]["wandb_id"], records[1]["wandb_id"])
    assert len({one, two, records[0]["run_id"]}) == 3
    assert (again, before) == (one, records[1]["run_id"])


def test_a_stderr_that_is_closed_or_unread_holds_up_nothing(monkeypatch, caplog):
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("work", 3) as advance:
            for _ in range(300):
                say("x" * 5000)  # far more than a pipe holds, and no one reads
                advance()
        assert patient(patient(stream))._stream is stream
        os.close(reader)
        say("to a closed pipe")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    say("to a closed file")
    monkeypatch.setattr(sys, "stderr", None)
    say("to none at all")
    text = io.StringIO()
    Patient(text).write("x" * 2500)
    assert text.getvalue() == "x" * 2500


def test_a_disk_that_fills_while_logs_are_written(data, tmp_path, monkeypatch, record):
    """The status is noted in the room that there is, nothing is left to raise later, and the run goes on to the bit."""
    from train.run import folder, metrics

    late = []
    monkeypatch.setattr(sys, "unraisablehook", late.append)
    lines, plain, write = [], metrics.write_all, folder.write_sealed

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")

    def write_all(file, content):
        lines.append(content)
        if len(lines) == 4:
            plain(file, content[:40])
            monkeypatch.setattr(folder, "write_sealed", full)
            full()
        plain(file, content)

    go = lambda name: train(CONFIG, TRAIN, HParams(), data=data, run=tmp_path / name, steps=STEPS)
    monkeypatch.setattr(metrics, "write_all", write_all)
    with pytest.raises(OSError, match="No space left on device"):
        go("run")
    gc.collect()
    assert not late
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert read_record(tmp_path / "run")["status"] == "failed"
    monkeypatch.setattr(metrics, "write_all", plain)
    monkeypatch.setattr(folder, "write_sealed", write)
    assert go("run").status == go("whole").status == "finished"
    assert record(tmp_path / "run") == record(tmp_path / "whole")
