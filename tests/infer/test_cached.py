"""Prefill and decode with a cache give what the whole pass gives, whatever the architecture and however it is cut."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import decode_step, init_cache, prefill, prepare
from model import InputError, ModelConfig, apply

PROMPT, TOTAL, CAPACITY = 6, 9, 12
LENGTHS = np.array([6, 3, 1], np.int32)  # of the prompts; each row then gets TOTAL - PROMPT tokens more

OPTIONS = {
    "position": ("learned", "sinusoidal", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "num_kv_heads": (4, 2, 1),  # MHA, GQA, MQA
    "activation": ("relu", "gelu", "gelu_tanh", "silu"),
    "gated": (False, True),
    "tie_embeddings": (False, True),
    "use_bias": (False, True),
}


def parts_of(choice, size):
    return set(itertools.combinations(sorted(choice.items()), size))


def covering_set(size):
    """Combinations in which all values of every `size` options meet, each the one that covers most that is new."""
    everything = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    missing = set().union(*(parts_of(choice, size) for choice in everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda choice: len(parts_of(choice, size) & missing))
        chosen.append(best)
        missing -= parts_of(best, size)
    return chosen


VALUES, PAIRS = covering_set(1), covering_set(2)


def as_config(choice):
    return ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=1 if choice.get("position") == "learned" else 2,
        num_heads=4,
        d_ff=24,
        max_seq_len=CAPACITY,
        **choice,
    )


ROTARY = as_config({"num_kv_heads": 2})
LEARNED = as_config({"position": "learned", "norm": "layernorm", "use_bias": True, "gated": False})


def tokens_of(batch, seq):
    return np.random.default_rng(1).integers(0, 32, (batch, seq)).astype(np.int32)


whole = jax.jit(apply, static_argnums=0)
copy = functools.partial(jax.tree.map, jnp.copy)


def right_padded(tokens, lengths):
    """Garbage where the padding is: nothing may depend on it."""
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 31 - tokens)


def run(config, params, tokens, lengths, chunk=None):
    """Logits after each row's prompt and after each further token of it: [batch, 1 + TOTAL − PROMPT, vocab]."""
    cache = init_cache(config, len(tokens), CAPACITY)
    prompt = right_padded(tokens[:, :PROMPT], lengths)
    if chunk is None:
        logits, cache = prefill(config, params, prompt, lengths, cache)
    else:
        collected = np.zeros((len(tokens), config.vocab_size), np.float32)
        for start in range(0, PROMPT, chunk):
            inside = np.clip(lengths - start, 0, chunk)
            logits, cache = prefill(config, params, prompt[:, start : start + chunk], inside, cache)
            collected = np.where((inside > 0)[:, None], logits, collected)
        logits = collected
    steps = [logits]
    for step in range(TOTAL - PROMPT):
        token = tokens[np.arange(len(tokens)), lengths + step]
        logits, cache = decode_step(config, params, token, cache)
        steps.append(logits)
    np.testing.assert_array_equal(cache.lengths, lengths + TOTAL - PROMPT)
    return np.stack(steps, axis=1)


def expected(config, params, tokens, lengths):
    logits = np.asarray(whole(config, params, tokens))
    return np.stack([logits[row, n - 1 : n + TOTAL - PROMPT] for row, n in enumerate(lengths)])


def test_the_covering_sets_cover():
    seen = set().union(*(parts_of(choice, 2) for choice in PAIRS))
    for (a, values_of_a), (b, values_of_b) in itertools.combinations(sorted(OPTIONS.items()), 2):
        for pair in itertools.product(values_of_a, values_of_b):
            assert ((a, pair[0]), (b, pair[1])) in seen
    assert len(PAIRS) <= 24
    for name, values in OPTIONS.items():
        assert {choice[name] for choice in VALUES} == set(values)
    assert len(VALUES) == max(map(len, OPTIONS.values()))


def check_cached_is_uncached(choice, random_params):
    """Rows of different lengths in one batch: every row's logits are those of `apply` on it alone."""
    config = as_config(choice)
    params, tokens = random_params(config), tokens_of(3, TOTAL)
    np.testing.assert_allclose(
        run(config, params, tokens, LENGTHS), expected(config, params, tokens, LENGTHS), rtol=0, atol=1e-4
    )


def in_words(choice):
    return "-".join(map(str, choice.values()))


@pytest.mark.parametrize("choice", VALUES, ids=in_words)
def test_cached_is_uncached_with_every_option(choice, random_params):
    check_cached_is_uncached(choice, random_params)


@pytest.mark.long
@pytest.mark.parametrize("choice", PAIRS, ids=in_words)
def test_cached_is_uncached_with_every_two_options(choice, random_params):
    check_cached_is_uncached(choice, random_params)


