"""Every way to compute attention gives what plain XLA gives; and what is kept for the backward pass changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import InputError, ModelConfig, forward, init

CONFIG = ModelConfig(vocab_size=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 64)), jnp.int32)
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 2, 3], [1, 1, 2, 0]], 16, axis=1), jnp.int32)


def loss(config, params, segment_ids):
    logits = forward(config, params, TOKENS, segment_ids=segment_ids).logits
    real = 1.0 if segment_ids is None else (segment_ids > 0)[..., None]
    return jnp.mean(jnp.square(logits) * real)


def value_and_gradient(config, params, segment_ids):
    return jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)(config, params, segment_ids)


def assert_same(one, other, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=0)


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "segments"])
def test_pallas_equals_xla(params, segment_ids):
    plain = value_and_gradient(CONFIG.replace(attention_kernel="xla"), params, segment_ids)
    assert_same(value_and_gradient(CONFIG.replace(attention_kernel="pallas"), params, segment_ids), plain)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "segments"])
def test_cudnn_equals_xla(segment_ids, window):
    config = CONFIG.replace(compute_dtype="bfloat16", sliding_window=window)
    params = init(config, jax.random.key(0))
    plain = value_and_gradient(config.replace(attention_kernel="xla"), params, segment_ids)
    assert_same(value_and_gradient(config.replace(attention_kernel="cudnn"), params, segment_ids), plain, 3e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_kernel": "cudnn"}, "attention_kernel='cudnn' cannot be used here: it needs a GPU"),
        ({"attention_kernel": "pallas", "sliding_window": 4}, "it knows no sliding window"),
    ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU cannot do")
def test_what_cannot_be_is_said(change, message):
    config = CONFIG.replace(**change)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda: forward(config, init(config.replace(attention_kernel="xla"), jax.random.key(0)), TOKENS))


def test_weights_softcap_and_the_like_take_xla(params):
    config = CONFIG.replace(attention_kernel="pallas")
    assert forward(config, params, TOKENS, outputs=("attention",)).attention.shape == (2, 2, 4, 64, 64)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_number(params, remat, scan_layers):
    config = CONFIG.replace(scan_layers=scan_layers)
    assert_same(value_and_gradient(config.replace(remat=remat), params, None), value_and_gradient(config, params, None))


def test_remat_keeps_less():
    """In float32 at 8 layers: a layer's activations need not outlive it."""
    config = CONFIG.replace(num_layers=8)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    temporary = {}
    for remat in ("none", "dots", "full"):
        step = jax.jit(jax.grad(loss, argnums=1), static_argnums=0).lower(config.replace(remat=remat), params, None)
        temporary[remat] = step.compile().memory_analysis().temp_size_in_bytes
    assert temporary["full"] < temporary["dots"] < temporary["none"]
