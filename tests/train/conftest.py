"""Shared by the tests of training: a program that ends in the middle of one, many devices, examples to tune on."""

import functools
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from train.data import PhasedLoader, load_manifest
from train.data.examples.prepare import prepare_examples


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


@pytest.fixture(scope="session")
def examples(data, tmp_path_factory):
    """kind → a folder of examples of short text, with reference log-probabilities of a fixed name."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        random = np.random.default_rng(0)
        words = ["we", "the", "people", "of", "every", "state", "and", "nation"]
        say = lambda: " ".join(random.choice(words, random.integers(1, 4)))
        fields = {"chat": ("completion",), "preference": ("chosen", "rejected"), "rated": ("completion",)}[kind]
        with (folder / "rows.jsonl").open("w") as file:
            for number in range(60):
                row = {"prompt": f"{number} {say()}"} | {field: f"{say()} {field[0]}" for field in fields}
                row |= {"margin": number % 3} if kind == "preference" else {}
                file.write(json.dumps(row | ({"label": number % 2} if kind == "rated" else {})) + "\n")
        prepare_examples(
            folder / "rows.jsonl",
            folder / "data",
            kind=kind,
            tokenizer=data,
            max_tokens=32,
            validation_fraction=0.2,
        )
        for split in ("train", "validation"):
            documents = load_manifest(folder / "data").splits[split].documents
            place = folder / "data" / "reference" / "fixed"
            place.mkdir(parents=True, exist_ok=True)
            for part in ("", "-tail") if kind == "preference" else ("",):
                np.save(place / f"{split}{part}.npy", random.normal(-40, 5, documents).astype(np.float32))
        return folder / "data"

    return make