@pytest.mark.long  # of every architecture: test_cached_variants.py
@pytest.mark.parametrize("config", [ROTARY, LEARNED], ids=["rotary", "learned"])
def test_a_prompt_may_come_in_chunks(config, random_params):
    """A chunk of 4 and one of 2; a row of 3 tokens has nothing in the second."""
    params, tokens = random_params(config), tokens_of(3, TOTAL)
    np.testing.assert_allclose(
        run(config, params, tokens, LENGTHS, chunk=4), run(config, params, tokens, LENGTHS), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("config", [ROTARY, LEARNED], ids=["rotary", "learned"])
def test_prepared_parameters_are_the_plain_ones(config, random_params):
    """In a whole pass; with a cache: test_cached_variants.py."""
    params, tokens = random_params(config), tokens_of(3, TOTAL)
    prepared = prepare(config, params, "float32")
    np.testing.assert_allclose(whole(config, prepared, tokens), whole(config, params, tokens), rtol=0, atol=1e-4)
    assert jax.tree.structure(prepare(config, prepared)) == jax.tree.structure(prepared), "preparing twice is once"


def test_prepared_in_bfloat16_is_near(random_params):
    params, tokens = random_params(ROTARY), tokens_of(3, TOTAL)
    prepared = prepare(ROTARY, params, "bfloat16")
    matrices = [leaf for leaf in jax.tree.leaves(prepared) if leaf.ndim == 2]
    assert {leaf.dtype.itemsize for leaf in matrices} == {2}
    exact = np.asarray(whole(ROTARY, params, tokens))
    error = np.abs(whole(ROTARY, prepared, tokens) - exact).max() / exact.std()
    assert 0 < error < 0.1
    with pytest.raises(InputError, match="bfloat16"):
        prepare(ROTARY, params, "bfloat61")


def test_a_full_row_gets_nan_and_nothing_is_written(random_params):
    """Here where the table of positions ends with the cache; of every architecture: test_cached_variants.py."""
    params, tokens = random_params(LEARNED), tokens_of(3, CAPACITY)
    lengths = np.array([CAPACITY, 4, 1], np.int32)
    logits, cache = prefill(LEARNED, params, tokens, lengths, init_cache(LEARNED, 3, CAPACITY))
    assert np.isfinite(logits).all(), "full to the brim is not too full"
    expected = whole(LEARNED, params, tokens[:, :TOTAL])[1]
    for step in range(2):
        before = jax.device_get(cache.layers)
        logits, cache = decode_step(LEARNED, params, tokens[:, 4 + step], cache)
        assert np.isnan(logits[0]).all()
        np.testing.assert_allclose(logits[1], expected[4 + step], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(cache.lengths, [CAPACITY, 5 + step, 2 + step])
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache.layers), strict=True):
            np.testing.assert_array_equal(old[0], new[0])
            untouched = np.arange(CAPACITY) != 4 + step
            np.testing.assert_array_equal(old[1][:, untouched], new[1][:, untouched])
            assert not np.array_equal(old[1], new[1])


def test_an_empty_chunk_leaves_a_row_as_it_is(random_params):
    params, tokens = random_params(ROTARY), tokens_of(3, PROMPT)
    _, cache = prefill(ROTARY, params, tokens, np.array([4, 4, 1], np.int32), init_cache(ROTARY, 3, CAPACITY))
    before = jax.device_get(cache.layers)
    _, cache = prefill(ROTARY, params, tokens, np.array([0, 2, 6], np.int32), cache)
    np.testing.assert_array_equal(cache.lengths, [4, 6, 7])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache.layers), strict=True):
        np.testing.assert_array_equal(old[0], new[0])


def test_the_cache_is_donated_and_can_be_branched_and_one_program_serves_all_steps(random_params):
    compiled = decode_step._cache_size()
    params, tokens = random_params(ROTARY), tokens_of(3, TOTAL)
    empty = init_cache(ROTARY, 3, CAPACITY)
    _, trunk = prefill(ROTARY, params, tokens[:, :PROMPT], LENGTHS, empty)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(empty.layers))
    branch = copy(trunk)
    one, grown = decode_step(ROTARY, params, tokens[:, 0], trunk)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trunk.layers))
    decode_step(ROTARY, params, tokens[:, 2], grown)
    again, _ = decode_step(ROTARY, params, tokens[:, 0], copy(branch))
    other, _ = decode_step(ROTARY, params, tokens[:, 1], branch)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    assert decode_step._cache_size() <= compiled + 1


def test_impossible_caches_raise():
    with pytest.raises(InputError, match="capacity=13 exceeds max_seq_len=12"):
        init_cache(LEARNED, 1, 13)
    for batch, capacity in ((0, 4), (1, 0)):
        with pytest.raises(InputError, match=r"(batch|capacity)=0 must be a whole number of at least 1"):
            init_cache(ROTARY, batch, capacity)
