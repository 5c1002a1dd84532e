"""However prompts come in (whole, in chunks, with a shared beginning) and the cache grows, the text is the same."""

import jax
import numpy as np
import pytest

from infer import GREEDY, Sampling, generate, prompts, stream
from infer.decode import decode
from model import InputError, ModelConfig, apply

CONFIG = ModelConfig(
    32, 16, 2, 2, num_kv_heads=1, max_seq_len=128, sliding_window=24, layer_pattern=("local", "global")
)
log_probabilities = jax.jit(lambda *inputs: jax.nn.log_softmax(apply(*inputs)), static_argnums=0)


def tokens_of(seed, length):
    return np.random.default_rng(seed).integers(0, 32, length).tolist()


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG, seed=5)


def check_greedy(params, prompts, result):
    """Every token is the argmax of the whole pass over what stands before it (equals may stand for another) and has
    its log-probability."""
    for prompt, made, logprobs in zip(prompts, result.tokens, result.logprobs, strict=True):
        row = np.zeros((1, CONFIG.max_seq_len), np.int32)
        row[0, : len(prompt) + len(made)] = [*prompt, *made]
        after = np.asarray(log_probabilities(CONFIG, params, row))[0, len(prompt) - 1 :][: len(made)]
        np.testing.assert_allclose(after[np.arange(len(made)), made], after.max(axis=-1), rtol=0, atol=1e-4)
        np.testing.assert_allclose(logprobs, after.max(axis=-1), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_cache_grows_past_a_power_of_two(params):
    prompt = tokens_of(0, 40)
    result = generate(CONFIG, params, [prompt], GREEDY, max_new_tokens=80)
    assert len(result.tokens[0]) == 80
    check_greedy(params, [prompt], result)


def test_at_most_a_program_for_every_power_of_two(params):
    """After a long text, a shorter one compiles nothing, whatever its settings."""

    def run(length, count, **settings):
        return generate(CONFIG, params, [tokens_of(1, length)], Sampling(**settings), max_new_tokens=count)

    run(40, 80)
    before = decode._cache_size(), prompts.prefill._cache_size()
    for count, settings in ((1, {}), (24, {"temperature": 0.0}), (79, {"top_p": 0.5, "min_p": 0.01, "seed": 3})):
        run(33 + count % 7, count, **settings)
    run(40, 9, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={3: 1.0}, logprobs=5, stop_ids=(1, 2, 3))
    assert (decode._cache_size(), prompts.prefill._cache_size()) == before


def test_long_prompts_come_in_chunks(params, monkeypatch):
    """Rows of different lengths, past the windows; a row may end chunks before the others."""
    rows = [tokens_of(seed, length) for seed, length in ((2, 75), (3, 5), (4, 32), (5, 16))]
    monkeypatch.setattr(prompts, "CHUNK", 16)
    check_greedy(params, rows, generate(CONFIG, params, rows, GREEDY, max_new_tokens=8))


def test_what_prompts_share_is_read_once(params, monkeypatch):
    beginning = tokens_of(6, 70)
    rows = [beginning + tokens_of(seed, length) for seed, length in ((7, 3), (8, 1), (9, 12))] + [beginning]
    read = []
    original = prompts.prefill

    def spy(config, params, tokens, lengths, cache, **others):
        read.append(int(np.sum(lengths)))
        return original(config, params, tokens, lengths, cache, **others)

    monkeypatch.setattr(prompts, "prefill", spy)
    check_greedy(params, rows, generate(CONFIG, params, rows, GREEDY, max_new_tokens=6))
    assert read == [69, 3 + 1 + 12 + 4], "at least one token of every row is read separately"


def test_samples_of_one_prompt_share_its_prefill(params):
    """Samples differ; with a seed they equal those of separate rows with consecutive seeds."""
    result = generate(CONFIG, params, [[1, 2, 3], [4]], [Sampling(n=3), Sampling(n=1)], max_new_tokens=12)
    assert len(result.tokens) == 4
    assert len({tuple(tokens) for tokens in result.tokens}) == 4
    seeded = generate(CONFIG, params, [[1, 2, 3]], Sampling(n=4, seed=7), max_new_tokens=12).tokens
    apart = generate(CONFIG, params, [[1, 2, 3]] * 4, [Sampling(seed=7 + i) for i in range(4)], max_new_tokens=12)
    assert seeded == apart.tokens
    assert len({tuple(tokens) for tokens in seeded}) == 4


def test_every_row_has_its_own_settings(params):
    rows = [tokens_of(10, 9), tokens_of(11, 4), tokens_of(12, 16), [7]]
    settings = [
        GREEDY,
        Sampling(temperature=0.7, top_k=5, seed=1),
        Sampling(repetition_penalty=1.5, seed=2, logprobs=3),
        Sampling(logit_bias={7: 5.0}, seed=3),
    ]
    together = generate(CONFIG, params, rows, settings, max_new_tokens=10)
    for index, (row, one) in enumerate(zip(rows, settings, strict=True)):
        alone = generate(CONFIG, params, [row], one, max_new_tokens=10)
        assert together.tokens[index] == alone.tokens[0]
    assert len(together.top_logprobs[2]) == 10
    for likeliest in together.top_logprobs[2]:
        assert len(likeliest) == 3
        assert list(likeliest.values()) == sorted(likeliest.values(), reverse=True)


class Letters:
    """Token i is letter i, two of them for odd ids."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) * (1 + i % 2) for i in ids)


def test_stop_strings_cut_the_text(params):
    """Also inside a token: the tokens are all that the text is made of, as `generate` and `stream` have them."""
    prompt, letters = tokens_of(13, 6), Letters()
    free = generate(CONFIG, params, [prompt], Sampling(seed=5), max_new_tokens=40, tokenizer=letters)
    text = letters.decode(free.tokens[0])
    assert free.text == [text]
    inside = 0
    for start in (4, 9, 10, 11, 12):
        stop = text[start : start + 3]
        sampling = Sampling(seed=5, stop_strings=(stop, "??"))
        cut = generate(CONFIG, params, [prompt], sampling, max_new_tokens=40, tokenizer=letters)
        assert cut.finish_reason == ["stop"]
        assert cut.text == [text[: text.index(stop)]]
        count = len(cut.tokens[0])
        assert cut.tokens[0] == free.tokens[0][:count]
        assert letters.decode(cut.tokens[0]).startswith(cut.text[0])
        assert len(letters.decode(cut.tokens[0][:-1])) < len(cut.text[0])
        assert cut.logprobs[0] == free.logprobs[0][:count]
        inside += letters.decode(cut.tokens[0]) != cut.text[0]
        *_, last = stream(CONFIG, params, [prompt], sampling, max_new_tokens=40, tokenizer=letters, every=3)
        assert [last[0].text, last[0].tokens] == [cut.text[0], cut.tokens[0]]
    assert inside, "one of them begins inside a token"
    assert generate(CONFIG, params, [prompt], GREEDY, max_new_tokens=4).text is None, "no tokenizer, no text"
    with pytest.raises(InputError, match="tokenizer"):
        generate(CONFIG, params, [prompt], Sampling(stop_strings=("a",)))


def test_streaming_hands_out_the_same_text(params):
    seen, rows = [], [tokens_of(14, 5), [3], [4, 5], [6]]
    for completions in stream(CONFIG, params, rows, GREEDY, max_new_tokens=30, every=4):
        seen.append([list(one.tokens) for one in completions])
    expected = generate(CONFIG, params, rows, GREEDY, max_new_tokens=30).tokens
    assert seen[-1] == expected
    assert [len(rows[0]) for rows in seen] == [1, 5, 9, 13, 17, 21, 25, 29, 30]
    assert all(rows[0] == expected[0][: len(rows[0])] for rows in seen)


def test_samplings_and_prompts_go_together(params):
    with pytest.raises(InputError, match="2 samplings were given for 1 prompts"):
        generate(CONFIG, params, [[1]], [GREEDY, GREEDY])
