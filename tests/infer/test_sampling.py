"""What is kept is what the definitions keep, and what is drawn follows the distribution that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from infer.sampling import SamplerState, Sampling, choose, truncate

VOCAB, DRAWS = 16, 20_000
LOGITS = (2 * np.random.default_rng(0).normal(size=VOCAB)).astype(np.float32)
ROWS = (2 * np.random.default_rng(1).normal(size=(5, VOCAB))).astype(np.float32)
truncated = jax.jit(truncate)
chosen = jax.jit(choose)


def state(seed=0, **settings):
    return SamplerState.create(Sampling(**settings), jax.random.key(seed))


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """By the definitions, in float64: temperature, then the k best, then the smallest set that reaches p."""
    weights = np.exp(np.float64(logits) / temperature)
    best_first = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = best_first[: top_k or None]
    total = sum(weights[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        nucleus.append(token)
        reached += weights[token] / total
        if top_p < 1 and reached >= top_p:
            break
    probabilities = np.zeros(len(logits))
    probabilities[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return probabilities


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB + 3},
    {"top_p": 1e-6},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
]
name_of = lambda settings: ", ".join(f"{name}={value}" for name, value in settings.items()) or "plain"


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_truncation_leaves_the_defined_distribution(settings):
    kept = np.asarray(truncated(state(**settings), ROWS))
    for row, logits in zip(kept, ROWS, strict=True):
        np.testing.assert_allclose(jax.nn.softmax(row), distribution(logits, **settings), atol=1e-6)
        assert np.isfinite(row[logits.argmax()]), "the best token always stays"


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB])
def test_top_k_keeps_exactly_k(k):
    finite = np.isfinite(truncated(state(top_k=k), ROWS))
    assert (finite.sum(axis=-1) == k).all()
    tied = np.isfinite(truncated(state(top_k=k), jnp.zeros((1, VOCAB))))
    assert tied.sum() == k, "also among equals"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    for row, logits in zip(np.asarray(truncated(state(top_p=p), ROWS)), ROWS, strict=True):
        probabilities = np.exp(logits) / np.exp(logits).sum()
        kept = np.isfinite(row)
        assert probabilities[kept].sum() >= p
        assert probabilities[kept].sum() - probabilities[kept].min() < p, "one fewer would not reach it"
        assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("top_k") != 1], ids=name_of)
def test_draws_follow_the_distribution(settings):
    """Chi-square of 20,000 draws; with a fixed key it passes always or never, a true sampler 999 times in 1000."""
    expected = distribution(LOGITS, **settings) * DRAWS
    drawn, _ = chosen(state(seed=4, **settings), np.broadcast_to(LOGITS, (DRAWS, VOCAB)), jnp.int32(0))
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    if support.sum() > 1:
        rare = support & (expected < 5)  # chi-square wants five or more in every cell: the rare share one
        observed, wanted = counts[support & ~rare], expected[support & ~rare]
        if rare.any():
            observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
        assert stats.chisquare(observed, wanted).pvalue > 0.001


def test_temperature_zero_is_greedy_with_the_models_logprob():
    token, logprob = chosen(state(temperature=0.0), ROWS, jnp.int32(0))
    np.testing.assert_array_equal(token, ROWS.argmax(axis=-1))
    np.testing.assert_allclose(logprob, np.log(np.exp(ROWS) / np.exp(ROWS).sum(-1, keepdims=True)).max(-1), atol=1e-5)


def test_steps_rows_and_keys_draw_apart():
    rows = np.zeros((200, VOCAB), np.float32)
    draw = lambda seed, step: np.asarray(chosen(state(seed), rows, jnp.int32(step))[0])
    np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
    for other in (draw(0, 4), draw(1, 3), np.roll(draw(0, 3), 1)):
        agreement = (draw(0, 3) == other).mean()
        assert agreement < 0.2, "independent draws of 16 tokens agree one time in sixteen"
