"""Low-rank adapters: the attached model is the merged one, however it runs, and a lane is its solo run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from infer import prepare
from infer.compress import prune
from model import Execution, Experts, InputError, Latent, ModelConfig, apply, forward, init, init_cache, presets
from model.adapters import TARGETS, Adapter, adapted, attach, first_columns, fold, init_adapter, mask_and_scale
from model.convert import save_hf
from model.grouped import batched_product, loop_product, own_product, ragged_product
from model.parameterization import rate_multipliers
from model.quantize import KINDS, quantize_layers
from model.quantized import save_quantized
from model.sharding import abstract_mesh, shardings
from model.transformer import forward_cached
from model.weights import Int4, LowRank, is_weight, matmul, merged, plain

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=16)
MUP = CONFIG.replace(parameterization="mup", base_d_model=4, base_num_layers=1, gated=False, use_bias=True)
LATENT = CONFIG.replace(
    num_kv_heads=None,
    latent=Latent(kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5, q_rank=10),
    experts=Experts(count=4, top_k=2, d_ff=12, shared_d_ff=8, every=2),
)
EXPERTS = CONFIG.replace(experts=Experts(count=4, top_k=2, d_ff=12), tie_embeddings=False)
ADAPTER = Adapter(rank=4, alpha=6.0)
FURTHER = ADAPTER.replace(targets=("value", "experts", "head"))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)
KEY = jax.random.key(3)


def trained(config, adapter=ADAPTER, seed=0, params=None):
    """An adapter whose b is not zero, drawn without a program."""
    base = jax.eval_shape(functools.partial(init, config), KEY) if params is None else params
    tree = jax.eval_shape(functools.partial(init_adapter, config, adapter), base, KEY)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        bound = leaf.shape[-2] ** -0.5
        of_a = path[-1].key == "a"
        value = random.uniform(-bound, bound, leaf.shape) if of_a else 0.3 * random.normal(size=leaf.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


@functools.partial(jax.jit, static_argnums=(0, 2))
def outputs(config, params, scan=True):
    """Logits, and the final hidden states of the last token."""
    execution = Execution(scan_layers=scan)
    out = forward(config, params, TOKENS, outputs=("hidden", "final_hidden"), execution=execution)
    return out.logits, out.final_hidden[:, -1]


def cached(config, params):
    """Final hidden states of the last token, from a chunk and then a token."""
    step = jax.jit(functools.partial(forward_cached, config))
    cache = init_cache(config, len(TOKENS), 12)
    for start, stop in ((0, 8), (8, 9)):
        chunk = TOKENS[:, start:stop]
        hidden, cache = step(params, chunk, jnp.full(len(TOKENS), stop - start, jnp.int32), cache)
    return hidden


@pytest.mark.parametrize(
    ("config", "adapter"),
    [(CONFIG, ADAPTER), (MUP, ADAPTER), (LATENT, ADAPTER), (EXPERTS, FURTHER)],
    ids=["plain", "mup", "latent-experts", "of-experts-and-head"],
)
def test_attached_is_merged_scanned_unrolled_and_cached(config, adapter, random_params):
    params = jax.tree.map(jnp.asarray, random_params(config))
    with_adapter = attach(params, trained(config, adapter), *mask_and_scale(adapter))
    merged = fold(with_adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    expected, hidden = outputs(config, merged)
    assert np.abs(expected - outputs(config, params)[0]).max() > 0.1
    for scan in (True, False):
        np.testing.assert_allclose(outputs(config, with_adapter, scan)[0], expected, atol=1e-5)
    np.testing.assert_allclose(cached(config, with_adapter), hidden, atol=1e-5)


def test_a_rounded_base_is_merged_as_what_it_stands_for(random_params):
    params = quantize_layers(random_params(CONFIG), "int4")
    with_adapter = attach(params, trained(CONFIG, params=params), *mask_and_scale(ADAPTER))
    expected, hidden = outputs(CONFIG, fold(with_adapter))
    np.testing.assert_allclose(outputs(CONFIG, with_adapter)[0], expected, atol=1e-5)
    # `prepare` keeps the form, for a merged matrix would have to be rounded again.
    prepared = prepare(CONFIG, with_adapter)
    kept = prepared["layers"][0]["attention"]["query"]["weight"]
    assert isinstance(kept, LowRank)
    assert isinstance(kept.base, Int4)
    np.testing.assert_allclose(cached(CONFIG, prepared), hidden, atol=1e-5)


def test_prepare_merges_into_plain_matrices(random_params):
    with_adapter = attach(random_params(CONFIG), trained(CONFIG), *mask_and_scale(ADAPTER))
    prepared, expected = prepare(CONFIG, with_adapter), prepare(CONFIG, fold(with_adapter))
    assert jax.tree.structure(prepared) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), prepared, expected)


@pytest.mark.parametrize("form", ["plain", "int4"])
def test_lanes_of_several_ranks_share_one_base(form, random_params):
    """Each lane is its solo run of a smaller adapter, gradients too, and no program has a copy of the base a lane."""
    params = jax.tree.map(jnp.asarray, random_params(CONFIG))
    params = quantize_layers(params, form) if form != "plain" else params
    lanes = [trained(CONFIG, seed=seed) for seed in range(3)]
    ranks, alphas = jnp.array([1, 2, 4]), jnp.array([3.0, 8.0, 2.0])

    def loss(tree, params, adapter, rank=None, alpha=None):
        out = apply(CONFIG, attach(params, tree, *mask_and_scale(adapter, rank, alpha)), TOKENS)
        return jnp.mean(jnp.square(out))

    step = jax.value_and_grad(loss)
    vmapped = jax.jit(
        jax.vmap(lambda tree, params, rank, alpha: step(tree, params, ADAPTER, rank, alpha), (0, None, 0, 0))
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    program = vmapped.lower(stacked, params, ranks, alphas).compile().as_text()
    # Of a matrix [d_model, d_ff] a copy for each of three lanes would have such a shape; float activations have none.
    for shape in ("[3,16,24]", "[3,24,16]", "[3,2,16,24]", "[3,2,24,16]", "[2,3,16,24]", "[2,3,24,16]"):
        assert shape not in program, shape
    losses, gradients = vmapped(stacked, params, ranks, alphas)
    lane, rank = 1, 2
    alone = jax.jit(functools.partial(step, adapter=Adapter(rank, float(alphas[lane]))))
    one, gradient = alone(first_columns(lanes[lane], rank), params)
    np.testing.assert_allclose(losses[lane], one, rtol=1e-5)
    of_lane = jax.tree.map(lambda leaf: leaf[lane], gradients)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    jax.tree.map(close, first_columns(of_lane, rank), gradient)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_lane):  # what the mask leaves out learns nothing
        assert not np.asarray(leaf[..., rank:] if path[-1].key == "a" else leaf[..., rank:, :]).any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8-dynamic"])
def test_every_form_of_a_base_has_the_gradients_of_what_it_stands_for(kind, random_params):
    """Few rows, which a CPU multiplies block by block."""
    weight = quantize_layers(random_params(CONFIG), kind)["layers"]["dense"]["feed_forward"]["up"]["weight"]
    weight = jax.tree.map(lambda leaf: leaf[0], weight)
    factors = tuple(jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(((16, 2), (2, 24))))
    loss = lambda x, factors, base: jnp.sum(jnp.sin(matmul(x, LowRank(base, *factors, jnp.ones(2), jnp.ones(())))))
    for rows in (1, 20):
        x = jax.random.normal(KEY, (rows, 16))
        ours, expected = (jax.grad(loss, (0, 1))(x, factors, base) for base in (weight, plain(weight)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, expected)


@pytest.mark.parametrize("form", ["loop", "batched", "ragged", "own"])
def test_every_product_of_experts_takes_factors(form):
    """Values and gradients are those of the merged matrices; with a lane's mask, and for lanes that share the base."""
    rows_of, count, group = 3, 4, jnp.array([2, 0, 1, 3])
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    rows, base, a, b = draw(0, 4, rows_of, 5), draw(1, count, 5, 6), draw(2, 2, count, 5, 2), draw(3, 2, count, 2, 6)
    mask, scale = jnp.broadcast_to(jnp.array([1.0, 0.0]), (count, 2)), jnp.full(count, 3.0)

    def run(rows, weights):
        if form == "ragged":
            return ragged_product(rows.reshape(-1, 5), weights, jnp.full(count, rows_of))
        if form == "own":
            return own_product(rows, weights)
        return {"loop": loop_product, "batched": batched_product}[form](rows, weights, group)

    def loss(factors, rows, merge):
        weights = LowRank(base, *factors, mask, scale)
        return jnp.sum(jnp.sin(run(rows, merged(weights) if merge else weights)))

    lanes = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None, None)), static_argnums=2)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5),
        lanes((a, b), rows, False),
        lanes((a, b), rows, True),
    )


