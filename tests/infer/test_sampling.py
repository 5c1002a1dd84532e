"""What is kept is what the definitions keep, and what is drawn follows the distribution that is left."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from infer.sampling import (
    MOST_LOGPROBS,
    History,
    SamplerState,
    Sampling,
    choose,
    distribution,
    row_keys,
    truncate,
)
from model.errors import InputError

VOCAB, ROWS, DRAWS = 16, 24, 50_000  # few batch sizes: programs are what costs
LOGITS = (2 * np.random.default_rng(0).normal(size=VOCAB)).astype(np.float32)
PROMPT, OUTPUT = [3, 5, 5, 9], [5, 2, 2, 2, 14]
chosen, truncated, distributed = jax.jit(choose), jax.jit(truncate), jax.jit(distribution)


def state(*samplings, seed=0):
    return SamplerState.create(samplings, row_keys(samplings, jax.random.key(seed)), VOCAB)


def history(rows=ROWS, prompt=PROMPT, output=OUTPUT, room=12):
    """Every row with this prompt and output, and ids behind them that must not be read."""
    said = [*prompt, *output]
    tokens = np.tile(np.array([*said, *[7] * (room - len(said))], np.int32), (rows, 1))
    lengths = [jnp.full(rows, len(part), jnp.int32) for part in (prompt, said)]
    return History(jnp.asarray(tokens), *lengths)


def defined(logits, sampling, prompt=PROMPT, output=OUTPUT):
    """By the definitions, in float64: bias, penalties, temperature, top-k, top-p, min-p."""
    logits = np.float64(logits)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token in {*prompt, *output}:
        logits[token] *= sampling.repetition_penalty if logits[token] < 0 else 1 / sampling.repetition_penalty
    for token in set(output):
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    if sampling.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    best_first = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = best_first[: sampling.top_k or None]
    share = weights[kept] / weights[kept].sum()
    if sampling.top_p < 1:
        kept = kept[: 1 + int(np.argmax(share.cumsum() >= sampling.top_p))]
    kept = [token for token in kept if weights[token] >= sampling.min_p]  # the likeliest weighs 1
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(top_k=5),
    Sampling(top_k=VOCAB + 3),
    Sampling(top_p=0.8),
    Sampling(top_p=0.95),
    Sampling(min_p=0.1),
    Sampling(repetition_penalty=1.7),
    Sampling(repetition_penalty=0.6),
    Sampling(presence_penalty=1.2),
    Sampling(frequency_penalty=-0.8),
    Sampling(logit_bias={3: 2.5, 8: -1.0, 11: -math.inf}),
    Sampling(temperature=1.7, top_k=9, top_p=0.9, min_p=0.12),
    Sampling(1.4, 10, 0.9, 0.05, 1.3, 0.4, 0.3, {2: 1.5, 4: -math.inf}),
]
CERTAIN = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, repetition_penalty=1.9, presence_penalty=0.3, frequency_penalty=0.2),
    Sampling(temperature=0.0, logit_bias={6: 30.0}, top_k=3, top_p=0.4),
    Sampling(temperature=1e-30),
    Sampling(temperature=1e-60),
    Sampling(top_k=1),
    Sampling(top_p=1e-60),
    Sampling(min_p=1.0),
]
EVERY = [*SETTINGS, *CERTAIN, Sampling(temperature=3.0)]


def name_of(sampling):
    given = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value != getattr(Sampling(), name))


def test_every_row_has_the_distribution_that_its_settings_define():
    for seed in range(3):
        logits = (3 * np.random.default_rng(seed).normal(size=(ROWS, VOCAB))).astype(np.float32)
        given = distributed(state(*EVERY), logits, history())
        for row, sampling, probabilities in zip(logits, EVERY, given, strict=True):
            np.testing.assert_allclose(probabilities, defined(row, sampling), atol=2e-6, err_msg=name_of(sampling))


def test_settings_penalties_and_neighbours_of_a_row_are_its_own():
    """A row alone draws what it draws among others, in any slot, to the bit."""
    logits = (2 * np.random.default_rng(2).normal(size=(ROWS, VOCAB))).astype(np.float32)
    random = np.random.default_rng(3)
    tokens = random.integers(0, VOCAB, size=(ROWS, 12)).astype(np.int32)
    prompts = random.integers(1, 5, size=ROWS).astype(np.int32)
    lengths = prompts + random.integers(0, 8, size=ROWS).astype(np.int32)
    past = History(jnp.asarray(tokens), jnp.asarray(prompts), jnp.asarray(lengths))
    rows = state(*EVERY)
    together, probabilities = chosen(rows, logits, past), distributed(rows, logits, past)
    order = random.permutation(ROWS)

    def shuffle(tree):
        return jax.tree.map(lambda leaf: leaf[order], tree)

    np.testing.assert_array_equal(chosen(shuffle(rows), logits[order], shuffle(past)).token, together.token[order])
    for row in range(ROWS):

        def alone(tree, row=row):
            return jax.tree.map(lambda leaf: leaf[row : row + 1], tree)

        here = (alone(rows), logits[row : row + 1], alone(past))
        np.testing.assert_array_equal(chosen(*here).token[0], together.token[row])
        np.testing.assert_array_equal(distributed(*here)[0], probabilities[row])
        expected = defined(
            logits[row],
            EVERY[row],
            tokens[row, : prompts[row]].tolist(),
            tokens[row, prompts[row] : lengths[row]].tolist(),
        )
        np.testing.assert_allclose(probabilities[row], expected, atol=2e-6, err_msg=name_of(EVERY[row]))


@pytest.mark.parametrize("sampling", SETTINGS, ids=name_of)
def test_draws_follow_the_distribution(sampling):
    """Chi-square of 50,000 draws; with a fixed key it passes always or never, a true sampler 999 times in 1000."""
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (DRAWS, *leaf.shape[1:])), state(sampling))
    rows = rows.replace(keys=jax.random.split(jax.random.key(5), DRAWS))
    drawn = chosen(rows, jnp.broadcast_to(LOGITS, (DRAWS, VOCAB)), history(DRAWS)).token
    counts, expected = np.bincount(drawn, minlength=VOCAB), defined(LOGITS, sampling) * DRAWS
    assert counts[expected == 0].sum() == 0
    rare = (expected > 0) & (expected < 5)  # chi-square wants five or more in every cell: the rare share one
    usual = expected >= 5
    assert usual.sum() > 2, "a setting that leaves too little to tell apart"
    observed, wanted = counts[usual], expected[usual]
    if rare.any():
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    assert stats.chisquare(observed, wanted).pvalue > 0.001


def test_certain_settings_choose_one_token_whatever_the_key():
    settings = [*CERTAIN, *CERTAIN, *SETTINGS[: ROWS - 2 * len(CERTAIN)]]
    logits = (2 * np.random.default_rng(4).normal(size=(ROWS, VOCAB))).astype(np.float32)
    expected = [defined(row, sampling).argmax() for row, sampling in zip(logits, settings, strict=True)]
    certain = slice(2 * len(CERTAIN))
    for seed in range(3):
        tokens = chosen(state(*settings, seed=seed), logits, history()).token
        np.testing.assert_array_equal(tokens[certain], expected[certain])
    greedy = state(*[Sampling(temperature=0.0)] * ROWS)
    np.testing.assert_array_equal(chosen(greedy, logits, history()).token, logits.argmax(axis=-1), "all rows greedy")


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB])
def test_top_k_keeps_exactly_k(k):
    rows = np.stack([LOGITS, np.zeros(VOCAB), np.repeat([1.0, -0.0, 0.0, -5.0], 4)]).astype(np.float32)
    kept = np.isfinite(truncated(state(*[Sampling(top_k=k)] * 3), rows))
    for row, logits in zip(kept, rows, strict=True):
        wanted = np.argsort(-logits, kind="stable")[:k]
        np.testing.assert_array_equal(np.flatnonzero(row), np.sort(wanted), "the first among equals")


@pytest.mark.parametrize("p", [0.1, 0.26, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    rows = np.stack([LOGITS, np.zeros(VOCAB), np.repeat([2.0, 1.0, 0.0, -5.0], 4)]).astype(np.float32)
    kept = np.isfinite(truncated(state(*[Sampling(top_p=p)] * 3), rows))
    for row, logits in zip(kept, rows, strict=True):
        probabilities = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
        best_first = np.argsort(-logits, kind="stable")
        reached = probabilities[best_first].cumsum()
        wanted = best_first[: 1 + int(np.argmax(reached >= p - 1e-7))]
        np.testing.assert_array_equal(np.flatnonzero(row), np.sort(wanted), "the first among equals")


def test_log_probabilities_are_the_models():
    """Log-probabilities are of the raw logits, with any settings; the likeliest tokens only if a row requests them."""
    settings = [Sampling(temperature=0.3, logit_bias={4: 500.0}), Sampling(temperature=0.0, logprobs=2)]
    settings = settings * (ROWS // 2)
    logits = (40 * np.random.default_rng(6).normal(size=(ROWS, VOCAB))).astype(np.float32)
    model = np.float64(logits) - logits.max(-1, keepdims=True)
    model -= np.log(np.exp(model).sum(-1, keepdims=True))
    choice = chosen(state(*settings), logits, history())
    assert (choice.token[::2] == 4).all()
    np.testing.assert_allclose(choice.logprob, model[np.arange(ROWS), choice.token], rtol=1e-5, atol=1e-5)
    best_first = np.argsort(-logits, axis=-1)[:, : min(MOST_LOGPROBS, VOCAB)]
    np.testing.assert_array_equal(choice.top_ids, best_first)
    np.testing.assert_allclose(choice.top_logprobs, np.take_along_axis(model, best_first, -1), rtol=1e-5, atol=1e-5)
    unasked = chosen(state(*[dataclasses.replace(row, logprobs=0) for row in settings]), logits, history())
    assert not unasked.top_ids.any()
    assert not unasked.top_logprobs.any()
    np.testing.assert_array_equal(unasked.token, choice.token)


def test_extreme_logits():
    inf = np.inf
    rows = np.array([[0, 1e4, -1e4, 9999, -inf, 3e38, -3e38, 2.9e38], [-inf] * 6 + [2.0, 2.0], [5.0] * 8], np.float32)
    rows = np.tile(np.concatenate([rows, np.full_like(rows, -inf)], axis=1), (ROWS // 3, 1))
    banned = dict.fromkeys((0, 7), -math.inf)
    for sampling in (
        Sampling(),
        Sampling(temperature=1e30),
        Sampling(top_k=3, top_p=0.99, min_p=0.01),
        Sampling(0.5, repetition_penalty=1e38, presence_penalty=1e38, frequency_penalty=-1e38),
        Sampling(top_p=0.9999999, repetition_penalty=1e-38, logit_bias=banned),
    ):
        rows_of = (state(*[sampling] * ROWS), rows, history(prompt=[5], output=[1, 6]))
        probabilities, token = np.asarray(distributed(*rows_of)), chosen(*rows_of).token
        assert np.isfinite(probabilities).all(), sampling
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
        assert (probabilities[np.isneginf(rows)] == 0).all()
        assert (probabilities[np.arange(ROWS), token] > 0).all()
        for banned_id, _ in sampling.logit_bias:
            assert (probabilities[:, banned_id] == 0).all()


def test_draws_differ_by_step_row_and_key_and_agree_by_seed():
    flat = np.zeros((ROWS, VOCAB), np.float32)

    def draw(samplings, seed=0, steps=range(8)):
        """[step, row]"""
        rows = state(*samplings, seed=seed)
        return np.stack([chosen(rows, flat, history(output=[1] * step)).token for step in steps])

    plain, seeded = [Sampling()] * ROWS, [Sampling(seed=row // 2) for row in range(ROWS)]
    first, pairs = draw(plain), draw(seeded)
    np.testing.assert_array_equal(first, draw(plain))
    for other in (np.roll(first, 1, 0), np.roll(first, 1, 1), draw(plain, seed=1), pairs):
        assert (first == other).mean() < 0.15, "independent draws of 16 tokens agree one time in sixteen"
    np.testing.assert_array_equal(pairs[:, ::2], pairs[:, 1::2], "equal seeds, equal draws")
    np.testing.assert_array_equal(pairs, draw(seeded, seed=9), "whatever generate's key")
    keys = row_keys([Sampling(seed=2**32 - 1), Sampling()], jax.random.key(3))
    np.testing.assert_array_equal(
        jax.random.key_data(keys),
        [jax.random.key_data(jax.random.key(2**32 - 1)), jax.random.key_data(jax.random.fold_in(jax.random.key(3), 1))],
    )


def test_changing_a_setting_compiles_nothing():
    def run(sampling):
        return chosen(state(sampling), LOGITS[None], history(1))

    run(Sampling())
    before = chosen._cache_size()
    for sampling in (*EVERY, Sampling(seed=3, logprobs=4)):
        run(sampling)
    assert chosen._cache_size() == before


def test_samplings_are_hashable_and_equal_by_value():
    given = Sampling(logit_bias={5: -1, 2: 3}, stop_ids=(1, 2))
    assert given == Sampling(logit_bias=((5, -1.0), (2, 3.0)), stop_ids=(1, 2))
    assert given.logit_bias == ((2, 3.0), (5, -1.0))
    assert len({given, dataclasses.replace(given), Sampling()}) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.inf},
        {"frequency_penalty": -math.inf},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": ((3, 1.0), (3, 2.0))},
        {"stop_ids": (-1,)},
        {"stop_strings": ("",)},
        {"n": 0},
        {"logprobs": MOST_LOGPROBS + 1},
        {"seed": -1},
        {"seed": 2**32},
    ],
    ids=str,
)
def test_a_bad_setting_is_named_in_one_sentence(settings):
    with pytest.raises(InputError, match=next(iter(settings))) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value)


def test_a_bias_outside_the_vocabulary_raises():
    with pytest.raises(InputError, match=f"logit_bias names the id {VOCAB}"):
        state(Sampling(logit_bias={VOCAB: 1.0}))
