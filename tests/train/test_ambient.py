"""A run does not depend on JAX's settings in the process that trains it, and leaves them as they were."""

import json
import threading

import jax
import numpy as np
import pytest

from experiments import cli
from infer import Sampling, generate
from model import InputError, ModelConfig
from model.ambient import PINNED, changed, pinned
from train import HParams, Shell, TrainConfig, load_run, population
from train.run.checkpoint import Checkpoints
from train.run.metrics import read_metrics

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=16, max_seq_len=32)
TRAIN = TrainConfig(batch_size=2, seq_len=16, schedule="constant", dropout=True, norms=False)
HPARAMS = [HParams(dropout_rate=0.1, seed=seed) for seed in (0, 1)]
SETTINGS = {
    "default_prng_impl": "rbg",
    "threefry_partitionable": False,
    "random_seed_offset": 7,
    "enable_x64": True,
    "numpy_dtype_promotion": "strict",
    "numpy_rank_promotion": "raise",
    "disable_jit": True,
    "debug_nans": True,
    "transfer_guard": "disallow",
}


@pytest.fixture(params=list(SETTINGS))
def setting(request):
    """Such a setting in force for the whole process, as an environment variable puts it."""
    name = f"jax_{request.param}"
    before = getattr(jax.config, name)
    jax.config.update(name, SETTINGS[request.param])
    yield changed()
    jax.config.update(name, before or ("allow" if "guard" in name else before))


def trained(data, folder):
    """The identities and losses of two lanes, and the parameters of the first."""
    runs = [folder / "a", folder / "b"]
    population(
        CONFIG, TRAIN, HPARAMS, data=data, runs=runs, steps=2, shell=Shell(evaluate_tokens=32, checkpoint_start=False)
    )
    ids = [json.loads((run / "run.json").read_text())["run_id"] for run in runs]
    losses = [[(one["loss"], one.get("validation_loss")) for one in read_metrics(run)] for run in runs]
    return ids, losses, load_run(runs[0])[1]


@pytest.fixture(scope="module")
def usual(data, tmp_path_factory):
    assert changed() == {}
    folder = tmp_path_factory.mktemp("usual")
    return folder, trained(data, folder)


@pytest.mark.slow
def test_a_population_is_the_same_under_every_setting(setting, usual, data, tmp_path):
    assert setting, "the setting is in force"
    ids, losses, params = trained(data, tmp_path)
    assert changed() == setting, "it is in force again"
    with pinned():
        assert (ids, losses) == usual[1][:2]
        jax.tree.map(np.testing.assert_array_equal, params, usual[1][2])


def test_a_setting_is_back_after_an_exception(setting, data, tmp_path):
    with pytest.raises(InputError, match="at least one lane"):
        population(CONFIG, TRAIN, [], data=data, runs=[])
    assert changed() == setting


def test_a_command_is_the_same_under_every_setting(setting, usual, monkeypatch, capsys, tmp_path):
    """`generate` draws the same text with a seed."""

    def text():
        call = ("isoflop", "generate", usual[0] / "a", "--prompt", "The", "--seed", 3, "--max-new-tokens", 6)
        monkeypatch.setattr("sys.argv", [*map(str, call), "--json", str(tmp_path / "out.json")])
        cli.main()
        return capsys.readouterr().out

    here = text()
    assert changed() == setting
    with pinned():
        assert text() == here


def test_another_prng_is_named(usual, data, tmp_path):
    """What an earlier version trained under JAX_DEFAULT_PRNG_IMPL=rbg opens, and is not gone on with."""
    folder = tmp_path / "a"
    call = {"data": data, "runs": [folder], "shell": Shell(evaluate_tokens=32)}
    population(CONFIG, TRAIN, HPARAMS[:1], steps=1, **call)
    checkpoints = Checkpoints(folder)
    step, state = checkpoints.restore_newest(_shapes())
    checkpoints.save(step, state.replace(rng=np.arange(4, dtype=np.uint32)))
    checkpoints.close()
    config, params = load_run(folder)
    assert len(generate(config, params, [[1]], Sampling(stop_ids=()), max_new_tokens=2).tokens[0]) == 2
    with pytest.raises(InputError, match=r"another PRNG of JAX: rng is uint32\[4\] there and uint32\[2\] here"):
        population(CONFIG, TRAIN, HPARAMS[:1], steps=3, **call)


def _shapes():
    from train import init_state

    return jax.eval_shape(lambda: init_state(CONFIG, TRAIN, HPARAMS[0]))


def test_settings_of_a_thread_stay_its_own():
    """Another thread keeps the caller's while this one is pinned."""
    seen = []
    with jax.default_prng_impl("rbg"), pinned():
        assert jax.random.key(0).dtype == jax.random.key(0, impl="threefry2x32").dtype
    jax.config.update("jax_enable_x64", True)
    try:
        with pinned():
            thread = threading.Thread(target=lambda: seen.append(jax.numpy.ones(1).dtype))
            thread.start()
            thread.join()
            assert jax.numpy.ones(1).dtype == "float32"
    finally:
        jax.config.update("jax_enable_x64", False)
    assert seen == ["float64"]


def test_every_setting_that_is_pinned_is_jaxs_default():
    for name, value in PINNED.items():
        assert getattr(jax.config, f"jax_{name}", value) in (value, None)
