"""Shared by the tests of converters: models of tests/fixtures/hf, changed copies of their folders, and a comparison."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"


@pytest.fixture(scope="session")
def hf():
    """A fixture's name → its (config, params), loaded once."""
    from model.convert import load_hf

    return functools.cache(lambda name: load_hf(FIXTURES / name))


@pytest.fixture
def copy(tmp_path):
    """(fixture's name, changes of its config.json, function of its dict of tensors) → a folder.

    A key that is changed to `...` is left out.
    """
    from safetensors.numpy import load_file, save_file

    def make(name, config=None, tensors=None, to="copy"):
        folder = tmp_path / to
        shutil.copytree(FIXTURES / name, folder)
        raw = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
        if tensors is not None:
            changed = tensors(load_file(folder / "model.safetensors"))
            contiguous = {key: np.ascontiguousarray(value) for key, value in changed.items()}
            save_file(contiguous, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def assert_same():
    """Two (config, params) are equal, the numbers up to `rtol`."""

    def compare(ours, theirs, rtol=0.0):
        (config, params), (other_config, other_params) = ours, theirs
        assert config == other_config
        assert jax.tree.structure(params) == jax.tree.structure(other_params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), params, other_params)

    return compare