def test_factors_of_experts_are_split_as_their_matrices():
    """Over devices that hold some experts each, and inside an expert as its matrix."""
    params = jax.eval_shape(functools.partial(init, EXPERTS), KEY)
    tree = jax.eval_shape(lambda: init_adapter(EXPERTS, FURTHER, params, KEY))
    attached = jax.eval_shape(lambda tree, params: attach(params, tree, *mask_and_scale(FURTHER)), tree, params)
    mesh = abstract_mesh({"expert": 2, "tensor": 2})
    bare = shardings(mesh, tree)["layers"]["experts"]["feed_forward"]["experts"]["down"]
    whole = shardings(mesh, attached)["layers"]["experts"]["feed_forward"]["experts"]["down"]
    assert bare["a"].spec == whole.a.spec == PartitionSpec(None, "expert", "tensor", None)
    assert bare["b"].spec == whole.b.spec == PartitionSpec(None, "expert", None, None)
    assert whole.base.spec == PartitionSpec(None, "expert", "tensor", None)


def test_ranks_are_nested_and_start_as_nothing(random_params):
    params = random_params(CONFIG)
    large, small = (init_adapter(CONFIG, ADAPTER.replace(rank=rank), params, KEY) for rank in (8, 2))
    jax.tree.map(np.testing.assert_array_equal, first_columns(large, 2), small)
    a = np.asarray(large["layers"]["dense"]["feed_forward"]["up"]["weight"]["a"])
    assert a.shape == (2, 16, 8)
    assert np.abs(a).max() <= 16**-0.5
    np.testing.assert_allclose(a.std(), (3 * 16) ** -0.5, rtol=0.1)
    assert len(np.unique(a)) == a.size  # no column, layer or path has another's numbers
    assert not np.isin(a, large["layers"]["dense"]["feed_forward"]["gate"]["weight"]["a"]).any()
    with_adapter = attach(params, small, *mask_and_scale(ADAPTER.replace(rank=2)))
    jax.tree.map(np.testing.assert_array_equal, fold(with_adapter), params)


