"""Pure functions obey the caller's settings of JAX, and are right under each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import Engine, Sampling, generate, generate_speculative, prepare
from model import Execution, ModelConfig, init
from train import HParams, TrainConfig, init_state, train_step

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=24, max_seq_len=16)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
SAMPLED = Sampling(temperature=0.9, top_p=0.8, top_k=5, repetition_penalty=1.1, logprobs=2, seed=5, stop_ids=())


@pytest.fixture
def params(random_params):
    return random_params(CONFIG)


def texts(params):
    """Tokens by the engine, which serves as `generate` does, and by speculation over int8 weights."""
    engine = Engine(CONFIG, params, slots=1, capacity=16, steps=4, chunk=8)
    request = engine.submit(PROMPTS[0], SAMPLED, 4)
    engine.run()
    return [
        generate_speculative(
            CONFIG, prepare(CONFIG, params, weights="int8"), PROMPTS, SAMPLED, max_new_tokens=4
        ).tokens,
        request.tokens,
    ]


@pytest.mark.long
@pytest.mark.slow
def test_text_is_the_same_with_x64_and_strict_promotion(params):
    usual = texts(params)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert texts(params) == usual


def test_a_callers_prng_is_used(params):
    """With keys of four words, whose draws are others and the same each time."""
    draw = lambda: generate(CONFIG, params, PROMPTS, SAMPLED, max_new_tokens=8).tokens
    usual = draw()
    with jax.default_prng_impl("rbg"), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert draw() == draw() != usual


def assert_same_dtypes(config, optimizer):
    """A step hands back what it took, and nothing is 64 bits wide: by default nothing can be. Only traced."""
    train_config = TrainConfig(batch_size=2, seq_len=16, dropout=True, optimizer=optimizer)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens} | (
        {"encoder_tokens": tokens} if config.stack == "encoder-decoder" else {}
    )
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(lambda: init_state(config, train_config, HParams()))
        step = functools.partial(train_step, config, train_config, execution=Execution(accumulate=2))
        new, metrics = jax.eval_shape(step, state, batch, HParams())
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(new) == shapes(state)
    assert all(leaf.dtype.itemsize <= 4 for leaf in jax.tree.leaves((state, metrics)))


def test_every_architecture_keeps_its_dtypes(variant):
    assert_same_dtypes(variant, "adamw")


@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "muon"])
def test_every_optimizer_keeps_its_dtypes(optimizer):
    assert_same_dtypes(CONFIG, optimizer)


def test_parameters_are_the_same_with_x64():
    usual = init(CONFIG, jax.random.key(0))
    with jax.enable_x64(True):
        other = init(CONFIG, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, other, usual)


def test_a_step_takes_a_callers_prng():
    with jax.default_prng_impl("rbg"), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        train_config = TrainConfig(batch_size=2, seq_len=8, dropout=True)
        state = init_state(CONFIG, train_config, HParams())
        batch = dict.fromkeys(["tokens", "targets"], jnp.ones((2, 8), jnp.int32))
        step = jax.jit(train_step, static_argnums=(0, 1))
        new, metrics = step(CONFIG, train_config, state, batch, HParams(dropout_rate=0.1))
    assert state.rng.shape == (4,)
    assert np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(new.rng, state.rng)
