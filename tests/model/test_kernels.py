"""All attention kernels give the results of plain XLA; remat and the loop over layers change no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Execution, InputError, ModelConfig, forward, init

CONFIG = ModelConfig(vocab_size=32, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, max_seq_len=64)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 64)), jnp.int32)
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 2, 3], [1, 1, 2, 0]], 16, axis=1), jnp.int32)


def loss(config, params, segment_ids, execution):
    logits = forward(config, params, TOKENS, segment_ids=segment_ids, execution=execution).logits
    real = 1.0 if segment_ids is None else (segment_ids > 0)[..., None]
    return jnp.mean(jnp.square(logits) * real)


@functools.cache
def value_and_gradient(config, whole=True, **execution):
    """(The loss and its gradient, bytes of temporary memory) of whole rows or of packed ones; compiled once."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    segment_ids = None if whole else SEGMENTS
    program = (
        jax.jit(jax.value_and_grad(lambda params: loss(config, params, segment_ids, Execution(**execution))))
        .lower(shapes)
        .compile()
    )
    return program, program.memory_analysis().temp_size_in_bytes


def assert_same(one, other, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.long), False], ids=["whole", "segments"])
def test_pallas_equals_xla(whole, random_params):
    params = random_params(CONFIG)
    plain, _ = value_and_gradient(CONFIG, whole)
    fused, _ = value_and_gradient(CONFIG, whole, attention_kernel="pallas")
    assert_same(fused(params), plain(params))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "segments"])
def test_cudnn_equals_xla(whole, window):
    config = CONFIG.replace(num_layers=2, compute_dtype="bfloat16", sliding_window=window)
    params = init(config, jax.random.key(0))
    plain, _ = value_and_gradient(config, whole, attention_kernel="xla")
    fused, _ = value_and_gradient(config, whole, attention_kernel="cudnn")
    assert_same(fused(params), plain(params), 3e-2)


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        ("cudnn", {}, "attention_kernel='cudnn' cannot be used here: it needs a GPU"),
        ("pallas", {"sliding_window": 4}, "it does not support sliding windows"),
    ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU cannot do")
def test_what_cannot_be_is_said(kernel, change, message):
    config, execution = CONFIG.replace(**change), Execution(attention_kernel=kernel)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda: forward(config, init(config, jax.random.key(0)), TOKENS, execution=execution))


def test_weights_softcap_and_the_like_take_xla(random_params):
    execution = Execution(attention_kernel="pallas")
    weights = lambda params: forward(CONFIG, params, TOKENS, outputs=("attention",), execution=execution).attention
    assert jax.eval_shape(weights, random_params(CONFIG)).shape == (4, 2, 4, 64, 64)


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "full"), (True, "dots"), (False, "dots"), (False, "none")])
def test_neither_remat_nor_the_loop_changes_a_number(remat, scan_layers, random_params):
    params, (plain, _) = random_params(CONFIG), value_and_gradient(CONFIG, scan_layers=True)
    saving, _ = value_and_gradient(CONFIG, scan_layers=scan_layers, remat=remat)
    assert_same(saving(params), plain(params))


def test_remat_keeps_less():
    """In float32: a layer's activations need not outlive it."""
    temporary = {
        remat: value_and_gradient(CONFIG, scan_layers=True, remat=remat)[1] for remat in ("none", "dots", "full")
    }
    assert temporary["full"] < temporary["dots"] < temporary["none"]
