"""The step of a user of Transformers, PEFT or TRL is ours: same losses, and the bench tells both apart."""

import os
import sys

import jax
import pytest

from experiments.bench.peers.child import python_has
from experiments.bench.train.against_transformers import bench_against_transformers
from model import init, presets
from model.errors import InputError
from train import TrainConfig

CONFIG = presets.get("tiny").replace(num_heads=4, num_kv_heads=2)
TRAIN = TrainConfig(batch_size=2, seq_len=16)


@pytest.mark.long
@pytest.mark.parametrize("method", [None, "sft", "dpo"])
def test_whole_models_and_adapters_train_alike(monkeypatch, method):
    names = ("ISOFLOP_TORCH_PYTHON", "ISOFLOP_TRANSFORMERS_PYTHON")
    python = next((os.environ[name] for name in names if os.environ.get(name)), sys.executable)
    for module in ("peft", *(["trl"] if method else [])):
        if not python_has(python, module):
            pytest.skip(f"{python} has no {module}")
    monkeypatch.setenv("ISOFLOP_TORCH_PYTHON", python)
    params = init(CONFIG, jax.random.key(0))
    result = bench_against_transformers(CONFIG, params, TRAIN, rank=4, rounds=2, steps_per_round=1, method=method)
    whole, adapter = result.kinds
    assert whole.trained_parameters == whole.parameters
    assert adapter.trained_parameters < adapter.parameters
    for kind in (whole, adapter):
        assert kind.loss_difference < 1e-5
        assert [row.name for row in kind.contenders] == ["isoflop", "trl eager" if method else "transformers eager"]
        assert all(row.peak_bytes > 0 for row in kind.contenders)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("ISOFLOP_TORCH_PYTHON", "/nowhere/python")
    with pytest.raises(InputError, match=r"has no transformers: install isoflop\[peers\]"):
        bench_against_transformers(CONFIG, {}, TRAIN, rank=4)
