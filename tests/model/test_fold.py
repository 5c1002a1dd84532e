"""Folding muP's and depth's multipliers into the weights changes no output, whatever the architecture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from model import Experts, InputError, Latent, ModelConfig, forward
from model.convert import fold, load_hf, save_hf
from model.parameterization import role_of

BASE = ModelConfig(vocab_size=24, d_model=16, num_layers=2, num_heads=2, d_ff=12, max_seq_len=8)
PLAIN = BASE.replace(norm="layernorm", gated=False, use_bias=True, activation="gelu_tanh", position="learned")
EXPERTS = Experts(count=4, top_k=2, d_ff=6, shared_d_ff=6, shared_gate=True)
LATENT = Latent(kv_rank=6, nope_dim=4, rope_dim=4, v_dim=5, q_rank=6)
ENCODER = PLAIN.replace(stack="encoder", norm_placement="post", num_token_types=2, embedding_norm=True)
TWO_STACKS = BASE.replace(stack="encoder-decoder", num_encoder_layers=1, position="relative", relative_buckets=4)
CONFIGS = {
    "tied": BASE.replace(use_bias=True, head_bias=True, final_softcap=3.0),
    "untied": BASE.replace(tie_embeddings=False, head_bias=True, attention_output_bias=True, attention_scale=0.3),
    "scaled-tied": BASE.replace(scale_embedding=True, embedding_norm=True),
    "scaled-both": PLAIN.replace(scale_embedding=True, scale_logits=True),
    "scaled-untied": PLAIN.replace(scale_embedding=True, scale_logits=True, tie_embeddings=False),
    "post": PLAIN.replace(norm_placement="post", tie_embeddings=False),
    "sandwich": PLAIN.replace(norm_placement="sandwich"),
    "sandwich-offset": BASE.replace(norm_placement="sandwich", norm_offset=True, scale_embedding=True, qk_norm=True),
    "experts": BASE.replace(experts=EXPERTS, use_bias=True, tie_embeddings=False),
    "latent-some-experts": BASE.replace(latent=LATENT, experts=EXPERTS.replace(every=2), attention_output_bias=True),
    "masked-tied": ENCODER.replace(head="masked-language-model", head_bias=True),
    "masked-untied": ENCODER.replace(head="masked-language-model", head_bias=True, tie_embeddings=False),
    "classifier": ENCODER.replace(head="classifier", pooler=True, head_bias=True, norm_placement="pre"),
    "scalar": BASE.replace(head="scalar", head_bias=True),
    "headless": BASE.replace(head="none", scale_embedding=True),
    "two-stacks": TWO_STACKS.replace(scale_logits=True, attention_scale=1.0, gated=False, activation="relu"),
    "two-stacks-sandwich": TWO_STACKS.replace(norm_placement="sandwich", tie_embeddings=False, use_bias=True),
}
RATIOS = {"powers of two": (4, 1), "others": (6, 3)}  # of 16 features and 2 layers
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7) * 5 % 24


def scaled(config, ratios="others"):
    width, depth = RATIOS[ratios]
    return config.replace(parameterization="mup", base_d_model=width, base_num_layers=depth)


@functools.partial(jax.jit, static_argnums=0)
def outputs(config, params):
    inputs = {"encoder_tokens": jnp.asarray(TOKENS[:, :5])} if config.stack == "encoder-decoder" else {}
    return forward(config, params, jnp.asarray(TOKENS), outputs=("final_hidden", "hidden"), **inputs)


def assert_close(ours, theirs, bound=1e-5):
    for name in ("logits", "final_hidden", "hidden"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert np.abs(one - other).max() < bound * np.asarray(one).std(), name


@pytest.mark.parametrize(
    ("name", "ratios"),
    [*((name, "others") for name in CONFIGS), ("tied", "powers of two"), ("experts", "powers of two")],
)
def test_a_folded_model_is_the_same_function(name, ratios, random_params):
    config = scaled(CONFIGS[name], ratios)
    params = random_params(config)
    standard, folded = fold(config, params)
    assert (standard.parameterization, standard.base_d_model, standard.base_num_layers) == ("standard", None, None)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, random_params(standard))
    assert_close(outputs(config, params), outputs(standard, folded))


@pytest.mark.parametrize("name", ["tied", "scaled-tied"])
def test_a_head_is_untied_only_where_it_must_be(name, random_params):
    config = CONFIGS[name]
    deep = config.replace(base_num_layers=1)
    assert fold(deep, random_params(config))[0] == config
    assert not fold(scaled(config), random_params(config))[0].tie_embeddings
    # √(d_model / base) in the logits is what the table's √(base / d_model) makes of the rest.
    both = CONFIGS["scaled-both"]
    assert fold(scaled(both), random_params(both))[0] == both


def test_without_multipliers_nothing_is_copied(random_params):
    for config in (BASE, BASE.replace(parameterization="mup", base_d_model=16, base_num_layers=2)):
        params = random_params(BASE)
        standard, folded = fold(config, params)
        assert standard == BASE
        assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(folded), strict=True))


def test_every_matrix_with_a_multiplier_takes_it(variant, random_params):
    """A matrix that comes to write to the residual stream one day is not forgotten."""
    config = variant.replace(parameterization="mup", base_d_model=6, base_num_layers=7)
    before = traverse_util.flatten_dict(random_params(config))
    after = traverse_util.flatten_dict(fold(config, random_params(config))[1])
    changed = {path for path, leaf in before.items() if after[path] is not leaf}
    takers = {path for path in before if role_of(path) in ("residual", "head")}
    if config.norm_placement == "sandwich":
        takers = {path for path in before if "_post_norm" in "/".join(path) or path == ("head", "weight")}
    assert takers <= changed


def test_bfloat16_parameters_are_rounded_once(random_params):
    config = scaled(CONFIGS["experts"])
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_params(config))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    exact = fold(config, wide)[1]
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact)
    for folded in (fold(config, half)[1], fold(config, wide, dtype="bfloat16")[1]):
        jax.tree.map(np.testing.assert_array_equal, folded, rounded)


def test_scales_near_their_offset_are_not_rounded_away(random_params):
    config = scaled(CONFIGS["sandwich-offset"])
    with pytest.raises(InputError, match=r"bfloat16 cannot represent .*norm_offset.*write float32"):
        fold(config, random_params(config), dtype="bfloat16")
    only_wide = config.replace(base_num_layers=None)
    fold(only_wide, random_params(only_wide), dtype="bfloat16")


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_saved_model_loads_as_the_same_function(name, tmp_path, random_params, assert_same):
    config = scaled(BASE.replace(tie_embeddings=name == "tied"))
    params = random_params(config)
    save_hf(config, params, tmp_path / "saved")
    loaded = load_hf(tmp_path / "saved")
    assert_same(fold(config, params), loaded)
    assert_close(outputs(config, params), outputs(*loaded))
