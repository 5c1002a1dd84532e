"""Laws that hold of every architecture: causality, isolation of documents, gradients everywhere, scan = loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import (
    Execution,
    Experts,
    InputError,
    Latent,
    ModelConfig,
    RopeScaling,
    encode,
    forward,
    init,
    sentence_embedding,
)
from model.layout import groups, layer_kinds, places
from model.parameterization import names_of

SEQ = 11
SCANNED, UNROLLED = Execution(scan_layers=True), Execution(scan_layers=False)


def tokens_of(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 32, shape), jnp.int32)


def inputs_of(config, batch):
    """What a pass needs beside tokens."""
    if config.stack == "encoder-decoder":
        return {"encoder_tokens": tokens_of(batch, 7, seed=2), "encoder_segment_ids": jnp.ones((batch, 7), jnp.int32)}
    return {"token_types": jnp.arange(batch * SEQ).reshape(batch, SEQ) % 2} if config.num_token_types else {}


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, inputs):
    return forward(config, params, tokens, **inputs).logits


def test_causality(variant, random_params):
    """No logit depends on a later token; an encoder's depend on every one.

    By gradients, not by changing a token and comparing logits: a derivative that is exactly zero holds for every
    change at once and leaves no tolerance to argue about, while a comparison passes whenever the one change tried
    happens to move nothing. All tokens differ, so the row of the table is the input of one position; the head is
    untied, so the table has no other way to the logits. A capacity or balance that looked at the whole row would show
    here too.
    """
    config = variant.replace(tie_embeddings=False)
    params, tokens = random_params(config), jnp.arange(16, 16 + SEQ, dtype=jnp.int32)[None]
    direction = np.random.default_rng(3).normal(size=config.vocab_size).astype(np.float32)
    inputs = inputs_of(config, 1)
    if "encoder_tokens" in inputs:  # tokens that the decoder has not: the table is shared
        inputs["encoder_tokens"] = inputs["encoder_tokens"] % 16

    def of_table(table):
        changed = {**params, "embedding": {**params["embedding"], "tokens": table}}
        return forward(config, changed, tokens, **inputs).logits[0] @ direction

    jacobian = jax.jit(jax.jacrev(of_table))(params["embedding"]["tokens"])[:, tokens[0]]
    strength = np.abs(jacobian).max(axis=-1)
    future = np.triu(np.ones((SEQ, SEQ), bool), k=1)
    if config.stack == "encoder":
        assert (strength > 0).all()
    else:
        assert (strength[future] == 0).all()
        seen = np.eye(SEQ, dtype=bool) if config.sliding_window else ~future
        assert (strength[seen] > 0).all(), "every token sees itself and, without a window, all that came before"


def test_packed_documents_are_alone(variant, random_params):
    """Two documents and padding in one row give what each gives in a row of its own, positions included."""
    if variant.stack == "encoder-decoder":
        pytest.skip("its documents are packed on both sides; see test_encoder_segments")
    params, tokens = random_params(variant), tokens_of(3, SEQ).at[1:, :4].set(tokens_of(1, SEQ)[0, :8].reshape(2, 4))
    segments = jnp.asarray([[1] * 4 + [2] * 4 + [0] * 3, [1] * 4 + [0] * 7, [1] * 4 + [0] * 7], jnp.int32)
    logits = run(variant, params, tokens.at[0].set(tokens_of(1, SEQ)[0]), {"segment_ids": segments})
    np.testing.assert_allclose(logits[0, :8].reshape(2, 4, -1), logits[1:, :4], rtol=0, atol=2e-5)
    assert np.isfinite(logits).all()


def test_encoder_segments(random_params):
    """Each decoder document sees only its own encoder document."""
    config = ModelConfig(32, 16, 2, 2, stack="encoder-decoder", position="relative", max_seq_len=16)
    params, source, target = random_params(config), tokens_of(1, 8, seed=2), tokens_of(1, 6)
    packed = run(
        config,
        params,
        target,
        {
            "encoder_tokens": source,
            "encoder_segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]]),
            "segment_ids": jnp.asarray([[1, 1, 2, 2, 2, 2]]),
        },
    )
    first = run(config, params, target[:, :2], {"encoder_tokens": source[:, :3]})
    second = run(config, params, target[:, 2:], {"encoder_tokens": source[:, 3:7]})
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), rtol=0, atol=2e-5)


def test_scan_is_the_loop_and_every_parameter_gets_a_gradient(variant, random_params):
    params, tokens = random_params(variant), tokens_of(2, SEQ)
    inputs = inputs_of(variant, 2)

    def passed(execution, params):
        return forward(variant, params, tokens, **inputs, outputs=("hidden", "attention"), execution=execution)

    @jax.jit
    def graded(params):
        def loss(params):
            out = passed(SCANNED, params)
            extra = sum(value for name, value in out.auxiliary.items() if "loss" in name)
            return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) ** 2) + extra, out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads

    out, grads = graded(params)
    uniform = len(set(layer_kinds(variant))) == 1 and variant.stack != "encoder-decoder"
    if not uniform or variant.position == "rotary":  # as a scan, layers of one kind are all alike: some stand for all
        looped = jax.jit(passed, static_argnums=0)(UNROLLED, params)
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(looped), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert out.hidden.shape == (variant.num_layers + 1, 2, SEQ, variant.d_model)
    assert out.attention.shape == (variant.num_layers, 2, variant.num_heads, SEQ, SEQ)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = "/".join(names_of(path))
        assert np.isfinite(grad).all(), name
        if name.endswith("selection_bias"):
            assert (grad == 0).all(), "it is set by rule, not by gradient"
        elif not name.endswith("key/bias"):  # softmax does not see what is added to every key alike
            layers = len(grad) if "layers" in name else 1
            assert (np.abs(np.asarray(grad)).reshape(layers, -1).max(axis=1) > 1e-9).all(), name


def test_experts_report_in_the_order_of_their_layers(random_params):
    """Also where one round of the scan holds several expert layers, and where no layer has any."""
    config = ModelConfig(
        32, 16, 5, 2, experts=Experts(4, 1, 8, first_layer=1), sliding_window=4, layer_pattern=("local", "global")
    )
    params, tokens = random_params(config), tokens_of(2, SEQ)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def reports(config, params, execution=SCANNED):
        return forward(config, params, tokens, execution=execution).auxiliary

    use, looped = (reports(config, params, execution)["expert_use"] for execution in (SCANNED, UNROLLED))
    assert use.shape == (4, 4)
    assert len(np.unique(use, axis=0)) == 4, "layers differ"
    np.testing.assert_array_equal(use, looped)
    dense = config.replace(num_layers=2, experts=config.experts.replace(dense_layers=(0, 1)))
    assert jax.eval_shape(functools.partial(reports, dense), random_params(dense)) == {}


def test_dropout_of_every_stack(random_params):
    """The loop draws the scan's masks, in rounds of several layers too; rate 0 is none."""
    windows = {"sliding_window": 4, "layer_pattern": ("local", "global")}
    config = ModelConfig(32, 16, 4, 2, stack="encoder-decoder", num_encoder_layers=1, position="none", **windows)
    params, tokens = random_params(config), tokens_of(2, SEQ)

    @functools.partial(jax.jit, static_argnums=0)
    def dropped(execution, rate):
        how = {"dropout_rate": rate, "dropout_key": jax.random.key(1), "execution": execution}
        return forward(config, params, tokens, encoder_tokens=tokens, **how).logits

    rate, none = jnp.float32(0.4), run(config, params, tokens, {"encoder_tokens": tokens})
    scanned = dropped(SCANNED, rate)
    np.testing.assert_allclose(scanned, dropped(UNROLLED, rate), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(dropped(SCANNED, jnp.float32(0)), none, rtol=2e-4, atol=2e-5)
    assert np.abs(scanned - none).max() > 0.1


def test_what_stands_in_padding_does_not_matter(random_params):
    """Not even ids that no table has, in values and in gradients."""
    config = ModelConfig(
        32, 16, 2, 2, stack="encoder", position="learned", num_token_types=2, embedding_norm=True, max_seq_len=16
    )
    params, tokens, real = random_params(config), tokens_of(2, SEQ), jnp.arange(SEQ)[None] < 6

    def loss(params, tokens, types, positions):
        inputs = {"token_types": types, "positions": positions, "segment_ids": jnp.tile(real, (2, 1)).astype(jnp.int32)}
        return jnp.sum(jnp.where(real[..., None], forward(config, params, tokens, **inputs).logits, 0) ** 2)

    graded = jax.jit(jax.value_and_grad(loss))
    positions = jnp.tile(jnp.arange(SEQ), (2, 1))
    inputs = (tokens, tokens % 2, positions)
    spoilt = (jnp.where(real, value, 99) for value in inputs)
    for a, b in zip(*map(jax.tree.leaves, (graded(params, *inputs), graded(params, *spoilt))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_base": None},
        {"rope_base": float("inf")},
        {"norm_epsilon": [1]},
        {"rope_fraction": 1.5},
        {"eos_token_ids": None},
        {"eos_token_ids": ["a"]},
        {"eos_token_ids": [1.5]},
        {"decoder_start_token_id": None},
        {"layer_pattern": None},
        {"num_token_types": True},
        {"relative_buckets": 1, "position": "relative"},
        {"relative_buckets": 3, "position": "relative", "stack": "encoder"},
        {"attention_sinks": True, "latent": Latent(4, 3, 2, 4)},
    ],
    ids=lambda fields: "-".join(f"{name}={value}" for name, value in fields.items())[:40],
)
def test_impossible_fields_are_said_in_a_sentence_with_their_name(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ModelConfig(32, 16, 2, 4, **fields)


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        (RopeScaling, {"kind": "linear", "factor": "8"}),
        (RopeScaling, {"factor": None, "kind": "linear"}),
        (RopeScaling, {"low_frequency_factor": 4.0, "kind": "llama3", "factor": 2.0, "original_max_seq_len": 8}),
        (RopeScaling, {"beta_fast": 0.0, "kind": "yarn", "factor": 2.0, "original_max_seq_len": 8}),
        (Latent, {"q_rank": 0, "kv_rank": 4, "nope_dim": 3, "rope_dim": 2, "v_dim": 4}),
        (Experts, {"dense_layers": 3, "count": 4, "top_k": 1, "d_ff": 8}),
        (Experts, {"dense_layers": ["a"], "count": 4, "top_k": 1, "d_ff": 8}),
        (Experts, {"capacity_factor": "a", "count": 4, "top_k": 1, "d_ff": 8}),
        (Experts, {"scale": None, "count": 4, "top_k": 1, "d_ff": 8}),
        (Experts, {"shared_gate": True, "count": 4, "top_k": 1, "d_ff": 8}),
    ],
)
def test_impossible_parts_are_said_in_a_sentence(part, fields):
    name = "factor" if fields.get("kind") == "linear" else next(iter(fields))
    with pytest.raises(InputError, match=f"{part.__name__}.{name}"):
        part.from_dict(fields)


