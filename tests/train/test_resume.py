"""A run that was killed and resumed is, to the bit, the run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.run.checkpoint import CHECKSUMS
from train.run.metrics import read_metrics

STEPS = 120
CODE = "import sys; sys.argv[0] = 'isoflop'; from experiments.cli import main; main()"


def command(data: Path, run: Path, checkpoint_every: int = 10) -> list[str]:
    arguments = f"train tiny --data {data} --out {run} --steps {STEPS} --batch-size 4 --seq-len 32".split()
    options = ["--checkpoint-every", str(checkpoint_every), "--evaluate-every", "40", "--evaluate-tokens", "512"]
    return [sys.executable, "-c", CODE, *arguments, *options]


ENVIRONMENT = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}  # as users compile


def kill_after(
    data: Path,
    run: Path,
    steps: int,
    number: int = signal.SIGKILL,
    checkpoint_every: int = 10,
    while_writing: bool = False,
    delay: float = 0.0,
) -> int:
    """Start the run, kill it when it has written so many lines; its exit code.

    while_writing: and then has begun with a checkpoint. delay: seconds that it gets after that.
    """
    process = subprocess.Popen(
        command(data, run, checkpoint_every), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 240
    is_time = lambda: not while_writing or any((run / "checkpoints").glob(".*.writing"))
    while process.poll() is None and (len(read_metrics(run)) < steps or not is_time()):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.0005 if while_writing else 0.002)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait()


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("resume") / "whole"
    subprocess.run(command(data, run), check=True, capture_output=True, env=ENVIRONMENT)
    return run


@pytest.fixture
def finish_and_compare(data, uninterrupted, record):
    """run → as it is after one more call: the one that was not interrupted. What that call said."""

    def finish(run):
        done = subprocess.run(command(data, run), capture_output=True, env=ENVIRONMENT, text=True)
        assert done.returncode == 0, done.stderr
        assert record(run) == record(uninterrupted)
        assert [line["step"] for line in record(run)] == list(range(1, STEPS + 1))
        assert json.loads((run / "run.json").read_text())["status"] == "finished"
        return done.stderr

    return finish


@pytest.mark.long
def test_kills_at_two_moments(data, finish_and_compare, tmp_path):
    run = tmp_path / "run"
    for steps in (7, 63):
        kill_after(data, run, steps)
    finish_and_compare(run)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments(data, finish_and_compare, tmp_path, seed):
    """Twenty in four runs; every other one while a checkpoint is being written."""
    run, draw = tmp_path / "run", random.Random(seed)
    half_written = 0
    for number, steps in enumerate(sorted(draw.sample(range(1, STEPS - 15), 5))):
        while_writing = (number + seed) % 2 == 0
        kill_after(data, run, steps, checkpoint_every=5, while_writing=while_writing, delay=0.02 * draw.random())
        half_written += any((run / "checkpoints").glob(".*.writing"))
    assert half_written > 0
    finish_and_compare(run)


@pytest.mark.long
def test_sigterm_saves_and_resumes(data, finish_and_compare, tmp_path):
    run = tmp_path / "run"
    assert kill_after(data, run, 25, signal.SIGTERM) == 130
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    finish_and_compare(run)


@pytest.mark.long  # of every file: test_checkpoint.py
def test_a_flipped_bit_costs_one_checkpoint(data, finish_and_compare, tmp_path):
    """Orbax alone would restore a flipped bit without a word."""
    run = tmp_path / "run"
    kill_after(data, run, 75)
    whole = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit() and (path / CHECKSUMS).exists()]
    newest = max(whole, key=lambda path: int(path.name))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    said = finish_and_compare(run)
    assert f"checkpoint {newest.absolute()} is not used" in said
    assert "checksum differs" in said
    assert (run / "damaged" / newest.name).is_dir()
