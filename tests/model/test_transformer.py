"""Inputs and outputs of a pass: padding, positions, dropout, precisions; for all architectures see test_variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import InputError, ModelConfig, apply, forward, head
from model.dropout import Dropout

SEQ = 12
ROTARY = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16)
LEARNED = ROTARY.replace(position="learned", norm="layernorm", gated=False, use_bias=True, tie_embeddings=False)


def random_tokens(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 32, shape), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, **inputs):
    return apply(config, params, tokens, **inputs)


@pytest.mark.parametrize("left", [0, 3])
def test_padding_changes_nothing(left, random_params):
    """Whatever stands in padding, right or left of a document, moves none of its logits by a bit."""
    params, tokens = random_params(LEARNED), random_tokens(1, SEQ)
    segments = np.array([[0] * left + [1] * 5 + [0] * (SEQ - left - 5)])
    padded = logits_of(LEARNED, params, tokens, segment_ids=segments)
    other = logits_of(
        LEARNED, params, jnp.where(segments == 1, tokens, random_tokens(1, SEQ, seed=9)), segment_ids=segments
    )
    real = slice(left, left + 5)
    np.testing.assert_array_equal(padded[0, real], other[0, real])
    np.testing.assert_allclose(padded[0, real], logits_of(LEARNED, params, tokens[:, real])[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(padded).all(), "padding itself must not poison a loss that masks it"


def test_explicit_positions_are_used(random_params):
    params, tokens = random_params(LEARNED), random_tokens(1, SEQ)
    default = logits_of(LEARNED, params, tokens)
    same = logits_of(LEARNED, params, tokens, positions=np.arange(SEQ)[None])
    shifted = logits_of(LEARNED, params, tokens, positions=np.arange(SEQ)[None] + 2)
    np.testing.assert_allclose(default, same, rtol=1e-5, atol=1e-6)
    assert np.abs(default - shifted).max() > 1e-2


def test_rotary_knows_only_distances(random_params):
    params, tokens = random_params(ROTARY), random_tokens(1, SEQ)
    here = logits_of(ROTARY, params, tokens, positions=np.arange(SEQ)[None])
    there = logits_of(ROTARY, params, tokens, positions=np.arange(SEQ)[None] + 100)
    apart = logits_of(ROTARY, params, tokens, positions=2 * np.arange(SEQ)[None])
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-3)
    assert np.abs(here - apart).max() > 1e-2


def test_dropout_in_the_model(random_params):
    """Rate 0 is no dropout; a rate is data: all rates share one program; a key gives its mask again."""
    params, tokens = random_params(ROTARY), random_tokens(2, SEQ)
    run = jax.jit(lambda rate, key: apply(ROTARY, params, tokens, dropout_rate=rate, dropout_key=key))
    plain = logits_of(ROTARY, params, tokens)
    np.testing.assert_allclose(run(np.float32(0.0), jax.random.key(0)), plain, rtol=1e-5, atol=1e-5)
    one, again, other = (run(np.float32(0.3), jax.random.key(seed)) for seed in (0, 0, 1))
    run(np.float32(0.1), jax.random.key(0))
    assert run._cache_size() == 1
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - plain).max() > 1e-2


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
    count = 100_000
    dropout = Dropout(jnp.float32(rate), jax.random.key(3))
    dropped = np.asarray(dropout(jnp.ones(count)))
    zeros = (dropped == 0).mean()
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(zeros - rate) < 4 * deviation
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-6)
    elsewhere = np.asarray(dropout.at(1)(jnp.ones(count)))
    both = ((dropped == 0) & (elsewhere == 0)).mean()
    assert abs(both - rate**2) < 5 * (rate**2 / count) ** 0.5, "two places drop independently"


def test_outputs(random_params):
    params, tokens = random_params(ROTARY), random_tokens(2, SEQ)
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    out = jax.jit(lambda: forward(ROTARY, params, tokens, segment_ids=segments, outputs=("hidden", "attention")))()
    assert out.hidden.shape == (ROTARY.num_layers + 1, 2, SEQ, ROTARY.d_model)
    assert out.attention.shape == (ROTARY.num_layers, 2, ROTARY.num_heads, SEQ, SEQ)
    assert out.final_hidden is None
    table = params["embedding"]["tokens"]
    real = segments > 0
    np.testing.assert_allclose(out.hidden[0], jnp.where(real[..., None], table[tokens], 0), rtol=1e-6)
    seen = np.tril(np.ones((SEQ, SEQ), bool)) & (segments[:, :, None] == segments[:, None, :])
    weights = np.moveaxis(np.asarray(out.attention), 2, 0)  # [heads, layers, batch, query, key]
    assert (weights[..., ~seen] == 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1)[..., real], 1, rtol=1e-5)
    assert (weights[:, :, ~real] == 0).all(), "a query that sees nothing mixes nothing"


def test_final_hidden_and_head_make_the_logits(random_params):
    for config in (ROTARY, LEARNED):
        params, tokens = random_params(config), random_tokens(2, SEQ)
        out = jax.jit(functools.partial(forward, config, outputs=("final_hidden",)))(params, tokens)
        assert out.logits is None
        logits = jax.jit(head, static_argnums=0)(config, params, out.final_hidden)
        np.testing.assert_allclose(logits, logits_of(config, params, tokens), rtol=1e-4, atol=1e-4)


def test_bad_calls_are_refused(random_params):
    params = random_params(LEARNED)
    with pytest.raises(InputError, match=r"17 tokens.*max_seq_len=16"):
        apply(LEARNED, params, random_tokens(1, 17))
    with pytest.raises(InputError, match="hiden"):
        forward(LEARNED, params, random_tokens(1, 4), outputs=("hiden",))


def test_bfloat16_is_near_float32(random_params):
    params, tokens = random_params(ROTARY), random_tokens(2, SEQ)
    exact = np.asarray(logits_of(ROTARY, params, tokens))
    rounded = logits_of(ROTARY.replace(compute_dtype="bfloat16"), params, tokens)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact).max() / exact.std()
    assert 0 < error < 0.1, "8 bits of mantissa, some tens of roundings"
