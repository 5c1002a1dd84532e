"""Two processes train one run together, die together, and go on as though they had never stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from model import presets
from train import HParams, Shell, TrainConfig, train
from train.data import load_manifest
from train.run.metrics import TIMING_FIELDS, read_metrics

pytestmark = pytest.mark.slow

CODE = "import sys; sys.argv[0] = 'isoflop'; from experiments.cli import main; main()"
STEPS = 24
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
DEADLINE = 120


def command(data, run, *options):
    arguments = f"train tiny --data {data} --out {run} --steps {STEPS} --batch-size 4 --seq-len 32"
    arguments += " --checkpoint-every 4 --evaluate-every 6 --evaluate-tokens 512 --set num_layers=1"
    return [sys.executable, "-c", CODE, *arguments.split(), *options]


class Pair:
    """Both processes, in a folder each for what they print."""

    def __init__(self, data, run, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"process-{number}.log" for number in range(2)]
        common = ["--mesh", "data=2", "--coordinator", coordinator, "--num-processes", "2", "--process-id"]
        self.processes = [
            subprocess.Popen(
                command(data, run, *common, str(number)), env=ENVIRONMENT, stdout=log.open("w"), stderr=log.open("a")
            )
            for number, log in enumerate(self.logs)
        ]

    def wait(self):
        """Both exit codes."""
        try:
            return [process.wait(DEADLINE) for process in self.processes]
        finally:
            self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, run, steps):
        """Until so many lines are written."""
        deadline = time.monotonic() + DEADLINE
        while len(read_metrics(run)) < steps:
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.002)

    def said(self):
        return "\n".join(log.read_text() for log in self.logs)


def train_alone(data, run):
    """By one process with one device, as `command` says."""
    config = presets.get("tiny").replace(vocab_size=320, num_layers=1, eos_token_ids=(load_manifest(data).eos_id,))
    shell = Shell(evaluate_every=6, evaluate_tokens=512)
    train_config = TrainConfig(batch_size=4, seq_len=32)
    hparams = HParams(warmup_steps=1)
    train(config, train_config, hparams, data=data, run=run, steps=STEPS, shell=shell)


@pytest.fixture
def alone(data, tmp_path):
    """What one process records."""
    train_alone(data, tmp_path / "alone")
    return read_metrics(tmp_path / "alone")


def check_record(run, alone):
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, wanted in zip(lines, alone, strict=True):
        assert line.keys() == wanted.keys()
        for name in line.keys() - set(TIMING_FIELDS):
            np.testing.assert_allclose(line[name], wanted[name], rtol=1e-4 if "norm" in name else 1e-5, err_msg=name)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["step"], record["device"]["count"]) == ("finished", STEPS, 2)


@pytest.mark.long
def test_two_processes_are_one_run(data, alone, tmp_path):
    """Killed together, then stopped by a word to the second one, which writes nothing: both save the same step.

    What they have saved, one process finishes.
    """
    run = tmp_path / "run"
    pair = Pair(data, run, tmp_path)
    try:
        pair.until(run, 6)
    finally:
        pair.kill()
    assert json.loads((run / "run.json").read_text())["status"] == "running"

    pair = Pair(data, run, tmp_path)
    try:
        pair.until(run, 10)
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [130, 130], pair.said()
    finally:
        pair.kill()
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert 10 <= record["step"] < STEPS
    assert len(read_metrics(run)) == record["step"]
    assert (run / "checkpoints" / str(record["step"])).is_dir()

    train_alone(data, run)
    check_record(run, alone)
    assert len(list((run / "tensorboard").iterdir())) <= 3, "each time one process wrote, and nobody else"
