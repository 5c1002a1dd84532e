"""Activations by name: what is returned, what edits of it do, and that neither depends on how layers are run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import decode_step, init_cache, prefill
from model import Edit, Execution, Experts, InputError, Latent, ModelConfig, apply, forward, init
from model.adapters import Adapter, attach, fold, init_adapter, mask_and_scale
from model.layout import places
from model.quantize import quantize_layers
from model.taps import TAPS, check_edits, tap_shapes

SEQ = 7
SCANNED, LOOPED = Execution(scan_layers=True, remat="full"), Execution(scan_layers=False)
BASE = ModelConfig(vocab_size=32, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=16)
CASES = {
    "decoder": BASE.replace(parameterization="mup", base_d_model=4, base_num_layers=1),
    "local-global-experts": BASE.replace(
        num_layers=5,
        sliding_window=3,
        layer_pattern=("local", "global"),
        experts=Experts(4, 2, 12, every=2),
        norm_placement="sandwich",
    ),
    "latent": BASE.replace(num_kv_heads=None, latent=Latent(kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5)),
    "encoder-decoder": BASE.replace(stack="encoder-decoder", num_encoder_layers=1, position="relative"),
    "post-norm-encoder": BASE.replace(
        stack="encoder", position="learned", norm="layernorm", norm_placement="post", use_bias=True, gated=False
    ),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def tokens_of(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 32, shape), jnp.int32)


TOKENS, OTHERS = tokens_of(2, SEQ), tokens_of(2, SEQ, seed=2)


def run(*arguments, **options):
    """The logits, and all activations by name, as NumPy arrays: what is taken of them compiles nothing."""
    return jax.device_get(_run(*arguments, **options))


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution")
def _run(config, params, tokens, edits=None, execution=SCANNED):
    source = {"encoder_tokens": TOKENS[:, :4]} if config.stack == "encoder-decoder" else {}
    out = forward(config, params, tokens, **source, outputs=tuple(TAPS), edits=edits, execution=execution)
    return out.logits, {name: getattr(out, name) for name in TAPS}


def edits_of(config, **fields):
    """Edits that change nothing, but for the fields given by name. All have one structure: one program serves all."""
    edits = {}
    for name, shape in tap_shapes(config, *TOKENS.shape).items():
        given = {"value": np.zeros(shape, np.float32), "where": np.zeros(shape, bool), **fields.get(name, {})}
        factor = given.pop("factor", 1.0)
        edits[name] = (Edit.scale(jnp.float32(factor)), Edit(**{key: jnp.asarray(x) for key, x in given.items()}))
    return edits


def at(config, name, *index):
    mask = np.zeros(tap_shapes(config, *TOKENS.shape)[name], bool)
    mask[index] = True
    return mask


def assert_close(ours, theirs, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4 if atol else 0, atol=atol), ours, theirs)


@cases
def test_edits_are_what_is_returned_scanned_and_looped(config, random_params):
    random = np.random.default_rng(0)
    fields = {
        name: {
            "factor": 0.9,
            "value": random.normal(size=shape).astype(np.float32),
            "where": random.random(shape) < 0.2,
        }
        for name, shape in tap_shapes(config, *TOKENS.shape).items()
    }
    edits = edits_of(config, **fields)
    scanned = run(config, random_params(config), TOKENS, edits)
    assert_close(run(config, random_params(config), TOKENS, edits, execution=LOOPED), scanned)
    for name, shape in tap_shapes(config, *TOKENS.shape).items():
        assert scanned[1][name].shape == shape
        np.testing.assert_array_equal(
            scanned[1][name][fields[name]["where"]], fields[name]["value"][fields[name]["where"]]
        )


@cases
def test_edits_that_change_nothing_change_no_bit(config, random_params):
    params = random_params(config)
    clean, unedited = run(config, params, TOKENS), run(config, params, TOKENS, edits_of(config))
    # The compiler rounds x + scale · y once where it sees the norm that made it, and twice behind an edit.
    assert_close(unedited, clean, atol=2e-5 if config.norm_placement == "sandwich" else 0)
    own = {name: {"value": x, "where": np.ones(x.shape, bool)} for name, x in unedited[1].items()}
    assert_close(run(config, params, TOKENS, edits_of(config, **own)), unedited, atol=0)


@cases
def test_patching_the_residual_stream_gives_the_other_run_from_there_on(config, random_params):
    params = random_params(config)
    logits, other = run(config, params, OTHERS, edits_of(config))
    for layer in (0, 2, config.num_layers):
        patch = {"value": other["hidden"], "where": at(config, "hidden", layer)}
        patched_logits, patched = run(config, params, TOKENS, edits_of(config, hidden=patch))
        assert_close(patched_logits, logits, atol=0)
        for name in TAPS:
            assert_close(patched[name][layer:], other[name][layer:], atol=0)


@cases
def test_zeroing_is_a_model_without_these_weights(config, random_params):
    """A head without its rows of the output matrix; a feed-forward layer whose last matrix is zero."""
    params, layer, head = random_params(config), 1, 2
    kind, index = places(config)[layer]
    width = tap_shapes(config, *TOKENS.shape)["heads"][-1]

    def without(chosen, rows=slice(None)):
        def changed(path, leaf):
            names = [entry.key for entry in path]
            leaf = np.array(leaf)
            if names[0] == kind and chosen(names[1:]):
                leaf[index, rows] = 0
            return leaf

        return params | {"layers": jax.tree_util.tree_map_with_path(changed, params["layers"])}

    headless = without(
        lambda names: names == ["attention", "output", "weight"], slice(head * width, head * width + width)
    )
    mask = at(config, "heads", layer, slice(None), slice(None), head)
    ours = run(config, params, TOKENS, edits_of(config, heads={"where": mask}))[0]
    assert_close(ours, run(config, headless, TOKENS)[0])
    flat = without(lambda names: names[0] == "feed_forward" and "down" in names)
    mask = at(config, "feed_forward_output", layer)
    bare = run(config, params, TOKENS, edits_of(config, feed_forward_output={"where": mask}))[0]
    assert_close(bare, run(config, flat, TOKENS)[0])
    assert np.abs(ours - bare).max() > 1e-2


@pytest.mark.parametrize("name", [name for name in CASES if name != "encoder-decoder"])  # which has a third branch
def test_branches_are_what_the_residual_stream_adds_up(name, random_params):
    config = CASES[name]
    params = random_params(config)
    taps = run(config, params, TOKENS)[1]
    before, after = taps["hidden"][:-1], taps["hidden"][1:]
    if config.norm_placement == "post":
        dense = params["layers"]["dense"]

        def norm(name, x):
            x = np.asarray(x, np.float64)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
            return x * dense[name]["scale"][:, None, None] + dense[name]["bias"][:, None, None]

        middle = norm("attention_norm", before + taps["attention_output"])
        assert_close(norm("feed_forward_norm", middle + taps["feed_forward_output"]), after)
    else:
        assert_close(before + taps["attention_output"] + taps["feed_forward_output"], after)
    if config.parameterization == "standard" and config.norm_placement != "sandwich":
        output = params["layers"]["dense"]["attention"]["output"]
        joined = taps["heads"].reshape(*taps["heads"].shape[:3], -1)
        mixed = np.einsum("lbsf,lfd->lbsd", joined, output["weight"])
        assert_close(mixed + output.get("bias", np.zeros((3, 16)))[:, None, None], taps["attention_output"])


def test_gradients_of_edits(random_params):
    """Attribution: the derivative of a logit by each activation agrees with a finite difference, under remat too."""
    config = CASES["local-global-experts"].replace(experts=None)
    params, random = random_params(config), np.random.default_rng(0)
    shapes = tap_shapes(config, *TOKENS.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def logit(execution, shifts):
        def value(shifts):
            edits = {name: Edit.add(shift) for name, shift in shifts.items()}
            return apply(config, params, TOKENS, edits=edits, execution=execution)[0, -1, 3]

        return jax.value_and_grad(value)(shifts)

    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    gradients = logit(SCANNED, zeros)[1]
    assert_close(logit(LOOPED, zeros)[1], gradients)
    for name, shape in shapes.items():
        step = jnp.asarray(1e-3 * random.normal(size=shape), jnp.float32)
        change = logit(SCANNED, zeros | {name: step})[0] - logit(SCANNED, zeros | {name: -step})[0]
        np.testing.assert_allclose(2 * jnp.vdot(gradients[name], step), change, rtol=1e-2, atol=1e-4)
        assert np.abs(gradients[name]).max() > 1e-2


def test_a_grid_of_edits_by_vmap_is_the_loop_in_one_compile(random_params):
    """Causal tracing: patch each position of each layer with the other run's."""
    config = CASES["decoder"]
    params, traces = random_params(config), []
    other = run(config, params, OTHERS)[1]["hidden"]

    @jax.jit
    def patched(layers, positions):
        traces.append(1)

        def one(layer, position):
            index = jnp.arange(config.num_layers + 1)[:, None, None, None]
            where = (index == layer) & (jnp.arange(SEQ)[:, None] == position)
            return apply(config, params, TOKENS, edits={"hidden": Edit.patch(other, where)}, execution=SCANNED)[:, -1]

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(layers, positions)

    grid = patched(jnp.arange(config.num_layers + 1), jnp.arange(SEQ))
    patched(jnp.arange(config.num_layers + 1)[::-1], jnp.arange(SEQ))
    assert len(traces) == 1
    for layer in range(config.num_layers + 1):
        for position in range(SEQ):
            patch = {"value": other, "where": at(config, "hidden", layer, slice(None), position)}
            logits = run(config, params, TOKENS, edits_of(config, hidden=patch))[0]
            np.testing.assert_allclose(grid[layer, position], logits[:, -1], rtol=1e-4, atol=2e-5)


