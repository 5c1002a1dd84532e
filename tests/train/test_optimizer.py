"""Every optimizer's update is its paper's, for any hyperparameters, and covers every parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ModelConfig
from model.adapters import first_columns
from train import HParams, TrainConfig
from train.config import stack_hparams
from train.optimizer import clip_by_norm, make_optimizer

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=2, max_seq_len=16)
OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "lion", "muon")
SHAPES = {
    "embedding": {"tokens": (5, 4)},
    "layers": {"dense": {"attention": {"query": {"weight": (3, 4, 6)}}, "attention_norm": {"scale": (3, 4)}}},
}
# Axes of 128 are factored, but never those that count layers, be they the longest.
WIDE = {
    "embedding": {"tokens": (128, 130)},
    "layers": {"dense": {"attention": {"query": {"weight": (2, 129, 128)}, "key": {"weight": (140, 2, 128)}}}},
    "final_norm": {"scale": (128,)},
    "encoder": {"layers": {"dense": {"attention_norm": {"scale": (130, 128)}}}},
}


def draw(shapes, seed, scale=1.0):
    random = np.random.default_rng(seed)
    array = lambda shape: (scale * random.normal(size=shape)).astype(np.float32)
    return jax.tree.map(array, shapes, is_leaf=lambda node: isinstance(node, tuple))


def updates_of(name, hparams, shapes=SHAPES, config=CONFIG, steps=2):
    """The updates of so many steps on parameters that stay as they are."""
    optimizer = make_optimizer(config, TrainConfig(optimizer=name), hparams)
    params = draw(shapes, 0)
    state, made = optimizer.init(params), []
    for step in range(steps):
        # Gradients grow tenfold: a second moment that is mixed wrongly shows.
        updates, state = optimizer.update(draw(shapes, 1 + step, 10.0**step), state, params)
        made.append(updates)
    return made


def check(name, hparams, by_hand, shapes=SHAPES):
    """by_hand(gradients, parameter, decays, stacked axes) → the updates of one leaf in float64."""
    made = jax.jit(functools.partial(updates_of, name, shapes=shapes))(hparams)
    params, grads = draw(shapes, 0), [draw(shapes, 1 + step, 10.0**step) for step in range(len(made))]
    for index, (path, param) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        is_vector = path[-1].key == "scale"
        leaves = [jax.tree.leaves(tree)[index].astype(np.float64) for tree in grads]
        expected = by_hand(leaves, param.astype(np.float64), not is_vector, param.ndim - (1 if is_vector else 2))
        for step, update in enumerate(expected):
            found = jax.tree.leaves(made[step])[index]
            np.testing.assert_allclose(found, update, rtol=2e-5, atol=1e-6, err_msg=f"{path}, step {step + 1}")


def adam_by_hand(grads, beta1, beta2, epsilon):
    first = second = 0.0
    for step, grad in enumerate(grads, 1):
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
        yield first / (1 - beta1**step) / (np.sqrt(second / (1 - beta2**step)) + epsilon)


def test_adam_adds_its_decay_to_the_gradient():
    """Kingma and Ba 2015, algorithm 1, with weight decay as an L2 loss, as in PyTorch's Adam."""

    def by_hand(grads, param, decays, _):
        return adam_by_hand([grad + 0.3 * param * decays for grad in grads], 0.8, 0.9, 1e-3)

    check("adam", HParams(weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3), by_hand)


def test_adamw_adds_its_decay_to_the_update():
    def by_hand(grads, param, decays, _):
        return [update + 0.3 * param * decays for update in adam_by_hand(grads, 0.8, 0.9, 1e-3)]

    check("adamw", HParams(weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3), by_hand)


def test_sgd_has_momentum():
    def by_hand(grads, param, decays, _):
        momentum = 0.0
        for grad in grads:
            momentum = 0.7 * momentum + grad
            yield momentum + 0.2 * param * decays

    check("sgd", HParams(weight_decay=0.2, beta1=0.7), by_hand)


def test_lion_is_the_sign_of_an_interpolation():
    """Chen et al. 2023, algorithm 2."""

    def by_hand(grads, param, decays, _):
        momentum = 0.0
        for grad in grads:
            yield np.sign(0.6 * momentum + 0.4 * grad) + 0.2 * param * decays
            momentum = 0.9 * momentum + 0.1 * grad

    check("lion", HParams(weight_decay=0.2, beta1=0.6, beta2=0.9), by_hand)