def test_alpha_is_divided_by_the_rank_or_its_root():
    mask, scale = jax.jit(functools.partial(mask_and_scale, ADAPTER))(2, 8.0)
    assert (mask.tolist(), float(scale)) == ([1, 1, 0, 0], 4)
    stabilised = ADAPTER.replace(rank_stabilised=True)
    assert [float(mask_and_scale(adapter)[1]) for adapter in (ADAPTER, stabilised)] == [1.5, 3]
    assert Adapter.from_dict(ADAPTER.replace(targets=["value", "query"]).to_dict()).targets == ("query", "value")


def test_factors_are_split_as_their_matrix():
    params = jax.eval_shape(functools.partial(init, CONFIG), KEY)
    tree = jax.eval_shape(lambda: init_adapter(CONFIG, ADAPTER, params, KEY))
    attached = jax.eval_shape(lambda tree, params: attach(params, tree, *mask_and_scale(ADAPTER)), tree, params)
    mesh = abstract_mesh({"fsdp": 2, "tensor": 2})
    bare, whole = shardings(mesh, tree)["layers"]["dense"], shardings(mesh, attached)["layers"]["dense"]
    for part, name, a, b in (
        ("attention", "query", ("fsdp", None), (None, ("tensor", "fsdp"))),
        ("attention", "output", (("tensor", "fsdp"), None), (None, "fsdp")),
    ):
        alone, leaf = bare[part][name]["weight"], whole[part][name]["weight"]
        assert alone["a"].spec == leaf.a.spec == PartitionSpec(None, *a)
        assert alone["b"].spec == leaf.b.spec == PartitionSpec(None, *b)
    assert whole["attention"]["query"]["weight"].base.spec == PartitionSpec(None, "fsdp", "tensor")
    lanes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), tree)
    of_lanes = shardings(abstract_mesh({"population": 2}), lanes, lanes=True)
    assert all(spec.spec[0] == "population" for spec in jax.tree.leaves(of_lanes))