def test_layers_stand_where_the_layout_says(variant):
    """Stacks hold every layer once, in order; groups run every layer once, in order."""
    shapes = jax.eval_shape(functools.partial(init, variant), jax.random.key(0))
    for encoder in (False, True) if variant.stack == "encoder-decoder" else (False,):
        kinds, where = layer_kinds(variant, encoder), places(variant, encoder)
        layers = (shapes["encoder"] if encoder else shapes)["layers"]
        for name, stack in layers.items():
            assert {leaf.shape[0] for leaf in jax.tree.leaves(stack)} == {sum(n == name for n, _ in where)}
            assert [i for n, i in where if n == name] == list(range(len([n for n, _ in where if n == name])))
        assert [kind.name for kind in kinds] == [name for name, _ in where]
        run = [kind for group in groups(kinds) for kind in group.kinds * group.repeats]
        assert tuple(run) == kinds


def test_a_long_pattern_is_few_groups():
    config = ModelConfig(32, 16, 26, 2, sliding_window=4, layer_pattern=("local",) * 5 + ("global",), max_seq_len=16)
    assert [(g.first, len(g.kinds), g.repeats) for g in groups(layer_kinds(config))] == [(0, 6, 4), (24, 1, 2)]


@pytest.mark.parametrize(
    ("head", "stack"),
    [("classifier", "encoder"), ("classifier", "decoder"), ("scalar", "decoder"), ("none", "encoder")],
)
def test_other_heads(head, stack, random_params):
    """Padding changes no answer; shapes are as documented."""
    config = ModelConfig(
        32, 16, 2, 2, stack=stack, head=head, num_labels=3, head_bias=True, pooler=stack == "encoder", max_seq_len=16
    )
    params, tokens = random_params(config), tokens_of(2, SEQ)
    segments = jnp.asarray(np.arange(SEQ) < 6, jnp.int32)[None].repeat(2, axis=0)
    if head == "none":
        embedded = jax.jit(sentence_embedding, static_argnums=0)
        padded, short = embedded(config, params, tokens, segments), embedded(config, params, tokens[:, :6])
        np.testing.assert_allclose(np.linalg.norm(padded, axis=-1), 1, rtol=1e-5)
        assert jax.eval_shape(functools.partial(forward, config), params, tokens).logits is None
    else:
        padded, short = run(config, params, tokens, {"segment_ids": segments}), run(config, params, tokens[:, :6], {})
        assert padded.shape == ((2, 3) if head == "classifier" else (2, SEQ))
    np.testing.assert_allclose(padded[:, : short.shape[1]], short, rtol=0, atol=1e-5)