def test_edits_of_a_rounded_model_with_an_adapter(random_params):
    """They are those of the model that its weights stand for."""
    config = BASE
    params, adapter = quantize_layers(random_params(config), "int4"), Adapter(rank=2)
    tree = init_adapter(config, adapter, params, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: leaf + 0.3, tree)
    adapted = attach(params, tree, *mask_and_scale(adapter))
    edits = edits_of(
        config, heads={"where": at(config, "heads", 1, slice(None), slice(None), 2)}, hidden={"factor": 1.1}
    )
    assert_close(run(config, adapted, TOKENS, edits), run(config, fold(adapted), TOKENS, edits), atol=1e-4)


@pytest.mark.parametrize("name", ["local-global-experts", "latent"])
def test_decoding_with_edits_is_the_whole_pass(name, random_params):
    config, split = CASES[name].replace(num_layers=2), 4
    params = random_params(config)
    shapes = tap_shapes(config, *TOKENS.shape)
    random = np.random.default_rng(0)
    draw = lambda name: (
        Edit.scale(0.8),
        Edit.patch(random.normal(size=shapes[name]), random.random(shapes[name]) < 0.2),
    )
    edits = {name: draw(name) for name in TAPS if name != "attention"}
    part = lambda cut: jax.tree.map(lambda leaf: leaf[:, :, cut] if jnp.ndim(leaf) else leaf, edits)
    logits, _ = run(config, params, TOKENS, edits)
    lengths, cache = jnp.full(2, split), init_cache(config, 2, SEQ)
    step, cache = prefill(config, params, TOKENS[:, :split], lengths, cache, edits=part(slice(split)))
    np.testing.assert_allclose(step, logits[:, split - 1], rtol=1e-4, atol=1e-4)
    for position in range(split, SEQ):
        now = part(slice(position, position + 1))
        step, cache = decode_step(config, params, TOKENS[:, position], cache, edits=now)
        np.testing.assert_allclose(step, logits[:, position], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="unknown name in edits 'attention'; supported are 'hidden', 'heads'"):
        decode_step(config, params, TOKENS[:, 0], cache, edits={"attention": Edit.zero()})


