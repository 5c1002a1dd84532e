"""The engine says what `generate` says, whoever else is served and whenever a request comes; constraints hold."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import GREEDY, Sampling, generate
from infer.engine import Engine
from model import Experts, InputError, Latent, ModelConfig, accounting, apply

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=60,
    position="learned",
    sliding_window=18,
    layer_pattern=("local", "global"),
)
SYSTEM = [number * 7 % 32 for number in range(60)]
LIKELY = (22, 26, 27, 29, 20, 2, 10)  # ids of which this model gives many
SLOTS, CHUNK, REQUESTS, MOST = 5, 16, 100, 12
COMPILE = "/jax/core/compile/backend_compile_duration"


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids):
        return "".join(chr(ord("A") + token) for token in ids)


class Script:
    """A constraint: the tokens that may come at each place, then the end."""

    def __init__(self, *allowed, ends=()):
        self.allowed, self.ends, self.accepted = allowed, ends, []

    @property
    def finished(self):
        return len(self.accepted) == len(self.allowed)

    def mask(self):
        mask = np.zeros(1, np.uint32)
        for token in (*self.allowed[len(self.accepted)], *self.ends):
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def accept(self, token):
        assert token in self.allowed[len(self.accepted)]
        self.accepted.append(token)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG, seed=3)


@pytest.fixture(scope="module")
def engine(params):
    """A warm engine, with a clock that counts its calls."""
    engine = Engine(
        CONFIG,
        params,
        slots=SLOTS,
        capacity=1024,
        prefix_bytes=100_000,
        steps=4,
        chunk=CHUNK,
        tokenizer=Letters(),
        clock=itertools.count(1.0).__next__,
    )
    engine.warm_up()
    assert engine.idle
    return engine


def random_request(random, number):
    """(prompt, sampling, max_new_tokens): all settings in all mixtures; prompts of 1–3 blocks, some in common."""
    prompt = random.integers(0, 32, random.choice([1, 3, 9, 16, 17, 30, 47])).tolist()
    if random.random() < 0.3:
        prompt = SYSTEM[: len(prompt) // 2 * 2] + prompt[len(prompt) // 2 * 2 :]

    def maybe(value, other):
        return value if random.random() < 0.3 else other

    sampling = Sampling(
        temperature=float(random.choice([0.0, 0.7, 1.3])),
        top_k=maybe(5, 0),
        top_p=maybe(0.8, 1.0),
        min_p=maybe(0.1, 0.0),
        repetition_penalty=maybe(1.3, 1.0),
        presence_penalty=maybe(0.4, 0.0),
        frequency_penalty=maybe(-0.3, 0.0),
        logit_bias=maybe({3: 1.5, 4: -math.inf}, {}),
        stop_ids=maybe(LIKELY[: number % 8], ()),
        stop_strings=maybe(("J", "V"), ()),
        logprobs=maybe(3, 0),
        min_tokens=maybe(4, 0),
        seed=None if len(prompt) < CHUNK and random.random() < 0.2 else number,
    )
    return prompt, sampling, int(random.integers(1, MOST + 1))


def expected(config, params, requests, **options):
    """{request: (tokens, log-probabilities, finish reason, text)} by `generate`.

    Seeded and greedy rows run in one batch, as rows are independent; others one by one, since each is row 0 of the key.
    """
    seeded = [one for one in requests if one.sampling.seed is not None or one.sampling.temperature == 0]
    groups = [seeded, *([one] for one in requests if one not in seeded)]
    found = {}
    for group in groups:
        prompts, samplings = [one.prompt for one in group], [one.sampling for one in group]
        result = generate(config, params, prompts, samplings, max_new_tokens=MOST, **options)
        for row, one in enumerate(group):
            tokens, reason, text = result.tokens[row], result.finish_reason[row], result.text and result.text[row]
            if len(tokens) >= one.max_new_tokens:  # a shorter output is the beginning of a longer one
                tokens, reason = tokens[: one.max_new_tokens], "length"
                text = text and Letters().decode(tokens)
            found[one] = tokens, result.logprobs[row][: len(tokens)], reason, text
    return found


@pytest.fixture(scope="module")
def served(engine):
    """Requests that came at random between steps, and how many programs were compiled for them."""
    random = np.random.default_rng(0)
    compiled, requests = [], []

    def count(name, seconds, **_):
        if name == COMPILE:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    for number in range(REQUESTS):
        requests.append(engine.submit(*random_request(random, number)))
        if number % 10 == 0:  # beside the others; its output is not generate's
            engine.submit(SYSTEM[:40], Sampling(seed=1, stop_ids=()), MOST, Script(*[(3, 4, 5)] * 6))
        for _ in range(random.poisson(0.8)):
            engine.step()
    engine.run()
    assert engine.totals.prefix_hits > 40 * 9
    programs = len(compiled)
    jax.jit(lambda x: x + 1)(0)
    assert len(compiled) > programs, "a compile would have been seen"
    return requests, programs


def test_output_is_that_of_generate(params, served):
    requests, _ = served
    wanted = expected(CONFIG, params, requests, tokenizer=Letters())
    for request in requests:
        tokens, logprobs, reason, text = wanted[request]
        assert (request.tokens, request.finish_reason, request.text) == (tokens, reason, text), request
        np.testing.assert_allclose(request.logprobs, logprobs, atol=1e-4)
        assert [len(likeliest) for likeliest in request.top_logprobs] == [request.sampling.logprobs] * len(tokens)
    reasons = [request.finish_reason for request in requests]
    assert min(reasons.count("stop"), reasons.count("length")) > REQUESTS / 10
    assert len({tuple(request.tokens) for request in requests}) > REQUESTS / 2


def test_a_warm_engine_compiles_nothing(served):
    """With all settings, constraints and prefix hits."""
    assert served[1] == 0


def test_stop_ids_wait_for_min_tokens(served):
    requests, _ = served
    waiting = [one for one in requests if one.sampling.min_tokens and one.sampling.stop_ids]
    for request in waiting:
        if request.finish_reason == "stop" and not request.sampling.stop_strings:
            assert len(request.tokens) >= 4
        assert not set(request.tokens[:4]) & set(request.sampling.stop_ids)
    assert sum(one.finish_reason == "stop" for one in waiting) > 1
    assert any(0 < len(one.tokens) < 4 for one in requests if one.finish_reason == "stop"), "others stop before"


def test_a_constraint_decides_which_tokens_come(engine, params):
    """From the first token on; log-probabilities stay the model's, and the neighbours notice nothing."""
    prompt, forced = SYSTEM[:20], [9, 0, 31, 9]
    neighbour = engine.submit([5, 6], Sampling(seed=1, stop_ids=()), 20)
    scripts = [Script(*([token] for token in forced)), Script(*[(1, 2)] * 9, ends=(30,)), Script([7], [8], [9])]
    bias = {30: 1e6}
    requests = [
        engine.submit(prompt, GREEDY, MOST, scripts[0]),
        engine.submit(prompt, Sampling(seed=2, stop_ids=(30,), logit_bias=bias, min_tokens=3), MOST, scripts[1]),
        engine.submit(prompt, Sampling(stop_ids=()), 2, scripts[2]),
    ]
    engine.run()
    assert [one.finish_reason for one in requests] == ["stop", "stop", "length"]
    assert [one.tokens for one in requests] == [forced, [], [7, 8]], "the end may come first where the constraint says"
    assert scripts[0].accepted == forced
    logits = apply(CONFIG, params, jnp.array([prompt + forced]))[0, len(prompt) - 1 : -1]
    wanted = jax.nn.log_softmax(logits)[np.arange(4), np.array(forced)]
    np.testing.assert_allclose(requests[0].logprobs, wanted, atol=1e-4)
    assert neighbour.tokens == generate(CONFIG, params, [[5, 6]], neighbour.sampling, max_new_tokens=20).tokens[0]