def test_the_factor_that_reads_many_inputs_learns_more_slowly():
    tree = trained(MUP)
    rates = rate_multipliers(MUP, tree, "adam")["layers"]["dense"]["attention"]["output"]["weight"]
    assert rates == {"a": 0.25, "b": 1.0}


def test_what_cannot_be_is_an_error(tmp_path, random_params):
    params = random_params(CONFIG)
    tree = trained(CONFIG)
    with pytest.raises(InputError, match="'router', which gets no adapter: a router is trained whole"):
        Adapter(targets=("router",))
    with pytest.raises(InputError, match="unknown adapter target 'q_proj'; supported are 'query'"):
        Adapter(targets=("q_proj",))
    with pytest.raises(InputError, match=r"rank=9 exceeds 8.*attention/key/weight \(16 × 8\)"):
        init_adapter(CONFIG, Adapter(rank=9), params, KEY)
    with pytest.raises(InputError, match=r"\['gate'\] names none of the model's matrices, query, key"):
        adapted(CONFIG.replace(gated=False), Adapter(targets=("gate",)))
    all_experts = CONFIG.replace(experts=Experts(count=4, top_k=2, d_ff=12))
    with pytest.raises(InputError, match=r"\['up'\] names none of the model's matrices, query, key, .*, experts"):
        adapted(all_experts, Adapter(targets=("up",)))
    with pytest.raises(InputError, match=r"\['head'\] names none"):  # the token table makes the logits
        adapted(CONFIG, Adapter(targets=("head",)))
    with pytest.raises(InputError, match=r"weight has shape \[2, 16, .*the config asks for \[2, 32"):
        init_adapter(CONFIG.replace(d_model=32), ADAPTER, params, KEY)
    with pytest.raises(InputError, match=r"does not fit layers/dense/attention/.* matrix of shape \[3, 16, "):
        attach(random_params(CONFIG.replace(num_layers=3)), tree, *mask_and_scale(ADAPTER))
    with pytest.raises(InputError, match="the mask is for rank 2"):
        attach(params, tree, *mask_and_scale(Adapter(rank=2)))
    with pytest.raises(InputError, match=r"attach first, then infer\.prepare"):
        attach(prepare(CONFIG, params), tree, *mask_and_scale(ADAPTER))
    with pytest.raises(InputError, match="no parameter layers/dense, which the adapter changes"):
        attach(random_params(all_experts), tree, *mask_and_scale(ADAPTER))
    with pytest.raises(InputError, match='with "a" and "b" at every path'):
        attach(params, params, *mask_and_scale(ADAPTER))
    with pytest.raises(InputError, match="rank=5 must be a whole number from 1 to 4"):
        mask_and_scale(ADAPTER, 5)
    with_adapter = attach(params, tree, *mask_and_scale(ADAPTER))
    assert any(map(is_weight, jax.tree.leaves(with_adapter, is_leaf=is_weight)))
    with pytest.raises(InputError, match="through which nothing learns; use int8 or int4"):
        quantize_layers(params, "int8-dynamic")
    with pytest.raises(InputError, match="pruning takes plain matrices"):
        prune(CONFIG, with_adapter)
    with pytest.raises(InputError, match="fold these"):
        save_quantized(CONFIG, with_adapter, tmp_path / "rounded", "int8")
    with pytest.raises(InputError, match="save_hf takes plain matrices"):
        save_hf(CONFIG, with_adapter, tmp_path / "saved")


def test_every_linear_layer_of_every_architecture_has_a_target(variant):
    """All matrices inside layers but experts', routers and what weighs a shared expert."""
    shapes = jax.eval_shape(functools.partial(init, variant), KEY)
    paths = [
        tuple(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        if path[-1].key == "weight" and "layers" in [key.key for key in path]
    ]
    wanted = {path for path in paths if path[-2] not in ("router", "shared_gate")}
    assert set(adapted(variant, Adapter(rank=1))) == wanted
    assert {path[-2] for path in wanted} <= set(TARGETS)


def test_the_released_sizes_have_few_numbers():
    """LoRA of rank 8 on query and value of a 7B model is 4.2 million numbers (Hu et al. 2021, section 4.2)."""
    config = presets.get("llama2-7b")
    shapes = adapted(config, Adapter(rank=8, targets=("query", "value")))
    assert sum(layers * 8 * (d_in + d_out) for layers, d_in, d_out in shapes.values()) == 4_194_304