def adafactor_by_hand(grads, param, decays, stacked):
    """Shazeer and Stern 2018, algorithms 4 and 5, on every matrix or vector of the stack alone."""
    if stacked:
        parts = [
            list(adafactor_by_hand([grad[index] for grad in grads], param[index], decays, stacked - 1))
            for index in range(len(param))
        ]
        return [np.stack(step) for step in zip(*parts, strict=True)]
    made, row, column, whole = [], 0.0, 0.0, 0.0
    for step, grad in enumerate(grads, 1):
        keep, square = 1 - step**-0.8, grad**2 + 1e-30
        if grad.ndim == 2 and min(grad.shape) >= 128:
            row = keep * row + (1 - keep) * square.mean(axis=1)
            column = keep * column + (1 - keep) * square.mean(axis=0)
            second = np.outer(row, column) / row.mean()
        else:
            second = whole = keep * whole + (1 - keep) * square
        update = grad / np.sqrt(second)
        made.append(update / max(1.0, np.sqrt((update**2).mean())) + 0.2 * param * decays)
    return made


def test_adafactor_factors_every_matrix_alone():
    check("adafactor", HParams(weight_decay=0.2), adafactor_by_hand, WIDE)
    check("adafactor", HParams(weight_decay=0.2), adafactor_by_hand)


def test_adafactor_keeps_rows_and_columns_only():
    optimizer = make_optimizer(CONFIG, TrainConfig(optimizer="adafactor"), HParams())
    params = draw(WIDE, 0)
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in _leaves(jax.eval_shape(optimizer.init, params))}
    matrix = sum(size for path, size in sizes.items() if "query" in path)
    assert matrix == 2 * (129 + 128 + 1 + 1), "with one number in place of what is factored, and a count"


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hyperparameters_are_data(name):
    """vmapped over their values = one by one, and no value compiles anything."""
    values = [
        HParams(weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        HParams(weight_decay=0.0, beta1=0.5, beta2=0.7, epsilon=1e-2),
    ]
    update = jax.jit(functools.partial(updates_of, name))
    together = jax.jit(jax.vmap(functools.partial(updates_of, name)))(stack_hparams(values))
    for index, hparams in enumerate(values):
        for lane, alone in zip(jax.tree.leaves(together), jax.tree.leaves(update(hparams)), strict=True):
            np.testing.assert_allclose(lane[index], alone, rtol=1e-5, atol=1e-6)
    assert update._cache_size() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_role_is_an_error(name):
    optimizer = make_optimizer(CONFIG, TrainConfig(optimizer=name), HParams())
    with pytest.raises(KeyError, match="layers/dense/novelty has no role"):
        optimizer.init({"layers": {"dense": {"novelty": jnp.ones((2, 3))}}})


@pytest.mark.parametrize("name", ["lion", "adafactor", "adam"])
def test_hidden_matrices_of_a_wide_model_learn_slower(name):
    """Under muP by 1/w, as with Adam: the entries of these updates do not shrink with the gradient."""
    wide = CONFIG.replace(d_model=64, parameterization="mup", base_d_model=16)
    hparams = HParams(weight_decay=0.0)
    made = (functools.partial(updates_of, name, config=config, steps=1) for config in (CONFIG, wide))
    (at_base,), (scaled,) = (jax.jit(updates)(hparams) for updates in made)
    for path, update in _leaves(scaled):
        factor = 0.25 if path[-1].key == "weight" else 1.0
        expected = factor * dict(_leaves(at_base))[path]
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def factors(d_in, rank, d_out):
    return {"layers": {"dense": {"attention": {"query": {"weight": {"a": (2, d_in, rank), "b": (2, rank, d_out)}}}}}}


def cut(tree, rank):
    """The tree of an adapter with zeros beyond the first columns of a and rows of b."""
    keep = lambda path, leaf: np.arange(leaf.shape[-1]) if path[-1].key == "a" else np.arange(leaf.shape[-2])[:, None]
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * (keep(path, leaf) < rank), tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("sizes", "rank"), [((6, 4, 5), 2), ((140, 130, 129), 3), ((140, 130, 129), 129)])
def test_a_lane_of_a_smaller_rank_is_an_adapter_of_that_rank_alone(name, sizes, rank):
    """Masked columns have no gradient: their updates are zero, and nothing that others are scaled by counts them."""
    shapes, hparams = factors(*sizes), HParams(weight_decay=0.1, beta1=0.8, lora_rank=rank)

    @jax.jit
    def updates(params, grads, hparams):
        optimizer = make_optimizer(CONFIG, TrainConfig(optimizer=name), hparams)
        state, made = optimizer.init(params), []
        for grad in grads:
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grad)))
            update, state = optimizer.update(clip_by_norm(grad, norm, jnp.float32(20.0)), state, params)
            made.append(update)
        return made

    whole = [cut(draw(shapes, seed, 10.0**seed), rank) for seed in range(4)]
    small = [first_columns(tree, rank) for tree in whole]
    lane, alone = (updates(params, grads, hparams) for params, *grads in (whole, small))
    for ours, theirs in zip(lane, alone, strict=True):
        same = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
        jax.tree.map(same, first_columns(ours, rank), theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, cut(ours, rank))