def test_shapes_broadcast(random_params):
    """A vector of size d_model, and one value for all layers, are what they are written out."""
    params, vector = random_params(BASE), jnp.arange(16.0)
    logits = jax.jit(lambda edits: apply(BASE, params, TOKENS, edits=edits))
    whole = {"attention_output": Edit.add(jnp.broadcast_to(vector, (3, 2, SEQ, 16)))}
    for short in (vector, vector[None, None, None]):
        np.testing.assert_array_equal(logits({"attention_output": Edit.add(short)}), logits(whole))


def test_edited_weights_mix_the_values_of_padding_too(random_params):
    """The first token sees itself alone; a query of padding, which sees nothing, is made to look there as well."""
    segment_ids = jnp.ones((2, SEQ), jnp.int32).at[:, -1].set(0)
    where = jnp.zeros((SEQ, SEQ), bool).at[-1, 0].set(True)
    look = {"attention": Edit.patch(1.0, where)}
    run_padded = functools.partial(forward, BASE, segment_ids=segment_ids, outputs=("heads",), execution=SCANNED)
    heads = jax.jit(lambda params: run_padded(params, TOKENS, edits=look).heads)(random_params(BASE))
    np.testing.assert_allclose(heads[:, :, -1], heads[:, :, 0], atol=1e-6)
    assert np.abs(heads).max() > 0.1


