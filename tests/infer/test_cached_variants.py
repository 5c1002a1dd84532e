"""Cached decode is the whole pass for every architecture: windows, latent vectors, experts, an encoder's side."""

import functools

import jax
import numpy as np
import pytest

from infer import GREEDY, decode_step, generate, init_cache, prefill, prepare
from model import InputError, ModelConfig, accounting, apply
from model.layout import layer_kinds

PROMPT, TOTAL, CAPACITY = 8, 13, 14
LENGTHS = np.array([8, 3, 1], np.int32)
SOURCE_LENGTHS = np.array([5, 7, 2], np.int32)


def tokens_of(batch, seq, seed=1):
    return np.random.default_rng(seed).integers(1, 32, (batch, seq)).astype(np.int32)


whole = jax.jit(apply, static_argnums=0)


def sources(config):
    """(inputs of `apply`, inputs of the first `prefill`) of an encoder-decoder."""
    if config.stack != "encoder-decoder":
        return {}, {}
    tokens = tokens_of(3, 7, seed=2)
    inside = np.arange(7) < SOURCE_LENGTHS[:, None]
    return (
        {"encoder_tokens": tokens, "encoder_segment_ids": inside.astype(np.int32)},
        {"encoder_tokens": np.where(inside, tokens, 31 - tokens), "encoder_lengths": SOURCE_LENGTHS},
    )


def decoded(config, params, tokens, chunks):
    """Logits after each row's prompt, given in chunks, and after each further token: [batch, 1 + TOTAL − PROMPT, …]."""
    cache = init_cache(config, len(tokens), CAPACITY, encoder_capacity=9)
    prompt = np.where(np.arange(PROMPT) < LENGTHS[:, None], tokens[:, :PROMPT], 31 - tokens[:, :PROMPT])
    first, start, encoder = np.zeros((len(tokens), config.vocab_size), np.float32), 0, sources(config)[1]
    for chunk in chunks:
        inside = np.clip(LENGTHS - start, 0, chunk)
        part = prompt[:, start : start + chunk]
        logits, cache = prefill(config, params, part, inside, cache, fresh=chunk == PROMPT, **encoder)
        first, start, encoder = np.where((inside > 0)[:, None], logits, first), start + chunk, {}
    steps = [first]
    for step in range(TOTAL - PROMPT):
        logits, cache = decode_step(config, params, tokens[np.arange(len(tokens)), LENGTHS + step], cache)
        steps.append(logits)
    return np.stack(steps, axis=1)


def uncached(config, params, tokens):
    """The same logits from the whole pass."""
    logits = np.asarray(whole(config, params, tokens, **sources(config)[0]))
    return np.stack([logits[row, n - 1 : n + TOTAL - PROMPT] for row, n in enumerate(LENGTHS)])


def shortest(config):
    """The first layers that have one of every kind, at least two."""
    kinds = layer_kinds(config)
    count = next(count for count in range(2, len(kinds) + 1) if set(kinds[:count]) == set(kinds))
    return config.replace(num_layers=count, num_encoder_layers=min(config.num_encoder_layers, 2))


@pytest.fixture(scope="module")
def prepared(random_params):
    """config → its parameters, prepared."""
    return functools.cache(lambda config: prepare(config, random_params(config)))


def test_cached_is_uncached(variant, random_params, prepared):
    """Rows of different lengths, past every window, in two chunks, with prepared parameters."""
    if variant.stack == "encoder":
        with pytest.raises(InputError, match="no cache"):
            init_cache(variant, 1, 4)
        return
    config, tokens = shortest(variant), tokens_of(3, TOTAL)
    expected = uncached(config, random_params(config), tokens)
    assert expected.std() > 0.1
    np.testing.assert_allclose(decoded(config, prepared(config), tokens, (4, 4)), expected, rtol=0, atol=1e-4)


@pytest.mark.long  # of few architectures: test_cached.py
def test_plain_parameters_and_other_chunks_change_nothing(variant, random_params):
    """All at once into a cache that is known to be empty; and unevenly."""
    if variant.stack == "encoder":
        return
    params, tokens = random_params(variant), tokens_of(3, TOTAL)
    expected = uncached(variant, params, tokens)
    for chunks in ((PROMPT,), (3, 4, 1)):
        np.testing.assert_allclose(decoded(variant, params, tokens, chunks), expected, rtol=0, atol=1e-4)


