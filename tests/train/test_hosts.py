"""Two processes that are one run: what process 0 decides all do, and one sharded checkpoint is written by both."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from flax import struct
from jax.experimental.multihost_utils import sync_global_devices

from model.checkpoint import newest_params
from model.errors import InputError
from train.hosts import agree, initialize, is_writer
from train.run.checkpoint import Checkpoints

TABLE = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)


@struct.dataclass
class State:
    """A state that has parameters, which are stored as an item of their own."""

    params: Any
    step: Any


def state_at(step):
    return State({"table": TABLE + step, "whole": TABLE[0] * step}, np.array(step, np.int32))


def test_one_process_needs_nobody(monkeypatch):
    monkeypatch.setattr("train.hosts.multihost_utils", None)
    assert is_writer()
    assert agree(lambda *values: values, 1, 2) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        agree(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "names no port"),
        (("localhost:1", 0, 0), "num_processes=0"),
        (("localhost:1", 2, 2), "process_id=2 must be a whole number from 0 to 1"),
        ((None, None, None), "cannot be found"),
        ((None, 2, 1), "cannot be found"),
    ],
)
def test_what_cannot_be_joined_is_refused(arguments, message, monkeypatch):
    for variable in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "JAX_COORDINATOR"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(InputError, match=message):
        initialize(*arguments)


def refuse(error):
    raise error


def check_agreement():
    me = jax.process_index()
    assert is_writer() == (me == 0)
    assert agree(lambda: {"from": me, "text": "ä" * 300, "none": None}) == {"from": 0, "text": "ä" * 300, "none": None}
    assert agree(list) == []
    sync_global_devices("between")
    with pytest.raises(InputError, match=r"^steps=0 is too few, says 0$"):
        agree(refuse, InputError(f"steps=0 is too few, says {me}"))
    with pytest.raises(OSError, match="No space left on device: '/disk'") as refused:
        agree(refuse, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk"))
    assert refused.value.errno == errno.ENOSPC
    with pytest.raises(ZeroDivisionError if me == 0 else RuntimeError, match="division by zero"):
        agree(lambda: 1 / 0)


def check_checkpoints(run):
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    spread, same = jax.NamedSharding(mesh, jax.P("data", "model")), jax.NamedSharding(mesh, jax.P())
    place = lambda value, sharding: jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    checkpoints = Checkpoints(run, keep=3)
    for step in (1, 2, 3, 4, 5):
        state = state_at(step)
        params = {"table": place(state.params["table"], spread), "whole": place(state.params["whole"], same)}
        alone = jax.numpy.array(step, np.int32)  # an array of this process
        state = State(params, alone if step == 4 else state.step)
        checkpoints.save(step, state)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 5]
    sync_global_devices("listed")

    checkpoints.discard_after(4)
    assert checkpoints.steps() == [3, 4]
    with pytest.raises(InputError, match="no checkpoint of step 5; the steps there are: 3, 4"):
        checkpoints.restore(5, state)

    other = jax.NamedSharding(mesh, jax.P(None, ("model", "data")))
    table = jax.ShapeDtypeStruct(TABLE.shape, TABLE.dtype, sharding=other)
    like = state_at(0).replace(params={**state_at(0).params, "table": table})
    check_restored(checkpoints.restore_newest(like), 4, other)
    sync_global_devices("all have read it")
    if is_writer():
        largest = max((run / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    sync_global_devices("damaged")
    check_restored(checkpoints.restore_newest(like), 3, other)

    with (
        mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=0 if is_writer() else 2**40)),
        pytest.raises(OSError, match="No space left"),
    ):
        checkpoints.save(6, state)
    broken = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error", "there"))
    with mock.patch("train.run.checkpoint.write_json", broken):
        checkpoints.save(6, state)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.wait()
    assert broken.called == is_writer()
    checkpoints.save(7, state)
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, newest_params(run, state_at(0).params)[1], state_at(5).params)
    checkpoints.close()
    assert checkpoints.steps() == [3, 7]


def check_lanes(run):
    """Several runs are saved at once; their writers must not meet at each other's barriers."""
    spread = jax.NamedSharding(jax.make_mesh((4,), ("data",)), jax.P("data"))
    lanes = [Checkpoints(run / f"lane-{lane}") for lane in range(3)]
    for step in (1, 2):
        for number, lane in enumerate(lanes):
            noise = np.random.default_rng(number).integers(0, 2**32, (4, 2**19 >> 3 * number), np.uint32)
            shared = jax.make_array_from_callback(noise.shape, spread, lambda index, noise=noise: noise[index])
            mine = np.random.default_rng(3).random(2**19 >> 3 * (2 - number))  # process 0 alone writes it
            lane.save(step, {"shared": shared, "mine": mine})
    for lane in lanes:
        lane.wait()
        assert lane.steps() == [1, 2]
        lane.close()
    shared_like = jax.ShapeDtypeStruct((4, 2**19), np.uint32, sharding=spread)
    _, state = lanes[0].restore_newest({"shared": shared_like, "mine": np.zeros(2**13)})
    noise = np.random.default_rng(0).integers(0, 2**32, (4, 2**19), np.uint32)
    for shard in state["shared"].addressable_shards:
        np.testing.assert_array_equal(shard.data, noise[shard.index])


def check_restored(found, wanted, sharding):
    step, state = found
    assert step == wanted
    params, saved = state.params, state_at(wanted).params
    assert params["table"].sharding == sharding
    for shard in params["table"].addressable_shards:
        np.testing.assert_array_equal(shard.data, saved["table"][shard.index])
    np.testing.assert_array_equal(params["whole"], saved["whole"])
    assert state.step == wanted


@pytest.mark.long
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, __file__, coordinator]
    pair = [
        subprocess.Popen(
            [*command, str(process), tmp_path],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in pair]
    finally:
        for process in pair:
            process.kill()
    for process, (_, errors) in zip(pair, said, strict=True):
        assert process.returncode == 0, errors
    assert [json.loads(output.splitlines()[-1]) for output, _ in said] == ["done", "done"]
    alone = Checkpoints(tmp_path)
    assert alone.steps() == [3, 7]
    jax.tree.map(np.testing.assert_array_equal, alone.restore(3, state_at(0)), state_at(3))
    assert (tmp_path / "damaged" / "4").is_dir()


if __name__ == "__main__":
    initialize(sys.argv[1], 2, int(sys.argv[2]))
    check_agreement()
    check_checkpoints(Path(sys.argv[3]))
    check_lanes(Path(sys.argv[3]) / "lanes")
    print(json.dumps("done"))