class Broken(Script):
    """A constraint that fails in one of its methods, the second time."""

    def __init__(self, method):
        super().__init__(*[(1, 2, 3)] * 9)
        self.method, self.calls = method, 0

    def fails(self, method):
        self.calls += method == self.method
        return method == self.method and self.calls == 2

    def mask(self):
        if self.fails("mask"):
            raise ArithmeticError("a bad mask")
        if self.fails("nothing"):
            return np.zeros(1, np.uint32)
        return np.zeros(2, np.uint32) if self.fails("shape") else super().mask()

    def accept(self, token):
        if self.fails("accept"):
            raise ArithmeticError("a bad token")
        super().accept(token)


@pytest.mark.parametrize(
    ("method", "message", "tokens"),
    [("mask", "a bad mask", 1), ("accept", "a bad token", 2), ("nothing", "no token", 1), ("shape", r"1 words", 1)],
)
def test_a_constraint_that_fails_ends_its_own_request(engine, method, message, tokens):
    failing = engine.submit([1, 2], GREEDY, MOST, Broken(method))
    others = [engine.submit([2], GREEDY, MOST, Script([4], [5])), engine.submit([3], Sampling(stop_ids=()), MOST)]
    returned = []
    while not engine.idle:
        returned += engine.step()
    assert (failing.finish_reason, len(failing.tokens)) == ("error", tokens)
    assert returned[[one.finish_reason for one in returned].index("error")] is failing
    assert failing.finished is not None
    with pytest.raises((ArithmeticError, ValueError), match=message):
        raise failing.error
    assert [one.finish_reason for one in others] == ["stop", "length"]
    assert others[0].tokens == [4, 5]