def test_weights_of_attention_are_edited_in_plain_xla():
    """A fused kernel takes other edits; Pallas refuses this window wherever it is meant."""
    config, execution = BASE.replace(sliding_window=4), Execution(attention_kernel="pallas")
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    logits = lambda name: jax.eval_shape(
        lambda params: apply(config, params, TOKENS, edits={name: Edit.zero()}, execution=execution), shapes
    )
    assert logits("attention").shape == (2, SEQ, 32)
    with pytest.raises(InputError, match="it does not support sliding windows"):
        logits("heads")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            {"resid_post": Edit.zero()},
            "unknown name in edits 'resid_post'; supported are 'hidden', 'attention', 'heads'",
        ),
        (
            {"heads": Edit.add(jnp.ones((3, 2, 4)))},
            r"shift of shape \(3, 2, 4\) .* \[layers=3, batch=2, seq=7, heads=4,",
        ),
        ({"hidden": Edit.patch(jnp.ones((3, 2, SEQ, 16)))}, r"\(3, 2, 7, 16\) .* hidden \[layers_and_one=4, "),
        ({"hidden": Edit.zero(jnp.ones((1, 1, 1, 4, 2, SEQ, 16), bool))}, "does not broadcast"),
        ({"hidden": Edit.zero(where=jnp.arange(4))}, r"edits\['hidden'\].where is of dtype int32; where is a boolean"),
        ({"hidden": jnp.zeros(3)}, "give an Edit, such as"),
        (
            {"hidden": Edit(value=1.0, shift=2.0)},
            r"edits\['hidden'\] has both a value and a factor or a shift, ",
        ),
        ({"hidden": Edit.add(1j)}, r"edits\['hidden'\].shift is of dtype complex64; .* real numbers"),
        ({"heads": Edit.scale("2")}, r"edits\['heads'\].factor is of type str; .* real numbers"),
        ({"heads": Edit.patch([[1.0], [1.0, 2.0]])}, r"edits\['heads'\].value is of type list"),
    ],
)
def test_what_cannot_be_is_said(edits, message):
    shapes = jax.eval_shape(functools.partial(init, BASE), jax.random.key(0))
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda params: forward(BASE, params, TOKENS, edits=edits), shapes)
    with pytest.raises(InputError, match="edits is of type Edit; give a dict"):
        check_edits(Edit.zero(), {})


def test_outputs_are_a_tuple_or_a_list():
    shapes = jax.eval_shape(functools.partial(init, BASE), jax.random.key(0))
    logits_of = lambda **options: jax.eval_shape(lambda params: forward(BASE, params, TOKENS, **options).logits, shapes)
    assert logits_of(outputs=["final_hidden"]) is None, "the head is skipped"
    with pytest.raises(InputError, match=r"outputs='hidden' is a string; give a tuple of names, such as \('hidden',\)"):
        logits_of(outputs="hidden")
