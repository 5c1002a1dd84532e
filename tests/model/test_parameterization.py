"""`model/parameterization.py` is table 8 of Yang et al. 2022 and CompleteP's depth rules, for every role."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Experts, ModelConfig, apply, init
from model.parameterization import TABLE, initializer, names_of, output_multiplier, rate_multipliers, role_of
from train import HParams, TrainConfig
from train.optimizer import ORTHOGONALIZED, make_optimizer

STANDARD = ModelConfig(
    vocab_size=32, d_model=32, num_layers=4, num_heads=4, max_seq_len=8, use_bias=True, norm="layernorm",
    tie_embeddings=False, head_bias=True, qk_norm=True,
)  # fmt: skip
MUP = STANDARD.replace(parameterization="mup", base_d_model=8)
DEEP = MUP.replace(base_num_layers=2)
EXPERTS = MUP.replace(experts=Experts(count=4, top_k=2, d_ff=16, shared_d_ff=8, shared_gate=True))


def by_path(tree):
    return {"/".join(names_of(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def shapes(config):
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def rates(config, family):
    return by_path(rate_multipliers(config, shapes(config), family))


def test_mup_at_its_base_is_standard():
    """The same programs, to the letter, start and run it; only a zero readout differs."""
    at_base = STANDARD.replace(parameterization="mup", base_d_model=32, base_num_layers=4)
    inputs = (shapes(STANDARD), jnp.arange(16).reshape(2, 8))
    texts = lambda config: (
        jax.jit(init, static_argnums=0).lower(config, jax.random.key(3)).as_text(),
        jax.jit(apply, static_argnums=0).lower(config, *inputs).as_text(),
    )
    assert texts(STANDARD) == texts(at_base)
    start = lambda role: np.asarray(initializer(at_base.replace(zero_readout=True), role, 4)(jax.random.key(0), (4, 4)))
    assert {role for role in TABLE if not start(role).any()} == {"head", "vector", "adapter_b"}
    for family in ("adam", "sgd", "muon"):
        assert set(rates(at_base, family).values()) == {1.0}


def test_standard_learns_at_one_rate():
    for family in ("adam", "sgd", "muon"):
        assert set(rates(STANDARD, family).values()) == {1.0}


QUICK = {("deep", "adamw"), ("mup", "sgd"), ("deep", "muon")}
LAYER = "layers/dense/"
# w = 4 and l = 2.
EXPECTED = {
    "embedding/tokens": {"adam": 1, "sgd": 4, "muon": 1},
    LAYER + "attention/query/weight": {"adam": 1 / 4, "sgd": 2, "muon": 1 / 2},
    LAYER + "attention/query/bias": {"adam": 1, "sgd": 8, "muon": 1},
    LAYER + "attention/query_norm/scale": {"adam": 1, "sgd": 2, "muon": 1},  # as many as a head has features
    LAYER + "attention/output/weight": {"adam": 1 / 4, "sgd": 2, "muon": 1 / 2},
    LAYER + "attention_norm/scale": {"adam": 1, "sgd": 8, "muon": 1},
    LAYER + "feed_forward/up/weight": {"adam": 1 / 4, "sgd": 2, "muon": 1 / 2},
    LAYER + "feed_forward/down/weight": {"adam": 1 / 4, "sgd": 2, "muon": 1 / 2},
    "final_norm/scale": {"adam": 1, "sgd": 4, "muon": 1},  # outside the layers
    "head/weight": {"adam": 1, "sgd": 4, "muon": 1},
    "head/bias": {"adam": 1, "sgd": 1, "muon": 1},  # as many as the vocabulary has tokens
}


@pytest.mark.parametrize("family", ["adam", "sgd", "muon"])
def test_learning_rates_by_hand(family):
    made = rates(DEEP, family)
    for path, expected in EXPECTED.items():
        assert made[path] == expected[family], path


def test_a_router_is_a_readout_that_does_not_start_at_zero():
    assert rates(EXPERTS, "adam")["layers/experts/feed_forward/router/weight"] == 1 / 4
    assert rates(EXPERTS, "sgd")["layers/experts/feed_forward/shared_gate/weight"] == 1 / 4
    weight = initializer(EXPERTS, "router", 32)(jax.random.key(0), (32, 4))
    assert np.asarray(weight).std() == pytest.approx((32 * 4) ** -0.5, rel=0.1)


def test_output_multipliers():
    assert output_multiplier(DEEP, "head") == 1 / 4
    assert output_multiplier(DEEP, "residual") == 1 / 2
    assert output_multiplier(MUP, "residual") == 1
    assert output_multiplier(STANDARD, "head") == output_multiplier(STANDARD, "residual") == 1


def test_scales_at_the_start_depend_on_what_the_table_says():
    wide = by_path(init(DEEP.replace(d_model=128, num_heads=16), jax.random.key(0)))
    std = lambda path: float(np.asarray(wide[path]).std())
    assert std("embedding/tokens") == pytest.approx(8**-0.5, rel=0.05), "as at the base width"
    assert std(LAYER + "attention/query/weight") == pytest.approx(128**-0.5, rel=0.05)
    assert std(LAYER + "attention/output/weight") == pytest.approx((2 * 2 * 128) ** -0.5, rel=0.05), "base depth"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        pytest.param(config, name, marks=[] if (width, name) in QUICK else pytest.mark.long, id=f"{width}-{name}")
        for width, config in {"standard": STANDARD, "mup": MUP, "deep": DEEP}.items()
        for name in ("adamw", "sgd", "muon")
    ],
)
def test_decay_is_the_same_at_every_width(name, config):
    """With no gradient a step takes learning_rate · weight_decay off every matrix, and nothing off vectors."""
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes(config))
    optimizer = make_optimizer(config, TrainConfig(optimizer=name), HParams(weight_decay=0.25))
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(nothing, optimizer.init(params), params)
    for path, update in by_path(updates).items():
        role = role_of(tuple(path.split("/")))
        np.testing.assert_array_equal(update, 0.0 if role == "vector" else 0.25, err_msg=path)


@functools.cache
def update_of(config, name):
    """One update from a fresh state, of given parameters by given gradients: compiled once."""
    optimizer = make_optimizer(config, TrainConfig(optimizer=name), HParams(weight_decay=0.0, beta1=0.5, epsilon=1e-12))
    update = jax.jit(optimizer.update)
    return lambda params, grads: update(grads, optimizer.init(params), params)[0]


@pytest.fixture(scope="module")
def gradients():
    random = np.random.default_rng(0)
    config = EXPERTS.replace(num_layers=2, head_bias=False)
    return config, jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes(config))


@pytest.mark.parametrize(("name", "family"), [("adamw", "adam"), ("sgd", "sgd"), ("muon", "muon")])
def test_updates_are_multiplied_by_the_table(gradients, name, family):
    config, grads = gradients
    standard = config.replace(parameterization="standard")
    plain, scaled = (by_path(update_of(made, name)(grads, grads)) for made in (standard, config))
    for path, rate in rates(config, family).items():
        np.testing.assert_allclose(scaled[path], rate * plain[path], rtol=1e-6, err_msg=path)


def test_sgd_is_momentum(gradients):
    config, grads = gradients
    optimizer = make_optimizer(STANDARD, TrainConfig(optimizer="sgd"), HParams(weight_decay=0.0, beta1=0.5))
    state, update = optimizer.init(grads), jax.jit(optimizer.update)
    for factor in (1.0, 1.5, 1.75):
        updates, state = update(grads, state, grads)
        for made, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(made, factor * grad, rtol=1e-5)
    assert config.parameterization == "mup"


def test_muon_orthogonalises_every_matrix_on_its_own(gradients):
    """Singular values near 0.2 · √max(fan_in, fan_out): entries of Adam's size. The other roles get Adam's update."""
    config, grads = gradients
    config = config.replace(parameterization="standard")

    # Matrices of very different sizes in one stack: were they taken together, the small ones would stay small.
    def conditioned(leaf):
        if leaf.ndim < 3:
            return leaf
        left, values, right = np.linalg.svd(leaf, full_matrices=False)
        sizes = 10.0 ** np.arange(np.prod(leaf.shape[:-2])).reshape(*leaf.shape[:-2], 1, 1)
        return (sizes * (left * np.linspace(1, 0.2, values.shape[-1])) @ right).astype(np.float32)

    grads = jax.tree.map(conditioned, grads)
    made, adam = (by_path(update_of(config, name)(grads, grads)) for name in ("muon", "adamw"))
    seen = 0
    for path, update in made.items():
        if role_of(tuple(path.split("/"))) not in ORTHOGONALIZED:
            np.testing.assert_allclose(update, adam[path], rtol=1e-5, err_msg=path)
            continue
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * max(update.shape[-2:]) ** 0.5)
        assert values.shape[:-1] == update.shape[:-2]
        assert values.min() > 0.5, path
        assert values.max() < 1.3, path
        seen += values[..., 0].size
    assert seen == 2 * (4 + 3 * 4 + 3)  # attention, four experts, the shared one