def test_times_are_in_order(served):
    requests, _ = served
    for request in requests:
        times = [request.submitted, request.first_token, *request.token_times, request.finished]
        assert times == sorted(times)
        assert len(request.token_times) == len(request.tokens)
        assert not request.tokens or request.first_token == request.token_times[0]
    firsts = [request.first_token for request in requests]
    assert firsts == sorted(firsts), "first come, first served"
    assert len(set(firsts)) > REQUESTS / 2, "rows are let in one by one"


def test_what_step_returns_is_what_changed(engine):
    requests = [engine.submit([number], GREEDY, 6) for number in range(3)]
    seen = dict.fromkeys(requests, 0)
    while not engine.idle:
        changed = engine.step()
        assert len(set(changed)) == len(changed)
        assert set(changed) == {one for one in requests if len(one.tokens) > seen[one]}
        seen |= {one: len(one.tokens) for one in requests}
    assert list(seen.values()) == [6] * 3
    assert engine.step() == []


def test_tokens_dropped_with_a_stop_string_lose_their_times(engine):
    """The string is longer than a step, so that tokens were handed out before it was whole."""
    sampling = Sampling(temperature=0.0, logit_bias={1: 1e6}, stop_ids=(), stop_strings=("B" * 6,))
    request = engine.submit([2], sampling, 20)
    assert request in engine.step()
    assert request.tokens == [1]
    engine.run()
    assert (request.tokens, request.token_times, request.finish_reason) == ([], [], "stop")


def test_a_long_prompt_does_not_starve_running_rows(engine):
    running = engine.submit([1], Sampling(stop_ids=()), 40)
    engine.step()
    long = engine.submit([2] * 47, GREEDY, 2)
    counts = []
    while long.first_token is None:
        engine.step()
        counts.append(len(running.tokens))
    assert len(counts) >= 47 / CHUNK, "one chunk a step"
    assert np.all(np.diff(counts) == engine.steps), "and a full step of decoding beside each"
    engine.run()


def test_cancelling(engine, params):
    """A request may wait, be in prefill, run or have ended; others are unaffected, and slots are free again."""
    running, reading, waiting = (engine.submit([7] * length, GREEDY, 12) for length in (3, 47, 5))
    neighbour = engine.submit([5, 6], Sampling(seed=1), 12)
    engine.step()
    assert running.tokens
    engine.cancel(waiting)
    for request in (running, reading, waiting):
        engine.cancel(request)
    had = list(running.tokens)
    assert set(engine.step()) - {neighbour} == {running, reading, waiting}
    engine.run()
    for request in (running, reading, waiting):
        assert request.finish_reason == "cancelled"
        assert request.finished is not None
    assert (running.tokens, reading.tokens, waiting.tokens) == (had, [], [])
    assert neighbour.tokens == expected(CONFIG, params, [neighbour])[neighbour][0]
    engine.cancel(neighbour)
    assert neighbour.finish_reason == "length", "what has ended stays as it ended"
    others = [engine.submit([number], Sampling(stop_ids=()), 40) for number in range(SLOTS)]
    for _ in range(SLOTS):
        engine.step()
    assert all(request.tokens and request.finish_reason is None for request in others), "every row is in use again"
    engine.run()


