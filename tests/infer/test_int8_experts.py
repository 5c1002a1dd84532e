"""Experts in int8: every way of computing gives what the rounded matrices give, and nothing holds them any wider."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import prepare
from model import Experts, InputError, ModelConfig, accounting, apply, init
from model.dispatch import through_experts
from model.grouped import batched_product, loop_product
from model.quantize import quantize_experts
from model.quantized import load_quantized, save_quantized
from model.weights import Int8Experts, bytes_of

COUNT, D_MODEL, D_FF = 4, 8, 12
CONFIG = ModelConfig(32, 16, 1, 2, max_seq_len=16, experts=Experts(COUNT, 2, D_FF))
_random = np.random.default_rng(0)
UP = _random.normal(size=(COUNT, D_MODEL, D_FF)).astype(np.float32)
DOWN = _random.normal(size=(COUNT, D_FF, D_MODEL)).astype(np.float32)


def widened(stored):
    return stored.weight.astype(jnp.float32) * stored.scale[:, None]


def test_no_entry_moves_by_more_than_half_a_step_of_its_expert_and_output():
    stored = quantize_experts(jnp.asarray(UP))
    np.testing.assert_allclose(stored.scale, np.abs(UP).max(axis=1) / 127, rtol=1e-6)
    assert (np.abs(widened(stored) - UP) <= stored.scale[:, None] * (0.5 + 1e-4)).all()
    with pytest.raises(InputError, match="not finite"):
        quantize_experts(jnp.full((1, 2, 2), jnp.nan))


@pytest.mark.parametrize(("form", "capacity"), [("loop", None), ("batched", None), ("ragged", None), ("batched", 0.7)])
def test_every_form_is_that_of_the_rounded_matrices(form, capacity):
    """Also where an expert's capacity drops some, and with padding."""
    x = jnp.asarray(_random.normal(size=(13, D_MODEL)), jnp.float32)
    chosen = jnp.asarray(np.argsort(_random.normal(size=(13, COUNT)), axis=1)[:, :2], jnp.int32)

    @jax.jit
    def run(up, down):
        def through(rows, product):
            return product(jnp.tanh(product(rows, up)), down)

        return through_experts(x, chosen, jnp.arange(13) < 11, COUNT, through, capacity, form)

    stored = [quantize_experts(jnp.asarray(matrices)) for matrices in (UP, DOWN)]
    (found, taken), (expected, _) = run(*stored), run(*map(widened, stored))
    assert np.abs(expected).max() > 1
    assert np.asarray(taken)[:11].all() == (capacity is None)
    assert not np.asarray(taken)[11:].any()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("product", [loop_product, batched_product])
def test_no_product_of_few_blocks_widens_the_table(product):
    shapes = (
        jax.ShapeDtypeStruct((2, 1, 64), jnp.float32),
        Int8Experts(jax.ShapeDtypeStruct((128, 64, 64), jnp.int8), jax.ShapeDtypeStruct((128, 64), jnp.float32)),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    memory = jax.jit(product).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 128 * 64 * 64


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_prepared_experts_take_a_byte_an_entry(weights):
    """And decode reads as many of them as are chosen."""
    shapes = jax.eval_shape(functools.partial(init, CONFIG), jax.random.key(0))

    def tree(weights):
        return jax.eval_shape(functools.partial(prepare, CONFIG, weights=weights), shapes)

    made = tree(weights)["layers"][0]["feed_forward"]["experts"]
    assert all(isinstance(stored, Int8Experts) for stored in made.values())
    assert bytes_of(made) == COUNT * (3 * 16 * D_FF + 4 * (2 * D_FF + 16))

    def read(batch):
        return accounting.decode_step_bytes(CONFIG, tree(weights), batch, 4)["weights"]

    assert read(10_000) - read(1) == pytest.approx(bytes_of(made) / 2)


def test_a_prepared_model_is_near_the_exact_one_and_survives_a_file(random_params, tmp_path):
    params, tokens = random_params(CONFIG), jnp.asarray(_random.integers(0, 32, (2, 6)), jnp.int32)
    run = jax.jit(functools.partial(apply, CONFIG))
    rounded = prepare(CONFIG, params, "int8")
    exact, found = run(params, tokens), run(rounded, tokens)
    assert 0 < np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)
    save_quantized(CONFIG, rounded, tmp_path / "model", "int8")
    config, loaded = load_quantized(tmp_path / "model")
    assert config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(rounded)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)
