"""Models of every family: our logits are Transformers' logits, and what is saved is what was loaded.

The folders in tests/fixtures/hf hold random models of every family with the logits that Transformers gave for them.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from model import Execution, forward
from model.convert import fold, load_hf, save_hf
from model.convert.canonical import differences
from model.convert.families import FAMILIES

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
MAKE = FIXTURES.parent / "make_hf.py"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())


def outputs(config, params, given):
    """Logits (without a head: final hidden states) at the real tokens of a fixture."""
    inputs = {"segment_ids": given["mask"], "token_types": given.get("token_types")}
    if "encoder_tokens" in given:
        inputs |= {"encoder_tokens": given["encoder_tokens"], "encoder_segment_ids": given["encoder_mask"]}
    inputs = {name: value.astype(np.int32) for name, value in inputs.items() if value is not None}
    bare = config.head == "none"
    asked = ("final_hidden",) if bare else ()
    run = jax.jit(functools.partial(forward, config, outputs=asked, execution=Execution(scan_layers=True)))
    out = run(params, given["tokens"].astype(np.int32), **inputs)
    return at_tokens(np.asarray(out.final_hidden if bare else out.logits), given)


def at_tokens(logits, given):
    return logits[given["mask"].astype(bool)] if logits.ndim == 3 else logits


def error(config, params, given):
    """The largest difference from the fixture's logits, in their standard deviations."""
    expected = at_tokens(given["logits"], given)
    return np.abs(outputs(config, params, given) - expected).max() / expected.std()


def config_of(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def expected_of(folder):
    return dict(np.load(folder / "expected.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, hf):
    config, params = hf(name)
    assert error(config, params, expected_of(FIXTURES / name)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_loading_what_was_saved_gives_the_same_model(name, tmp_path, hf, assert_same):
    loaded = hf(name)
    save_hf(*loaded, tmp_path / "saved")
    assert_same(loaded, load_hf(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == config_of(name)["architectures"]


def test_every_family_has_a_fixture():
    types = {config_of(name)["model_type"] for name in NAMES}
    assert types == set(FAMILIES)


def test_a_sentence_encoder_without_pooler(copy, tmp_path, assert_same):
    bare = lambda tensors: {key: value for key, value in tensors.items() if "pooler" not in key}
    config, params = load_hf(copy("bert", tensors=bare))
    assert not config.pooler
    assert "pooler" not in params
    assert error(config, params, expected_of(FIXTURES / "bert")) < 1e-4
    save_hf(config, params, tmp_path / "saved")
    assert_same((config, params), load_hf(tmp_path / "saved"))


def transformers():
    """Return a function that runs make_hf.py; skips without an interpreter that has torch and transformers."""
    python = os.environ.get("ISOFLOP_TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip(f"{python} has no torch and transformers; set ISOFLOP_TRANSFORMERS_PYTHON")
    return lambda *arguments: subprocess.run([python, str(MAKE), *arguments], capture_output=True, text=True)


def as_trained(config):
    """The config as that of a run under muP and depth scaling, with another start."""
    return config.replace(parameterization="mup", base_d_model=6, base_num_layers=5, zero_readout=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_type_holds_a_mup_model(name, tmp_path, hf, assert_same):
    """Among them those with tied heads, which become untied."""
    config, params = hf(name)
    save_hf(as_trained(config), params, tmp_path / "saved", model_type=config_of(name)["model_type"])
    loaded, same = load_hf(tmp_path / "saved")
    standard, folded = fold(as_trained(config), params)
    assert differences(loaded, standard) == []
    assert_same((loaded, same), (loaded, folded))


@pytest.mark.long
def test_transformers_computes_what_a_mup_model_does(tmp_path, hf):
    run = transformers()
    for name in NAMES:
        config, params = hf(name)
        save_hf(as_trained(config), params, tmp_path / name, model_type=config_of(name)["model_type"])
        shutil.copy(FIXTURES / name / "expected.npz", tmp_path / name)
    done = run("--check", str(tmp_path))
    assert done.returncode == 0, done.stderr
    errors = {}
    for name in NAMES:
        config, params = hf(name)
        given = expected_of(tmp_path / name)
        ours = outputs(as_trained(config), params, given)
        theirs = at_tokens(np.load(tmp_path / name / "actual.npz")["logits"], given)
        unused = {"missing_keys": ["cls.predictions.bias"]} if name == "bert-masked" else {}  # untied: decoder.bias
        assert json.loads((tmp_path / name / "report.json").read_text()) == unused, name
        errors[name] = np.abs(ours - theirs).max() / ours.std()
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.long
def test_transformers_makes_and_takes_fresh_models(tmp_path):
    """Set ISOFLOP_TRANSFORMERS_PYTHON to an interpreter that has torch and transformers."""
    seed = str(int.from_bytes(os.urandom(3)))
    made, saved = tmp_path / "made", tmp_path / "saved"
    run = transformers()
    done = run("--out", str(made), "--seed", seed)
    assert done.returncode == 0, done.stderr
    errors = {}
    for folder in sorted(made.iterdir()):
        config, params = load_hf(folder)
        errors[folder.name] = error(config, params, expected_of(folder))
        save_hf(config, params, saved / folder.name)
        shutil.copy(folder / "expected.npz", saved / folder.name)
    assert len(errors) == len(NAMES)
    assert max(errors.values()) < 1e-4, (seed, errors)
    done = run("--check", str(saved))
    assert done.returncode == 0, done.stderr
    for folder in sorted(saved.iterdir()):
        given, actual = expected_of(folder), np.load(folder / "actual.npz")["logits"]
        expected = at_tokens(given["logits"], given)
        assert json.loads((folder / "report.json").read_text()) == {}, folder.name
        assert np.abs(at_tokens(actual, given) - expected).max() < 1e-5 * expected.std(), (seed, folder.name)