@pytest.mark.parametrize(
    ("prompt", "settings", "count", "message"),
    [
        ([], {}, 4, "is empty"),
        ([1, 32], {}, 4, r"the id 32.*vocabulary of 32"),
        ([1] * 58, {}, 4, r"58 tokens and 4 new.*do not fit.*60"),
        ([1], {}, 0, "max_new_tokens=0"),
        ([1], {"n": 2}, 4, r"n=2 in one request.*seed"),
        ([1], {"stop_ids": tuple(range(33))}, 4, "33 stop ids.*at most 32"),
        ([1], {"logit_bias": {32: 1.0}}, 4, "the id 32.*vocabulary of 32"),
    ],
)
def test_submit_raises_for_requests_that_can_never_be_served(engine, prompt, settings, count, message):
    with pytest.raises(InputError, match=message) as error:
        engine.submit(prompt, Sampling(**settings), count)
    assert "\n" not in str(error.value)
    assert engine.idle


def test_memory_limits_the_number_of_slots(params):
    """A request one token longer than the capacity raises, and so does a cache one byte smaller than a slot."""
    each = accounting.kv_cache_bytes(CONFIG, 1, 20)
    engine = Engine(CONFIG, params, slots=9, capacity=20, cache_bytes=4 * each - 1)
    assert engine.slots == 3
    cache = engine._state.cache
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) == 3 * each
    with pytest.raises(InputError, match=r"capacity=20"):
        engine.submit([1] * 17, GREEDY, 4)
    with pytest.raises(InputError, match=r"stop_strings=\('x',\).*tokenizer"):
        engine.submit([1], Sampling(stop_strings=("x",)), 4)
    with pytest.raises(InputError, match=rf"cache_bytes={each - 1:,}.*{each:,} bytes"):
        Engine(CONFIG, params, capacity=20, cache_bytes=each - 1)
    for name in ("slots", "capacity", "steps", "chunk"):
        with pytest.raises(InputError, match=f"{name}=0"):
            Engine(CONFIG, params, **{name: 0})
    with pytest.raises(InputError, match="steps=33 must be a whole number from 1 to 32"):
        Engine(CONFIG, params, steps=33)


ROTARY = CONFIG.replace(position="rotary", num_heads=4, num_kv_heads=2)
KINDS = {
    "int8": (ROTARY.replace(attention_sinks=True), "int8", 32),
    "latent-experts": (
        ROTARY.replace(
            num_kv_heads=None,
            latent=Latent(kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5),
            experts=Experts(count=4, top_k=2, d_ff=12),
        ),
        None,
        16,
    ),
    "encoder-decoder": (
        CONFIG.replace(
            stack="encoder-decoder",
            sliding_window=None,
            layer_pattern=("global",),
            num_encoder_layers=1,
            position="relative",
            attention_scale=1.0,
            relative_buckets=8,
        ),
        None,
        16,
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache(random_params, kind):
    """Prompts shorter and longer than the ring, in rows that others had before.

    A chunk is all of a prompt where the cache is int8: a later one would read what the earlier ones rounded.
    """
    config, cache_dtype, chunk = KINDS[kind]
    params = random_params(config)
    engine = Engine(config, params, slots=2, capacity=45, cache_dtype=cache_dtype, steps=5, chunk=chunk)
    random = np.random.default_rng(1)
    requests = []
    for number, length in enumerate([30, 2, 15, 20, 5, 31, 1]):
        sampling = Sampling(temperature=number % 3 * 0.5, seed=number)
        requests.append(engine.submit(random.integers(0, 32, length).tolist(), sampling, MOST))
        engine.step()
    engine.run()
    wanted = expected(config, params, requests, cache_dtype=cache_dtype)
    for request in requests:
        assert request.tokens == wanted[request][0]
        np.testing.assert_allclose(request.logprobs, wanted[request][1], atol=1e-4)