def test_inputs_that_do_not_belong_are_refused(random_params):
    decoder = ModelConfig(32, 16, 1, 2, max_seq_len=16)
    both = decoder.replace(stack="encoder-decoder", position="relative")
    tokens = tokens_of(1, 4)
    with pytest.raises(InputError, match="takes no encoder_tokens"):
        forward(decoder, random_params(decoder), tokens, encoder_tokens=tokens)
    with pytest.raises(InputError, match="needs encoder_tokens"):
        forward(both, random_params(both), tokens)
    with pytest.raises(InputError, match="num_token_types=0"):
        forward(decoder, random_params(decoder), tokens, token_types=tokens)
    with pytest.raises(InputError, match="encoder's sequence of 17"):
        forward(both, random_params(both), tokens, encoder_tokens=tokens_of(1, 17))
    with pytest.raises(InputError, match="encoder's sequence of 17"):
        encode(both, random_params(both), tokens_of(1, 17))


def test_depth_does_not_grow_the_program():
    """Compile time follows the program's text: under scan 48 layers are as long as 4."""
    config = ModelConfig(32, 16, 4, 2, max_seq_len=16)
    tokens = jnp.zeros((1, 8), jnp.int32)

    def length(layers):
        deep = config.replace(num_layers=layers)
        shapes = jax.eval_shape(functools.partial(init, deep), jax.random.key(0))
        loss = lambda params: jnp.sum(forward(deep, params, tokens, execution=SCANNED).logits)
        return len(jax.jit(jax.grad(loss)).lower(shapes).as_text())

    assert length(48) < 1.02 * length(4)
