"""Shared by the tests of training: a program that ends in the middle of one, many devices."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from train.data import PhasedLoader


@pytest.fixture(scope="session")
def crash():
    """step → a context in which asking for the data of that step ends the program."""

    @contextmanager
    def at(step):
        plain = PhasedLoader.batch

        def batch(self, number, *arguments, **options):
            if number == step:
                raise RuntimeError(f"crash at {step}")
            return plain(self, number, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PhasedLoader, "batch", batch)
            with pytest.raises(RuntimeError, match=f"crash at {step}"):
                yield

    return at


@pytest.fixture(scope="session")
def on_eight_devices():
    """Arguments of Python → the JSON that a process with eight CPU devices prints last."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"

    def run(*arguments):
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
