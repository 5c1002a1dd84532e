"""Laws of a mixture of experts: routing as in the papers, capacity drops the last choices, padding counts nowhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ModelConfig
from model.moe import ExpertFeedForward, Router, losses, route
from model.parts import Experts

D_MODEL, D_FF, COUNT = 8, 12, 8

GROUPS = {"groups": 4, "top_groups": 2, "shared_d_ff": 10}
ROUTERS = {
    "mixtral": Experts(COUNT, 2, D_FF, router="softmax_of_chosen"),
    "qwen3": Experts(COUNT, 3, D_FF),
    "qwen2": Experts(COUNT, 3, D_FF, normalise=False, shared_d_ff=10, shared_gate=True),
    "deepseek-v2": Experts(COUNT, 3, D_FF, normalise=False, scale=1.7, **GROUPS),
    "deepseek-v3": Experts(
        COUNT, 3, D_FF, router="sigmoid", selection_bias=True, scale=2.5, group_score="top2", **GROUPS
    ),
    "biased softmax": Experts(COUNT, 2, D_FF, selection_bias=True),
}
# Layers that have every part between them; where an expert's room is bounded, there is enough for all tokens.
LAYERS = {
    "ungated": (ROUTERS["mixtral"].replace(dispatch="capacity", capacity_factor=COUNT / 2), False),
    "shared gate": (ROUTERS["qwen2"], True),
    "groups": (ROUTERS["deepseek-v3"], True),
}


def config_of(experts, gated=True):
    return ModelConfig(vocab_size=8, d_model=D_MODEL, num_layers=2, num_heads=2, experts=experts, gated=gated)


def params_of(config, seed=0):
    shapes = jax.eval_shape(ExpertFeedForward(config).init, jax.random.key(0), jnp.zeros((1, 2, D_MODEL)))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * random.normal(size=leaf.shape)).astype(np.float32), shapes["params"])


def tokens(seq=7):
    return np.random.default_rng(1).normal(size=(2, seq, D_MODEL)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="inference")
def apply(config, params, x, inference=False):
    return ExpertFeedForward(config, inference).apply({"params": params}, x)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(config, params, x, real=None):
    """The output, gradients by parameters and x of something that weighs every output entry, and the report."""
    weigh = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)

    def total(params, x):
        y, report = ExpertFeedForward(config).apply({"params": params}, x, real)
        return jnp.sum(weigh * y), (y, report)

    gradients, (y, report) = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return y, gradients, report


routed = jax.jit(route, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def reported(experts, logits, real=None):
    """The losses of these logits alone."""
    real = jnp.ones(logits.shape[0], bool) if real is None else real
    return losses(route(experts, logits), logits, real)


def assert_close(left, right, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def silu(z):
    return z / (1 + np.exp(-z))


def reference_gates(experts, logits, bias):
    """{expert: gate} of one token."""
    scores = 1 / (1 + np.exp(-logits)) if experts.router == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    preference = scores if bias is None else scores + bias
    members = np.split(np.arange(experts.count), experts.groups)
    best = {"max": lambda m: max(preference[m]), "top2": lambda m: sum(sorted(preference[m])[-2:])}
    allowed = sorted(members, key=lambda m: best[experts.group_score](m))[-experts.top_groups :]
    chosen = sorted((e for group in allowed for e in group), key=lambda e: preference[e])[-experts.top_k :]
    total = sum(scores[e] for e in chosen)
    normalised = experts.normalise or experts.router == "softmax_of_chosen"
    return {e: experts.scale * scores[e] / (total if normalised else 1) for e in chosen}


def reference(config, params, x):
    """An independent implementation: one token at a time, float64."""
    experts, params = config.experts, jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    inner = lambda v, p: silu(v @ p["gate"]) * (v @ p["up"]) if config.gated else silu(v @ p["up"])
    through = lambda v, p: inner(v, p) @ p["down"]
    y = np.zeros(x.shape)
    for place in np.ndindex(*x.shape[:2]):
        token = x[place].astype(np.float64)
        gates = reference_gates(experts, token @ params["router"]["weight"], params["router"].get("selection_bias"))
        for e, gate in gates.items():
            y[place] += gate * through(token, {name: matrices[e] for name, matrices in params["experts"].items()})
        if experts.shared_d_ff:
            shared = through(token, {name: linear["weight"] for name, linear in params["shared"].items()})
            if experts.shared_gate:
                shared = shared / (1 + np.exp(-token @ params["shared_gate"]["weight"]))
            y[place] += shared
    return y


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_an_independent_implementation_and_learn(name):
    """Gradients reach every parameter of every expert, but not the selection bias."""
    config, x = config_of(*LAYERS[name]), tokens(seq=30)
    params = params_of(config)
    if config.experts.selection_bias:  # small, so that every expert has tokens
        params["router"]["selection_bias"] *= 0.02
    y, (gradients, of_x), report = value_and_gradients(config, params, x)
    np.testing.assert_allclose(y, reference(config, params, x), rtol=2e-5, atol=2e-5)
    assert report["dropped"] == 0
    assert np.isfinite(of_x).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all()
        if path[-1].key == "selection_bias":
            assert np.all(leaf == 0)
        else:
            assert np.all(np.abs(leaf).max(axis=tuple(range(leaf.ndim))[-2:]) > 0), path  # for every expert


@pytest.mark.parametrize("name", ROUTERS)
def test_gates_and_choices_are_those_of_an_independent_implementation(name):
    experts = ROUTERS[name]
    random = np.random.default_rng(3)
    logits = (2 * random.normal(size=(200, COUNT))).astype(np.float32)
    bias = (0.3 * random.normal(size=COUNT)).astype(np.float32) if experts.selection_bias else None
    routing = jax.tree.map(np.asarray, routed(experts, logits, bias))
    np.testing.assert_allclose(routing.probabilities.sum(-1), 1, rtol=1e-5)
    for token in range(len(logits)):
        gates = reference_gates(experts, logits[token].astype(np.float64), bias)
        assert set(gates) == set(routing.chosen[token].tolist())
        found = dict(zip(routing.chosen[token].tolist(), routing.gates[token].tolist(), strict=True))
        assert found == pytest.approx(gates, rel=1e-5)


def test_masked_experts_are_never_chosen_even_where_all_others_are_worse():
    experts = Experts(COUNT, 4, D_FF, router="sigmoid", selection_bias=True, groups=4, top_groups=2)
    logits = 3 * jax.random.normal(jax.random.key(0), (500, COUNT))
    bias = jnp.array([-9.0, 0, -8, 0, -7, 0, -6, 0])  # in every group one expert looks worse than nothing
    chosen = np.asarray(routed(experts, logits, bias).chosen)
    assert all(len(set(row // 2)) == 2 and len(set(row)) == 4 for row in chosen)


def test_lanes_of_whole_layers_are_solo_runs():
    config, x = config_of(*LAYERS["groups"]), tokens(seq=30)
    solo = [params_of(config, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *solo)
    together = jax.jit(jax.vmap(lambda params: value_and_gradients(config, params, x)))(stacked)
    for lane, params in enumerate(solo):
        found = jax.tree.map(lambda leaf, lane=lane: leaf[lane], together)
        assert_close(found, value_and_gradients(config, params, x), rtol=1e-3, atol=1e-4)


def test_bfloat16_computes_while_the_router_stays_in_float32():
    config, x = config_of(*LAYERS["shared gate"]), jnp.asarray(tokens(seq=30), jnp.bfloat16)
    params = params_of(config)
    expected, _, report = value_and_gradients(config, params, x.astype(jnp.float32))
    y, (gradients, _), low_report = value_and_gradients(config, params, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)
    for name, value in low_report.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, report[name])  # the same to the bit: bfloat16 touched no logit
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    prepared = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert apply(config, prepared, x)[0].dtype == jnp.bfloat16


def test_parameters_start_at_the_scale_of_their_role():
    config = config_of(Experts(64, 2, 32, selection_bias=True)).replace(d_model=64, num_layers=8)
    params = jax.jit(ExpertFeedForward(config).init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    std = lambda *path: float(jnp.std(functools.reduce(lambda tree, name: tree[name], path, params)))
    assert std("experts", "up") == pytest.approx(64**-0.5, rel=0.02)
    assert std("experts", "gate") == pytest.approx(64**-0.5, rel=0.02)
    assert std("experts", "down") == pytest.approx((2 * 32 * 8) ** -0.5, rel=0.02)
    assert std("router", "weight") == pytest.approx(64**-0.5, rel=0.1)
    assert np.all(params["router"]["selection_bias"] == 0)
    logits, bias = Router(config, config.experts).apply({"params": params["router"]}, jnp.ones((3, 64), jnp.bfloat16))
    assert logits.dtype == bias.dtype == jnp.float32


def forced(config, logits_of_experts):
    """Parameters under which every token with a first feature of 1 has these logits."""
    params = params_of(config)
    params["router"]["weight"][:] = 0
    params["router"]["weight"][0] = logits_of_experts
    return params


def test_dropped_share_under_a_forced_imbalance():
    """All 14 tokens choose experts 0 and 1; each has room for ceil(1.25 · 28 / 4) = 9."""
    config = config_of(Experts(4, 2, D_FF, dispatch="capacity"))
    params = forced(config, [9, 8, 0, 0])
    x = tokens()
    x[..., 0] = 1
    y, report = apply(config, params, x)
    assert report["dropped"] == pytest.approx(10 / 28)
    np.testing.assert_allclose(report["expert_use"], [0.5, 0.5, 0, 0], rtol=1e-6)
    flat = np.asarray(y).reshape(14, -1)
    assert np.all(flat[9:] == 0)
    free, report = apply(config, params, x, inference=True)  # dropless whatever the config says
    assert report["dropped"] == 0
    np.testing.assert_allclose(flat[:9], np.asarray(free).reshape(14, -1)[:9], rtol=1e-5)
    assert np.all(np.abs(np.asarray(free).reshape(14, -1)[9:]).max(-1) > 1e-3)


# Capacity has room for twelve of the fourteen tokens.
DROPLESS, BOUNDED = (
    config_of(Experts(4, 2, D_FF, shared_d_ff=6, dispatch=dispatch, capacity_factor=12 / 7))
    for dispatch in ("dropless", "capacity")
)


def test_dropless_and_capacity_agree_where_nothing_is_dropped():
    params, x, real = params_of(DROPLESS), tokens(), np.ones((2, 7), bool)
    free, limited = (value_and_gradients(config, params, x, real) for config in (DROPLESS, BOUNDED))
    assert limited[2]["dropped"] == 0
    assert_close(free, limited)


@pytest.mark.parametrize("config", [DROPLESS, BOUNDED], ids=["dropless", "capacity"])
def test_padding_changes_nothing_for_real_tokens(config):
    """With NaN in padding, and capacity that would run out if padding took any: eleven tokens, all to two experts."""
    params, x = forced(config, [9, 8, 0, 0]), tokens()
    x[..., 0] = 1
    real = np.array([[False, True, True, True, False, True, True], [True] * 6 + [False]])
    padded = np.where(real[..., None], x, np.nan).astype(np.float32)
    y, gradients, report = value_and_gradients(config, params, padded, real)
    alone, alone_report = apply(DROPLESS, params, x[real][None])
    np.testing.assert_allclose(np.asarray(y)[real], alone[0], rtol=1e-5, atol=1e-6)
    assert_close(report, alone_report)
    assert report["dropped"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))

    y, gradients, report = value_and_gradients(config, params, x, np.zeros((2, 7), bool))  # nothing but padding
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients, report)))
    assert report["balance_loss"] == report["router_z_loss"] == report["dropped"] == 0


@pytest.mark.parametrize("router", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_balance_loss_is_one_for_a_uniform_router_and_more_where_all_tokens_lean_the_same_way(router):
    """Where all tokens agree, f and P are ordered alike, so Σ f·P ≥ Σf·ΣP / count (Chebyshev's sum inequality)."""
    experts = Experts(COUNT, 2, D_FF, router=router)
    loss = lambda logits: reported(experts, np.broadcast_to(logits, (5, COUNT)).astype(np.float32))["balance_loss"]
    assert loss(0.7) == pytest.approx(1, abs=1e-6)
    random = np.random.default_rng(0)
    assert all(loss(random.normal(size=COUNT)) > 1.001 for _ in range(50))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_balance_loss_is_one_and_has_no_gradient_where_experts_are_used_equally(router):
    experts = Experts(4, 1, D_FF, router=router)
    logits = (3 * np.eye(4) + 0.1 * np.random.default_rng(0).normal(size=(4, 4))).astype(np.float32)
    value, slope = jax.jit(jax.value_and_grad(lambda logits: reported(experts, logits)["balance_loss"]))(logits)
    assert value == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_descent_on_the_balance_loss_spreads_the_tokens():
    experts = Experts(COUNT, 2, D_FF)
    x = jax.random.normal(jax.random.key(0), (64, D_MODEL)) + 1  # what tokens have in common favours some experts
    weight = jax.random.normal(jax.random.key(1), (D_MODEL, COUNT))
    before = reported(experts, x @ weight)
    slope = jax.grad(lambda weight: reported(experts, x @ weight)["balance_loss"])
    weight = jax.jit(lambda weight: jax.lax.fori_loop(0, 100, lambda _, w: w - 0.5 * slope(w), weight))(weight)
    after = reported(experts, x @ weight)
    assert before["balance_loss"] > 2 > 1.2 > after["balance_loss"]
    assert after["expert_use"].max() < 0.5 * before["expert_use"].max()


def test_router_z_loss_and_expert_use():
    experts = Experts(COUNT, 3, D_FF)
    logits = jax.random.normal(jax.random.key(0), (6, COUNT))
    real = jnp.array([True, False, True, True, True, False])
    routing, report = routed(experts, logits), reported(experts, logits, real)
    expected = np.mean(np.log(np.exp(np.asarray(logits)[np.asarray(real)]).sum(-1)) ** 2)
    assert report["router_z_loss"] == pytest.approx(expected, rel=1e-5)
    counts = np.bincount(np.asarray(routing.chosen)[np.asarray(real)].ravel(), minlength=COUNT)
    np.testing.assert_allclose(report["expert_use"], counts / counts.sum(), rtol=1e-6)
    assert report["expert_use"].sum() == pytest.approx(1)
