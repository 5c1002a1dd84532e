"""`generate` says what the model says, token by token, and compiles little."""

import jax
import numpy as np
import pytest

from infer import GREEDY, Sampling, generate, init_cache
from infer.decode import decode, init_decode_state
from model import InputError, ModelConfig, apply

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=20, position="learned"
)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
NEW = 8
whole = jax.jit(apply, static_argnums=0)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG, seed=3)


def log_probabilities(params, tokens):
    """Of the token after `tokens`, from the whole pass. Padded to the context: what follows cannot matter."""
    padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(jax.nn.log_softmax(whole(CONFIG, params, padded)[0, len(tokens) - 1]))


@pytest.fixture(scope="module")
def by_hand(params):
    """(tokens, log-probabilities) of greedy decoding in a plain loop, for every prompt."""
    rows = []
    for prompt in PROMPTS:
        tokens, logprobs = [], []
        for _ in range(NEW):
            scores = log_probabilities(params, prompt + tokens)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        rows.append((tokens, logprobs))
    return rows


def test_greedy_is_the_argmax_of_apply(params, by_hand):
    result = generate(CONFIG, params, PROMPTS, GREEDY, max_new_tokens=NEW)
    assert result.tokens == [tokens for tokens, _ in by_hand]
    assert result.finish_reason == ["length"] * 3
    for logprobs, (_, expected) in zip(result.logprobs, by_hand, strict=True):
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    assert len({tuple(tokens) for tokens in result.tokens}) == 3, "three prompts that go different ways"


def test_each_row_stops_at_its_own_stop_id(params, by_hand):
    stop_ids = (by_hand[0][0][3], by_hand[1][0][6])
    result = generate(CONFIG, params, PROMPTS, Sampling(temperature=0.0, stop_ids=stop_ids), max_new_tokens=NEW)
    for row, (tokens, logprobs) in enumerate(by_hand):
        end = next((i for i, token in enumerate(tokens) if token in stop_ids), NEW)
        assert result.tokens[row] == tokens[:end]
        np.testing.assert_allclose(result.logprobs[row], logprobs[:end], atol=1e-4)
        assert result.finish_reason[row] == ("stop" if end < NEW else "length")
    assert "stop" in result.finish_reason


def test_stop_ids_default_to_the_configs():
    config = CONFIG.replace(eos_token_ids=(7, 9))
    samplings = [GREEDY, Sampling(stop_ids=()), Sampling(stop_ids=(5,))]
    rows = init_decode_state(config, PROMPTS, samplings, init_cache(config, 3, 8), NEW)
    assert [set(ids.tolist()) - {-1} for ids in rows.stop_ids] == [{7, 9}, set(), {5}]


@pytest.mark.parametrize("count", [1, 5, NEW])
def test_max_new_tokens(params, by_hand, count):
    result = generate(CONFIG, params, PROMPTS, GREEDY, max_new_tokens=count)
    assert result.tokens == [tokens[:count] for tokens, _ in by_hand]


def test_a_row_does_not_depend_on_its_neighbours(params, by_hand):
    """Reversed rows have the same outputs; single rows: test_prompts.py."""
    reordered = generate(CONFIG, params, PROMPTS[::-1], GREEDY, max_new_tokens=NEW)
    assert reordered.tokens == [tokens for tokens, _ in by_hand[::-1]]


def test_the_context_can_be_filled_to_its_end(params):
    """20 tokens is no power of two: the padding inside may not reach past the position table."""
    prompts = [[row] * 18 for row in range(3)]
    for prompt, made in zip(prompts, generate(CONFIG, params, prompts, GREEDY, max_new_tokens=2).tokens, strict=True):
        first = int(log_probabilities(params, prompt).argmax())
        assert made == [first, int(log_probabilities(params, [*prompt, first]).argmax())]


def test_the_key_decides(params):
    sampling = Sampling(temperature=1.0)

    def text(seed):
        return generate(CONFIG, params, PROMPTS, sampling, max_new_tokens=NEW, key=jax.random.key(seed))

    assert text(0) == text(0)
    assert text(0).tokens != text(1).tokens
    assert text(0) == generate(CONFIG, params, PROMPTS, sampling, max_new_tokens=NEW), "no key is key 0"


def test_logprobs_are_the_models_own(params):
    """Before temperature and truncation: what the model gave the sampled token."""
    result = generate(CONFIG, params, PROMPTS, Sampling(temperature=2.0, top_k=8), max_new_tokens=NEW)
    for prompt, tokens, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        expected = [log_probabilities(params, prompt + tokens[:i])[token] for i, token in enumerate(tokens)]
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_settings_compile_nothing(params):
    def run(count=NEW, **settings):
        return generate(CONFIG, params, PROMPTS, Sampling(**settings), max_new_tokens=count).tokens

    run()
    compiled = decode._cache_size()
    outputs = [run(temperature=0.5), run(temperature=0.0), run(top_k=3), run(top_p=0.5), run(count=6)]
    assert decode._cache_size() == compiled
    assert len({str(output) for output in outputs}) == len(outputs), "every setting did something"


def test_truncation_to_one_token_is_greedy(params, by_hand):
    for settings in ({"top_k": 1}, {"top_p": 1e-6}):
        result = generate(CONFIG, params, PROMPTS, Sampling(temperature=1.5, **settings), max_new_tokens=NEW)
        assert result.tokens == [tokens for tokens, _ in by_hand]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 4, "no prompt"),
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1], [2, 32]], 4, r"prompt 1 has the id 32.*vocabulary of 32"),
        ([[-1]], 4, r"prompt 0 has the id -1"),
        ([[1] * 17], 4, r"17 tokens and 4 new.*max_seq_len=20"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_bad_prompts_raise(params, prompts, count, message):
    with pytest.raises(InputError, match=message):
        generate(CONFIG, params, prompts, GREEDY, max_new_tokens=count)
