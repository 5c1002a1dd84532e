"""The beam finds what a plain search of the same width finds, and a beam that is wide enough finds the best of all."""

import itertools

import jax
import numpy as np
import pytest

import infer.beam
from infer.beam import beam_search
from model import InputError, ModelConfig, apply

WIDE = ModelConfig(
    vocab_size=12, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, max_seq_len=16, sliding_window=3
)
PAIR = WIDE.replace(vocab_size=4, stack="encoder-decoder", num_encoder_layers=1, sliding_window=None)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
STOPS = (7, 11)
whole = jax.jit(apply, static_argnums=0)


def scores_after(config, params, prompt, outputs):
    """Log-probabilities of the token after the prompt and each output, all of one length, from the whole pass."""
    start, inputs = list(prompt), {}
    if config.stack == "encoder-decoder":
        start, sources = [config.decoder_start_token_id], np.tile(np.array(prompt, np.int32), (64, 1))
        inputs = {"encoder_tokens": sources}
    tokens = np.zeros((64, config.max_seq_len), np.int32)
    length = len(start) + len(outputs[0])
    for row, output in zip(tokens, outputs, strict=False):
        row[:length] = [*start, *output]
    logits = whole(config, params, tokens, **inputs)[: len(outputs), length - 1]
    return np.asarray(jax.nn.log_softmax(logits))


def by_hand(config, params, prompt, beams, new, penalty, stops, early=False):
    """(tokens, score, ended) of the finished hypotheses, best first, by lists."""
    running, finished = [((), 0.0)], []
    for length in range(1, new + 1):
        scores = scores_after(config, params, prompt, [tokens for tokens, _ in running])
        longer = [
            ((*old, token), s + row[token])
            for (old, s), row in zip(running, scores, strict=True)
            for token in range(config.vocab_size)
        ]
        longer.sort(key=lambda one: -one[1])
        finished += [(t[:-1], s / length**penalty, "stop") for t, s in longer[:beams] if t[-1] in stops]
        running = [one for one in longer if one[0][-1] not in stops][:beams]
        if length == new:
            finished += [(t, s / length**penalty, "length") for t, s in running]
        finished = sorted(finished, key=lambda one: -one[1])[:beams]
        if len(finished) == beams:
            hope = running[0][1] / (new if early == "never" and penalty > 0 else length) ** penalty
            if early is True or hope <= finished[-1][1]:
                break
    return finished


def same(result, prompt, expected):
    n = len(result.tokens[prompt])
    assert [tuple(tokens) for tokens in result.tokens[prompt]] == [tokens for tokens, _, _ in expected[:n]]
    np.testing.assert_allclose(result.scores[prompt], [score for _, score, _ in expected[:n]], rtol=0, atol=1e-4)
    assert result.finish_reason[prompt] == [reason for _, _, reason in expected[:n]]


@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (0.0, True), (2.0, "never"), (-0.5, False), (1.0, True)])
def test_a_plain_search_finds_the_same(random_params, penalty, early):
    params = random_params(WIDE, seed=3)
    settings = {"stop_ids": STOPS, "length_penalty": penalty, "early_stopping": early}
    result = beam_search(WIDE, params, PROMPTS, beams=4, n=4, max_new_tokens=8, **settings)
    for number, prompt in enumerate(PROMPTS):
        same(result, number, by_hand(WIDE, params, prompt, 4, 8, penalty, STOPS, early))
    assert penalty > 1 or "stop" in set(itertools.chain(*result.finish_reason))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_full_width_finds_the_best_of_all(penalty, random_params):
    """No prefix is ever left out, so that nothing that is possible scores better; here of an encoder-decoder."""
    params, prompt, new, stop = random_params(PAIR, seed=5), [1, 3, 2], 3, 2
    settings = {"length_penalty": penalty, "early_stopping": "never", "stop_ids": [stop], "max_new_tokens": new}
    result = beam_search(PAIR, params, [prompt], beams=PAIR.vocab_size ** (new - 1), n=4, **settings)
    others = [token for token in range(PAIR.vocab_size) if token != stop]
    sums, everything = {(): 0.0}, []
    for length in range(1, new + 1):
        after = dict(zip(sums, scores_after(PAIR, params, prompt, list(sums)), strict=True))
        everything += [(tokens, (sums[tokens] + row[stop]) / length**penalty, "stop") for tokens, row in after.items()]
        sums = {(*t, token): sums[t] + row[token] for t, row in after.items() for token in others}
    everything += [(tokens, score / new**penalty, "length") for tokens, score in sums.items()]
    same(result, 0, sorted(everything, key=lambda one: -one[1]))
    assert len({len(tokens) for tokens, _, _ in everything}) == new + 1


def test_one_beam_is_greedy(random_params):
    params = random_params(WIDE, seed=3)
    for early, penalty in itertools.product([False, True], [0.0, 1.0]):
        settings = {"stop_ids": STOPS, "length_penalty": penalty, "early_stopping": early}
        result = beam_search(WIDE, params, PROMPTS, beams=1, max_new_tokens=8, **settings)
        for number, prompt in enumerate(PROMPTS):
            tokens, logprobs = [], []
            while len(tokens) < 8 and not {*tokens} & {*STOPS}:
                scores = scores_after(WIDE, params, prompt, [tokens])[0]
                tokens.append(int(scores.argmax()))
                logprobs.append(scores.max())
            kept = len(tokens) - (tokens[-1] in STOPS)
            assert result.tokens[number] == [tokens[:kept]]
            assert result.finish_reason[number] == ["stop" if kept < len(tokens) else "length"]
            np.testing.assert_allclose(result.logprobs[number][0], logprobs[:kept], rtol=0, atol=1e-4)
            np.testing.assert_allclose(result.scores[number][0], sum(logprobs) / len(tokens) ** penalty, atol=1e-3)


def test_settings_compile_nothing_and_prompts_are_independent(random_params):
    params = random_params(WIDE, seed=3)

    def run(prompts, **settings):
        return beam_search(WIDE, params, prompts, max_new_tokens=8, stop_ids=STOPS, **settings)

    together = run(PROMPTS)
    compiled = infer.beam._search_steps._cache_size()
    for settings in ({"length_penalty": 0.3}, {"early_stopping": True}, {"n": 3}):
        run(PROMPTS, **settings)
    assert infer.beam._search_steps._cache_size() == compiled
    reordered = run(PROMPTS[::-1])
    assert reordered.tokens == together.tokens[::-1]
    assert infer.beam._search_steps._cache_size() == compiled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 0}, "beams=0"),
        ({"beams": 2, "n": 3}, "n=3.*beams=2"),
        ({"n": 0}, "n=0"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"stop_ids": [12]}, "id 12.*vocabulary of 12"),
        ({"early_stopping": "always"}, "early_stopping='always'"),
        ({"max_new_tokens": 16}, "max_seq_len=16"),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(InputError, match=message):
        beam_search(WIDE, {}, PROMPTS, **{"max_new_tokens": 4, **settings})
