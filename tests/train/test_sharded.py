"""Eight devices with the rows split over them give the losses of one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

CODE = """
import json, sys
import jax
from model import presets
from train import HParams, Shell, TrainConfig, train
from train.metrics import read_metrics

data, folder = sys.argv[1:]
config = presets.get("tiny").replace(vocab_size=320, max_seq_len=32)
train_config = TrainConfig(batch_size=8, seq_len=32)
losses = {}
for devices in (1, 8):
    shell = Shell(mesh={"data": devices}, evaluate_tokens=512)
    run = f"{folder}/{devices}"
    result = train(config, train_config, HParams(learning_rate=1e-2), data=data, run=run, steps=10, shell=shell)
    losses[devices] = [line["loss"] for line in read_metrics(run)] + [result.validation_loss]
print(json.dumps([jax.device_count(), losses[1], losses[8]]))
"""


@pytest.mark.slow
def test_eight_devices_equal_one(data, tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    call = [sys.executable, "-c", CODE, str(data), str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    count, one, eight = json.loads(done.stdout.splitlines()[-1])
    assert count == 8
    assert len(one) == 11
    np.testing.assert_allclose(eight, one, rtol=1e-5)
