"""Laws of a mixture of experts: its routing is the papers', its ways of computing agree, and padding is nobody."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ModelConfig
from model.dispatch import block_size, plan_blocks, plan_capacity, sort_choices, through_experts
from model.grouped import batched_product, loop_product, ragged_product
from model.moe import ExpertFeedForward, Router, losses, route
from model.parts import Experts

D_MODEL, D_FF, COUNT = 8, 12, 8
FORMS = ("loop", "batched", "ragged")

ROUTERS = {
    "mixtral": Experts(COUNT, 2, D_FF, router="softmax_of_chosen"),
    "qwen3": Experts(COUNT, 3, D_FF),
    "qwen2": Experts(COUNT, 3, D_FF, normalise=False, shared_d_ff=10, shared_gate=True),
    "deepseek-v2": Experts(COUNT, 3, D_FF, normalise=False, scale=1.7, groups=4, top_groups=2, shared_d_ff=10),
    "deepseek-v3": Experts(
        COUNT,
        3,
        D_FF,
        router="sigmoid",
        selection_bias=True,
        scale=2.5,
        groups=4,
        top_groups=2,
        group_score="top2",
        shared_d_ff=10,
    ),
    "biased softmax": Experts(COUNT, 2, D_FF, selection_bias=True),
}


def config_of(experts, **changes):
    return ModelConfig(vocab_size=8, d_model=D_MODEL, num_layers=2, num_heads=2, experts=experts, **changes)


def params_of(config, seed=0):
    experts = config.experts.replace(dispatch="dropless", capacity_factor=1.0)  # neither changes a shape
    return random_params_of(config.replace(experts=experts), seed)


@functools.cache
def random_params_of(config, seed):
    shapes = jax.eval_shape(ExpertFeedForward(config).init, jax.random.key(0), jnp.zeros((1, 2, D_MODEL)))
    random = np.random.default_rng(seed)
    draw = lambda leaf: (0.5 * random.normal(size=leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, shapes["params"])


def apply(config, params, x, real=None, inference=False):
    run = lambda params, x, real: ExpertFeedForward(config, inference).apply({"params": params}, x, real)
    return jax.jit(run)(params, x, real)


def tokens(batch=2, seq=7, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, seq, D_MODEL)).astype(np.float32)


routed = jax.jit(route, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def reported(experts, logits, real=None):
    """The losses of these logits alone."""
    real = jnp.ones(logits.shape[0], bool) if real is None else real
    return losses(route(experts, logits), logits, real)


def value_and_gradients(config, params, x, real=None):
    """The output, and gradients with respect to parameters and x of something that weighs every output entry."""
    weigh = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)

    def total(params, x, real):
        y, report = ExpertFeedForward(config).apply({"params": params}, x, real)
        return jnp.sum(weigh * y), (y, report)

    gradients, (y, report) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x, real)
    return y, gradients, report


def assert_close(left, right, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


# ---- an independent implementation: one token at a time, float64


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


def reference(experts, params, x):
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    through = lambda v, up, gate, down: (silu(v @ gate) * (v @ up)) @ down
    weights, y = params["experts"], np.zeros(x.shape)
    for place in np.ndindex(*x.shape[:2]):
        token = x[place].astype(np.float64)
        gates = reference_gates(experts, token @ params["router"]["weight"], params["router"].get("selection_bias"))
        for e, gate in gates.items():
            y[place] += gate * through(token, *(weights[name][e] for name in ("up", "gate", "down")))
        if experts.shared_d_ff:
            shared = through(token, *(params["shared"][name]["weight"] for name in ("up", "gate", "down")))
            if experts.shared_gate:
                shared = shared / (1 + np.exp(-token @ params["shared_gate"]["weight"]))
            y[place] += shared
    return y


@pytest.mark.parametrize("name", ROUTERS)
def test_output_is_that_of_an_independent_implementation(name):
    config = config_of(ROUTERS[name])
    params, x = params_of(config), tokens(seq=20)
    y, report = apply(config, params, x)
    np.testing.assert_allclose(y, reference(config.experts, params, x), rtol=2e-5, atol=2e-5)
    assert report["dropped"] == 0


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v2", "deepseek-v3"])
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


# ---- every way of computing gives the same


@pytest.mark.parametrize("gated", [True, False])
def test_dropless_and_capacity_agree_where_nothing_is_dropped(gated):
    experts = Experts(4, 2, D_FF, capacity_factor=4.0)
    config = config_of(experts, gated=gated)
    params, x = params_of(config), tokens()
    bounded = config.replace(experts=experts.replace(dispatch="capacity"))
    free, limited = (value_and_gradients(c, params, x) for c in (config, bounded))
    assert limited[2]["dropped"] == 0
    assert_close(free, limited)


def dense(x, chosen, gates, weights):
    """Every expert for every token, then those that were chosen."""
    hidden = jnp.tanh(jnp.einsum("td,edf->tef", x, weights["up"]))
    all_outputs = jnp.einsum("tef,efd->ted", hidden, weights["down"])
    return jnp.einsum("tkd,tk->td", jnp.take_along_axis(all_outputs, chosen[..., None], axis=1), gates)


def sparse(form, real, x, chosen, gates, weights):
    through = lambda rows, product: product(jnp.tanh(product(rows, weights["up"])), weights["down"])
    made, _ = through_experts(x, chosen, real, weights["up"].shape[0], through, form=form)
    return jnp.einsum("tkd,tk->td", made, gates)


def dispatch_case(count, top_k, size, seed=0):
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    skew = np.linspace(0, 2, count)  # some experts are chosen often, some perhaps never
    chosen = np.argsort(random.normal(size=(size, count)) + skew, axis=1)[:, -top_k:]
    weights = {"up": normal(count, D_MODEL, D_FF), "down": normal(count, D_FF, D_MODEL)}
    return normal(size, D_MODEL), jnp.asarray(chosen, jnp.int32), normal(size, top_k), weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "top_k", "size"), [(4, 2, 61), (16, 3, 5)])
def test_every_form_is_the_dense_one(form, count, top_k, size):
    x, chosen, gates, weights = dispatch_case(count, top_k, size)
    real = jnp.ones(size, bool)
    total = lambda fn: lambda x, gates, weights: jnp.sum(jnp.sin(fn(x, chosen, gates, weights)))
    sparse_total, dense_total = total(functools.partial(sparse, form, real)), total(dense)
    everything = (0, 1, 2)
    found = jax.jit(jax.value_and_grad(sparse_total, everything))(x, gates, weights)
    assert_close(found, jax.jit(jax.value_and_grad(dense_total, everything))(x, gates, weights))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_lanes_of_a_vmap_are_solo_runs(form, shared):
    lanes = 3
    cases = [dispatch_case(4, 2, 11, seed) for seed in range(lanes)]
    x, chosen, gates, weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    real = jnp.arange(11) < 9
    weights = cases[0][3] if shared else weights

    @jax.jit
    def gradients(x, chosen, gates, weights):
        loss = lambda x, gates, weights: jnp.sum(jnp.sin(sparse(form, real, x, chosen, gates, weights)))
        return jax.value_and_grad(loss, (0, 1, 2))(x, gates, weights)

    together = jax.jit(jax.vmap(gradients, in_axes=(0, 0, 0, None if shared else 0)))(x, chosen, gates, weights)
    for lane, case in enumerate(cases):
        alone = gradients(*case[:3], weights if shared else case[3])
        assert_close(jax.tree.map(lambda leaf, lane=lane: leaf[lane], together), alone)


def test_lanes_of_whole_layers_are_solo_runs():
    config = config_of(ROUTERS["deepseek-v3"])
    solo = [params_of(config, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *solo)
    x = jnp.asarray(tokens())

    @jax.jit
    def gradients(params):
        def total(params):
            y, report = ExpertFeedForward(config).apply({"params": params}, x)
            return jnp.sum(jnp.sin(y)) + report["balance_loss"] + report["router_z_loss"]

        return jax.value_and_grad(total)(params)

    together = jax.jit(jax.vmap(gradients))(stacked)
    for lane, params in enumerate(solo):
        found = jax.tree.map(lambda leaf, lane=lane: leaf[lane], together)
        assert_close(found, gradients(params), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("product", [loop_product, ragged_product])
def test_second_derivatives_are_those_of_the_plain_product(product):
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    weights, group = normal(3, 4, 5), jnp.array([0, 0, 2, 2, 2])
    rows = normal(5, 1, 4)
    forms = {
        loop_product: lambda rows, weights: loop_product(rows, weights, group),
        ragged_product: lambda rows, weights: ragged_product(rows[:, 0], weights, jnp.array([2, 0, 3]))[:, None],
    }

    def slope(function):
        loss = lambda rows, weights: jnp.sum(jnp.sin(function(rows, weights)))
        norm = lambda rows, weights: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(rows, weights))
        return jax.jit(jax.grad(norm, (0, 1)))(rows, weights)

    assert_close(slope(forms[product]), slope(lambda rows, weights: batched_product(rows, weights, group)))


@functools.partial(jax.jit, static_argnums=2)
def block_plan(chosen, real, count):
    return plan_blocks(sort_choices(chosen, real, count), block_size(chosen.size, count))


@pytest.mark.parametrize(("size", "top_k", "count"), [(1, 1, 8), (1, 4, 4), (37, 2, 3), (64, 2, 8), (300, 1, 2)])
def test_blocks_hold_every_choice_once_whatever_the_balance(size, top_k, count):
    random = np.random.default_rng(size)
    for skew in (0.0, 1.0, 50.0):
        draw = random.normal(size=(size, count)) + skew * np.arange(count)
        chosen = np.argsort(draw, axis=1)[:, -top_k:].astype(np.int32)
        real = random.uniform(size=size) < 0.8
        slot, source, expert = (np.asarray(part) for part in block_plan(chosen, real, count))
        for choice in range(size * top_k):
            token, rank = choice % size, choice // size
            if not real[token]:
                assert slot[choice] == source.size
                continue
            assert source.flat[slot[choice]] == choice
            assert expert[slot[choice] // source.shape[1]] == chosen[token, rank]
        assert (source < size * top_k).sum() == real.sum() * top_k


def test_one_token_reads_only_its_experts():
    """Blocks of one row, as many as choices: the cost of a decode step does not grow with the number of experts."""
    plan = block_plan(np.array([[5, 90, 17]], np.int32), np.ones(1, bool), 128)
    assert plan.source.shape == (3, 1)
    assert plan.expert.tolist() == [5, 17, 90]


# ---- capacity


def test_an_expert_takes_what_it_can_and_first_choices_go_first():
    """Six tokens: expert 0 is the first choice of three and the second of the others; it has room for four."""
    chosen = jnp.array([[1, 0], [0, 2], [1, 0], [0, 3], [2, 0], [0, 1]])
    plan = jax.jit(lambda chosen: plan_capacity(sort_choices(chosen, jnp.ones(6, bool), 4), capacity=4))(chosen)
    taken = np.asarray(plan.slot < plan.source.size).reshape(2, 6)
    assert taken[0].all()
    assert taken[1].tolist() == [True, True, False, True, False, True]
    assert plan.source[0].tolist() == [1, 3, 5, 6 + 0]


def forced(config, logits_of_experts):
    """Parameters under which every token with a first feature of 1 has these logits."""
    params = jax.tree.map(np.array, params_of(config))
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


# ---- padding


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_padding_changes_nothing_for_real_tokens(dispatch):
    """With NaN in padding, and capacity that would run out if padding took any: 7 of 9 rows, all to two experts."""
    config = config_of(Experts(4, 2, D_FF, dispatch=dispatch, capacity_factor=1.6, shared_d_ff=6))
    params = forced(config, [9, 8, 0, 0])
    x = tokens(batch=1, seq=9)
    x[..., 0] = 1
    real = np.array([[False, True, True, True, False, True, True, True, True]])
    padded = np.where(real[..., None], x, np.nan).astype(np.float32)
    y, report = apply(config, params, padded, real)
    alone, alone_report = apply(
        config.replace(experts=config.experts.replace(dispatch="dropless")), params, x[:, real[0]]
    )
    np.testing.assert_allclose(y[:, real[0]], alone, rtol=1e-5, atol=1e-6)
    assert_close(report, alone_report)
    assert report["dropped"] == 0
    assert np.isfinite(y).all()
    _, gradients, _ = value_and_gradients(config, params, padded, real)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_batch_of_only_padding_is_finite():
    for dispatch in ("dropless", "capacity"):
        config = config_of(Experts(4, 2, D_FF, dispatch=dispatch))
        y, gradients, report = value_and_gradients(config, params_of(config), tokens(), np.zeros((2, 7), bool))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients, report)))
        assert report["balance_loss"] == report["router_z_loss"] == report["dropped"] == 0


# ---- losses


@pytest.mark.parametrize("router", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_balance_loss_is_one_for_a_uniform_router_and_more_where_all_tokens_lean_the_same_way(router):
    """Where all tokens agree, f and P are ordered alike, so Σ f·P ≥ Σf·ΣP / count (Chebyshev's sum inequality)."""
    experts = Experts(COUNT, 2, D_FF, router=router)
    loss = lambda logits: reported(experts, np.broadcast_to(logits, (5, COUNT)).astype(np.float32))["balance_loss"]
    assert loss(0.7) == pytest.approx(1, abs=1e-6)
    random = np.random.default_rng(0)
    assert all(loss(random.normal(size=COUNT)) > 1.001 for _ in range(50))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_balance_loss_is_one_where_experts_are_used_alike_and_then_pushes_nowhere(router):
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


# ---- gradients and precision


@pytest.mark.parametrize(
    ("name", "dispatch"), [("mixtral", "capacity"), ("qwen2", "dropless"), ("deepseek-v3", "capacity")]
)
def test_gradients_reach_every_parameter_but_the_selection_bias(name, dispatch):
    config = config_of(ROUTERS[name].replace(dispatch=dispatch))
    params = params_of(config)
    if config.experts.selection_bias:  # small, so that every expert has tokens
        params = params | {"router": params["router"] | {"selection_bias": 0.02 * params["router"]["selection_bias"]}}
    _, (gradients, of_x), _ = value_and_gradients(config, params, tokens(seq=30))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all()
        if path[-1].key == "selection_bias":
            assert np.all(leaf == 0)
        else:
            assert np.all(np.abs(leaf).max(axis=tuple(range(leaf.ndim))[-2:]) > 0), path  # for every expert
    assert np.isfinite(of_x).all()


def test_bfloat16_computes_while_the_router_stays_in_float32():
    config = config_of(ROUTERS["qwen2"])
    params, x = params_of(config), jnp.asarray(tokens(), jnp.bfloat16)
    expected, report = apply(config, params, x.astype(jnp.float32))
    y, low_report = apply(config, params, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)
    for name, value in low_report.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, report[name])  # the same to the bit: bfloat16 touched no logit
    prepared = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert apply(config, prepared, x)[0].dtype == jnp.bfloat16
    _, (gradients, _), _ = value_and_gradients(config, params, x)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_in_the_precision_of_its_rows(form):
    x, chosen, gates, weights = dispatch_case(4, 2, 30)
    real = jnp.ones(30, bool)
    run = lambda x, weights: sparse(form, real, x, chosen, gates, weights)
    low = jax.jit(jax.grad(lambda x, weights: jnp.sum(run(x, weights)), (0, 1)))(x.astype(jnp.bfloat16), weights)
    high = jax.jit(jax.grad(lambda x, weights: jnp.sum(run(x, weights)), (0, 1)))(x, weights)
    assert low[0].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in low[1].values())
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


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
