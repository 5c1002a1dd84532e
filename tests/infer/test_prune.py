"""Pruning: which entries go is the definition's choice, all else stays, and a dropped layer is as if never there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from infer.compress import block_influence, drop_layers, input_norms, prune
from model import ModelConfig
from model.errors import InputError
from model.layout import layer_kinds

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=16)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 8)).astype(np.int32)


def matrices(params):
    """{path: weight [layers, in, out]} of the layers."""
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves if path[-1].key == "weight"}


def test_magnitude_keeps_the_largest_of_every_output(random_params):
    params = random_params(CONFIG)
    pruned = prune(CONFIG, params, "magnitude", 0.25)
    for before, after in zip(matrices(params).values(), matrices(pruned).values(), strict=True):
        kept = after != 0
        assert (kept.sum(axis=1) == before.shape[1] - before.shape[1] // 4).all()
        np.testing.assert_array_equal(after[kept], before[kept])
        largest_gone = np.where(kept, 0, np.abs(before)).max(axis=1)
        smallest_kept = np.where(kept, np.abs(before), np.inf).min(axis=1)
        assert (largest_gone <= smallest_kept).all()


def test_only_the_matrices_of_the_layers_change(random_params):
    config = CONFIG.replace(norm="layernorm", use_bias=True, tie_embeddings=False)
    params = random_params(config)
    pruned = prune(config, params, "magnitude", 0.5)
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), params, pruned)
    for path, is_changed in jax.tree_util.tree_leaves_with_path(changed):
        assert is_changed == (path[0].key == "layers" and path[-1].key == "weight"), path


def test_wanda_weighs_entries_by_the_norm_of_their_inputs():
    """Two outputs of four inputs by hand: input 2 is loud, so that its small weights outweigh larger ones."""
    from infer.compress.sparsity import _kept

    weight = np.array([[0.5, -2.0], [1.0, 0.1], [-0.2, 0.3], [0.9, 0.4]])
    loudness = np.array([1.0, 1.0, 10.0, 0.5])
    kept = _kept(np.abs(weight) * loudness[:, None], 0.5, None)
    np.testing.assert_array_equal(kept, [[False, True], [True, False], [True, True], [False, False]])


@pytest.fixture(scope="module")
def norms(random_params):
    """Norms of the inputs of every matrix of CONFIG."""
    return input_norms(CONFIG, random_params(CONFIG), jnp.asarray(TOKENS))


@pytest.fixture
def norms_known(norms, monkeypatch):
    """Every call for norms compiles; here once is enough."""
    monkeypatch.setattr("infer.compress.sparsity.input_norms", lambda config, params, tokens: norms)


def test_wanda_of_a_model_is_its_definition(random_params, norms):
    params = random_params(CONFIG)
    score = np.abs(params["layers"]["dense"]["feed_forward"]["down"]["weight"])
    score = score * np.asarray(norms["layers", "dense", "feed_forward", "down"])[..., None]
    kept = (
        np.asarray(
            prune(CONFIG, params, "wanda", 0.5, calibration=TOKENS)["layers"]["dense"]["feed_forward"]["down"]["weight"]
        )
        != 0
    )
    assert (kept.sum(axis=1) == 12).all()
    assert (np.where(kept, 0, score).max(axis=1) <= np.where(kept, score, np.inf).min(axis=1)).all()


def test_the_first_layers_norms_are_those_of_the_normalised_embeddings(random_params, norms):
    params = random_params(CONFIG)
    x = np.asarray(params["embedding"]["tokens"])[TOKENS].reshape(-1, CONFIG.d_model)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_epsilon)
    x = x * np.asarray(params["layers"]["dense"]["attention_norm"]["scale"])[0]
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(norms["layers", "dense", "attention", name][0], np.linalg.norm(x, axis=0), rtol=1e-4)


def test_every_matrix_of_every_architecture_has_its_norms(variant, random_params):
    """Traced only: a path that a variant's module does not call through `Linear` would be missing."""
    params = random_params(variant)
    norms = jax.eval_shape(functools.partial(input_norms, variant), params, jnp.asarray(TOKENS))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        if "layers" in names and names[-1] == "weight" and "router" not in names:
            assert norms[names[:-1]].shape == leaf.shape[:-1], names


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_two_of_every_four_neighbours_go(method, random_params, norms_known):
    pruned = prune(CONFIG, random_params(CONFIG), method, pattern="2:4", calibration=TOKENS)
    for weight in matrices(pruned).values():
        layers, d_in, d_out = weight.shape
        assert ((weight.reshape(layers, d_in // 4, 4, d_out) != 0).sum(axis=2) == 2).all()


def test_a_dropped_layer_is_as_if_it_had_never_been(decoder, random_params):
    """What the rest compute is what the full model computes with the layer's two outputs silenced."""
    if decoder.base_num_layers is not None:
        with pytest.raises(InputError, match="cannot lose layers"):
            drop_layers(decoder, random_params(decoder), [0])
        return
    params = random_params(decoder)
    config, rest = drop_layers(decoder, params, [1])
    kinds = layer_kinds(decoder)
    assert layer_kinds(config) == (kinds[0], *kinds[2:])
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    assert jax.tree.map(jnp.shape, rest) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_the_remaining_layers_compute_what_they_computed(random_params, monkeypatch):
    params = random_params(CONFIG)
    config, rest = drop_layers(CONFIG, params, [1])
    silent = jax.tree.map(np.copy, params)
    layer = silent["layers"]["dense"]
    for part, name in (("attention", "output"), ("feed_forward", "down")):
        layer[part][name]["weight"][1] = 0
    run = jax.jit(model.apply, static_argnums=0)
    np.testing.assert_allclose(run(config, rest, TOKENS), run(CONFIG, silent, TOKENS), atol=1e-5)
    influence = block_influence(CONFIG, silent, jnp.asarray(TOKENS))
    assert abs(influence[1]) < 1e-6 < min(influence[0], influence[2])
    monkeypatch.setattr("infer.compress.depth.block_influence", lambda *_: influence)  # it compiles at every call
    chosen, _ = drop_layers(CONFIG, silent, 1, calibration=TOKENS)
    assert chosen == config


def test_what_cannot_be_pruned_raises(random_params):
    params = random_params(CONFIG)
    for call, words in (
        (lambda: prune(CONFIG, params, "magnitude", 1.0), "below 1"),
        (lambda: prune(CONFIG, params, "wanda"), "calibration"),
        (lambda: prune(CONFIG, params, "wandas"), "wanda"),
        (lambda: drop_layers(CONFIG, params, [3]), "no layer 3"),
        (lambda: drop_layers(CONFIG, params, [0, 1, 2]), "must stay"),
        (lambda: drop_layers(CONFIG, params, 1), "calibration"),
        (lambda: prune(CONFIG, params | {"layers": ()}), "infer.prepare"),
    ):
        with pytest.raises(InputError, match=words):
            call()
