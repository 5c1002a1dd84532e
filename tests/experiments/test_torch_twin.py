"""The PyTorch twin is our model, trained as we train it."""

import ast
import contextlib
import os
import shutil
import sys

import jax
import numpy as np
import pytest

from experiments.bench.peers import twin
from experiments.bench.peers.twin import Twin, twin_spec, twin_weights
from experiments.bench.train.against_torch import IsoflopStep, bench_against_torch
from model import ModelConfig, accounting, init, presets
from model.errors import InputError
from train import HParams, TrainConfig

CONFIGS = {
    "tied, grouped, gated": presets.get("tiny").replace(num_heads=4, num_kv_heads=2),
    "untied, plain, biased": ModelConfig(
        vocab_size=48,
        d_model=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=24,
        position="learned",
        norm="layernorm",
        activation="gelu_tanh",
        gated=False,
        use_bias=True,
        tie_embeddings=False,
    ),
    "untied, gated, odd shapes": presets.get("tiny").replace(
        head_dim=6, d_ff=20, tie_embeddings=False, activation="gelu", attention_bias=True, attention_scale=0.3
    ),
}
TRAIN = TrainConfig(batch_size=2, seq_len=16, schedule="constant")


@pytest.fixture
def torch_python(monkeypatch):
    """Set ISOFLOP_TORCH_PYTHON, or ISOFLOP_TRANSFORMERS_PYTHON, to an interpreter that has torch."""
    names = ("ISOFLOP_TORCH_PYTHON", "ISOFLOP_TRANSFORMERS_PYTHON")
    python = next((os.environ[name] for name in names if os.environ.get(name)), sys.executable)
    monkeypatch.setenv("ISOFLOP_TORCH_PYTHON", python)
    try:
        twin.require_torch()
    except InputError as missing:
        pytest.skip(str(missing))


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_and_tokens_give_the_same_losses(name, torch_python, tmp_path):
    config, hparams = CONFIGS[name], HParams(learning_rate=3e-2)
    ours = IsoflopStep(config, TRAIN, hparams)
    np.savez(tmp_path / "weights.npz", **twin_weights(config, ours.params()))
    spec = twin_spec(config, TRAIN, hparams, "eager", tmp_path / "weights.npz", threads=1)
    with Twin(spec, tmp_path / "log") as theirs:
        assert theirs.ready["parameters"] == accounting.parameters(config).total
        losses = [turn(5)[1] for turn in (ours.run, theirs.run)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert len(set(losses[0])) == 5


@pytest.mark.long
def test_the_bench_from_end_to_end(torch_python):
    config = CONFIGS["tied, grouped, gated"]
    result = bench_against_torch(config, TRAIN, rounds=2, steps_per_round=2, modes=("eager",))
    assert result.parameters == accounting.parameters(config).total
    assert result.loss_difference < 1e-5
    assert [row.name for row in result.contenders] == ["isoflop", "torch eager"]
    for row in result.contenders:
        assert len(row.tokens_per_second_by_round) == 2
        assert 0 < row.tokens_per_second_slowest <= row.tokens_per_second <= row.tokens_per_second_fastest


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_losses_are_the_same(torch_python):
    result = bench_against_torch(presets.get("tiny"), TRAIN, rounds=1, steps_per_round=1, modes=("compile",))
    assert result.loss_difference < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_handed_over_once(name):
    config = CONFIGS[name]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.eval_shape(lambda key: init(config, key), KEY))
    weights = twin_weights(config, params)
    if config.tie_embeddings:
        assert weights.pop("head.weight") is weights["tokens.weight"]
    assert sum(array.size for array in weights.values()) == accounting.parameters(config).total


KEY = jax.random.key(0)

FAKE = """
import json, sys
say = lambda answer: print(json.dumps(answer), flush=True)
say({"ready": True, "spec": json.loads(sys.argv[1])})
for line in sys.stdin:
    count = int(line.split()[1])
    if count > 8:
        sys.exit("out of memory")
    say({"seconds": 0.5 * count, "losses": [1.0] * count})
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A child that talks as the twin does, run by this Python."""

    def start(program: str = FAKE) -> Twin:
        (tmp_path / "fake.py").write_text(program)
        monkeypatch.setattr(twin, "TWIN", tmp_path / "fake.py")
        monkeypatch.setenv("ISOFLOP_TORCH_PYTHON", sys.executable)
        return Twin({"mode": "eager"}, tmp_path / "log")

    return start


def test_the_child_answers_turn_by_turn_and_ends_with_its_input(fake):
    with fake() as child:
        assert child.ready["spec"] == {"mode": "eager"}
        assert child.run(2) == (1.0, [1.0, 1.0])
        assert child.run(3) == (1.5, [1.0, 1.0, 1.0])
    assert child.process.returncode == 0


def test_a_child_that_fails_says_why(fake):
    with fake() as child, pytest.raises(InputError, match=r"PyTorch \(eager\) failed: out of memory"):
        child.run(9)
    with pytest.raises(InputError, match="no such thing"):
        fake("import sys; sys.exit('no such thing')").__enter__()


def test_an_interrupted_child_ends_at_once(fake):
    endless = FAKE.split("for line")[0] + "import time\nwhile True:\n    time.sleep(60)\n"
    child = fake(endless)
    with contextlib.suppress(KeyboardInterrupt), child:
        raise KeyboardInterrupt
    assert child.process.returncode == -9


def test_a_python_without_torch_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ISOFLOP_TORCH_PYTHON", str(tmp_path / "python"))
    with pytest.raises(InputError, match=r"has no torch: install isoflop\[peers\].*ISOFLOP_TORCH_PYTHON"):
        twin.require_torch()


def test_the_twin_stands_alone():
    """Another Python runs it, which has none of this project's packages."""
    nodes = list(ast.walk(ast.parse(twin.TWIN.read_text())))
    imports = [node for node in nodes if isinstance(node, ast.Import)]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {str(node.module) for node in froms}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"numpy", "torch"}