@pytest.mark.long
def test_an_int8_cache_costs_half_a_percent_of_the_loss(decoder, random_params):
    """Step by step, so that all that is seen but the newest was rounded: keys and values, rings, latent vectors."""
    params, tokens = random_params(decoder), tokens_of(3, 12)

    def loss(dtype):
        cache, logits = init_cache(decoder, 3, CAPACITY, dtype), []
        for token in tokens.T:
            after, cache = decode_step(decoder, params, token, cache)
            logits.append(after)
        return cross_entropy(np.stack(logits, axis=1))

    def cross_entropy(logits):
        logprobs = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
        return -np.mean(np.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

    exact, rounded = loss("float32"), loss("int8")
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert exact == pytest.approx(cross_entropy(whole(decoder, params, tokens)), rel=1e-4)


def test_a_full_row_gets_nan_and_nothing_is_written(decoder, prepared):
    """Of a ring, too: the oldest entry of the window stays."""
    config, tokens = shortest(decoder), tokens_of(3, TOTAL)
    params, cache = prepared(config), init_cache(config, 3, CAPACITY, encoder_capacity=9)
    for start in (0, 4):
        inside = np.clip(LENGTHS - start, 0, 4)
        _, cache = prefill(config, params, tokens[:, start : start + 4], inside, cache)
    for step in range(CAPACITY - PROMPT):
        logits, cache = decode_step(config, params, tokens[:, step], cache)
    assert np.isfinite(logits).all(), "full to the brim is not too full"
    before, lengths = jax.device_get((cache.layers, cache.lengths))
    logits, cache = decode_step(config, params, tokens[:, 0], cache)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()
    np.testing.assert_array_equal(cache.lengths, lengths + np.array([0, 1, 1]))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache.layers), strict=True):
        np.testing.assert_array_equal(old[0], new[0])


def test_padding_past_the_table_of_positions(random_params):
    """A chunk's padding may stand where no learned position is; a ring's chunk is seen before it is written."""
    config = ModelConfig(32, 16, 1, 2, position="learned", sliding_window=4, max_seq_len=CAPACITY)
    params, tokens = random_params(config), tokens_of(2, CAPACITY)
    expected = whole(config, params, tokens)
    cache, start = init_cache(config, 2, CAPACITY), CAPACITY - 3
    _, cache = prefill(config, params, tokens[:, :start], np.full(2, start, np.int32), cache)
    chunk = np.concatenate([tokens[:, start:], tokens[:, :3]], axis=1)
    logits, cache = prefill(config, params, chunk, np.array([2, 3], np.int32), cache)
    np.testing.assert_allclose(logits[0], expected[0, start + 1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[1], expected[1, start + 2], rtol=0, atol=1e-4)


def test_cache_bytes_are_those_of_accounting(variant):
    """A window's layer holds the window, latent attention its vectors, an encoder-decoder both sides; scales count."""
    if variant.stack == "encoder":
        assert accounting.kv_cache_bytes(variant, 2, 10) == 0
        return
    for dtype in (None, "bfloat16", "int8"):
        shapes = jax.eval_shape(functools.partial(init_cache, variant, 2, 10, dtype))
        allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.layers))
        assert accounting.kv_cache_bytes(variant, 2, 10, dtype) == allocated


def test_greedy_generation_is_the_argmax_of_the_whole_pass(random_params):
    """Of an encoder-decoder the prompts are the encoder's."""
    config = ModelConfig(
        32, 16, 1, 2, stack="encoder-decoder", position="relative", max_seq_len=32, decoder_start_token_id=3
    )
    params, prompts = random_params(config), np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32)
    made = generate(config, params, [[5, 6, 7, 8], [9, 10]], GREEDY, max_new_tokens=6).tokens
    decoder = np.array([[3, *row[:-1]] for row in made], np.int32)  # causal: each logit is that of the row cut there
    logits = whole(config, params, decoder, encoder_tokens=prompts, encoder_segment_ids=np.int32(prompts > 0))
    assert made == logits.argmax(axis=-1).tolist()
    assert made[0] != made[1], "the encoder is heard"


def test_models_that_cannot_generate_raise(random_params):
    config = ModelConfig(32, 16, 1, 2, stack="encoder", head="masked-language-model")
    with pytest.raises(InputError, match="does not generate"):
        generate(config, random_params(config), [[1]])
    both = ModelConfig(32, 16, 1, 2, stack="encoder-decoder", position="relative", max_seq_len=16)
    params, cache = random_params(both), init_cache(both, 1, 4)
    with pytest.raises(InputError, match="encoder_capacity=4"):
        prefill(both, params, tokens_of(1, 1), np.ones(1, np.int32), cache, encoder_tokens=tokens_of(1, 7))
