"""A process that saves as fast as it can, killed at random moments: what is believed afterwards is what was saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import struct

from train.run.checkpoint import Checkpoints

SIZE = 1_250_000  # twice: 20 MB, so that most of the time is spent inside a write


@struct.dataclass
class State:
    """Two items of Orbax: the parameters and the rest."""

    params: Any
    marks: Any
    step: Any


LIKE = State({"noise": np.zeros(SIZE, np.uint64)}, np.zeros(SIZE, np.uint64), np.zeros((), np.int32))


def state_at(step):
    """Every word tells the step; half of them do not compress."""
    noise = np.random.default_rng(0).integers(0, 2**63, SIZE, np.uint64)
    return State({"noise": noise + np.uint64(step)}, np.full(SIZE, step, np.uint64), np.array(step, np.int32))


def save_forever(run):
    checkpoints = Checkpoints(run, keep=2, keep_best=True)
    found = checkpoints.restore_newest(LIKE)
    step = 0 if found is None else found[0]
    print("saving", flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_at(step), score=1 / step)
        print(step, flush=True)


def kill_and_look(run, kills):
    """Kill as often; after each look at what is there."""
    random, newest, environment = np.random.default_rng(7), 0, {**os.environ, "JAX_PLATFORMS": "cpu"}
    inside = 0  # kills that left something half done
    for _ in range(kills):
        command = [sys.executable, __file__, run]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"saving\n"
            begun = [int(child.stdout.readline()) for _ in range(2)]  # the first of them is whole by now
            time.sleep(random.uniform(0, 1))
            child.send_signal(signal.SIGKILL)
            begun += [int(line) for line in child.stdout.read().split()]
        inside += any(path.name.startswith(".") for path in (run / "checkpoints").iterdir())
        checkpoints = Checkpoints(run)
        found = checkpoints.restore_newest(LIKE)
        step, state = (0, None) if found is None else found
        # A save returns when it is copied: the last one begun may be lost, the one before it not.
        assert max(newest, *(line - 1 for line in begun), 0) <= step, (begun, newest)
        if state is not None:
            jax.tree.map(np.testing.assert_array_equal, state, state_at(step))
        assert len(checkpoints.steps()) >= min(step, 2)
        assert checkpoints.steps() == checkpoints.whole_steps()
        assert not [path for path in (run / "checkpoints").glob(".*") if path.name.endswith(("writing", "deleted"))]
        assert not (run / "damaged").exists()
        newest = step
    return newest, inside


@pytest.mark.slow
def test_a_kill(tmp_path):
    assert kill_and_look(tmp_path, 1)[0] > 0


@pytest.mark.long
def test_twenty_kills(tmp_path):
    newest, inside = kill_and_look(tmp_path, 20)
    assert newest > 20
    assert inside > 5


if __name__ == "__main__":
    save_forever(Path(sys.argv[1]))
